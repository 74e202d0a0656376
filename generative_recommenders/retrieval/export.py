"""Export of a model's two sides: the encoder of queries as a program, the items as embeddings or an index."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from generative_recommenders.errors import UserError, first_line, not_installed
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops import dispatch
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.recommender import Recommender


class QueryEncoder(torch.nn.Module):
    """States of histories from plain tensors, as it is exported. names: of the event columns, in their order."""

    def __init__(self, model: SequenceRecommender, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = copy.copy(model), names
        self.model.autocast = None  # a program computes in the dtype of its weights

    def forward(self, item_ids: torch.Tensor, lengths: torch.Tensor, *events: torch.Tensor) -> torch.Tensor:
        """``[B, D]`` of internal ids ``[B, N]`` int64, right-padded with 0, and lengths ``[B]`` int64."""
        batch = {"item_ids": item_ids, "lengths": lengths, **dict(zip(self.names, events))}
        return self.model.encode_query(batch, padded=True).states


def query_inputs(recommender: Recommender, rows: int = 2, width: int = 3) -> dict[str, torch.Tensor]:
    """Inputs of a recommender's `QueryEncoder` by name, in their order, for an example of histories."""
    reader = recommender.reader
    width = min(width, reader.max_length)
    inputs = {
        "item_ids": torch.ones(rows, width, dtype=torch.int64),
        "lengths": torch.full((rows,), width),
    }
    if reader.needs_ratings:
        inputs["ratings"] = torch.ones(rows, width)
    if reader.needs_timestamps:
        inputs["timestamps"] = torch.arange(1, width + 1).repeat(rows, 1)
        inputs["next_timestamps"] = torch.full((rows,), width + 1)
    for each in reader.event_columns:
        numbers = each["kind"] == "numerical"
        inputs[each["name"]] = torch.ones(rows, width, dtype=torch.float32 if numbers else torch.int64)
    if reader.known_users is not None:
        inputs["user_ids"] = torch.ones(rows, dtype=torch.int64)
    return inputs


def export_program(recommender: Recommender) -> torch.export.ExportedProgram:
    """The query encoder with any batch and any length up to the window. UserError where it cannot be traced."""
    check_products(recommender)
    inputs = query_inputs(recommender)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    window = recommender.reader.max_length
    # torch refuses a range of one
    length = torch.export.Dim("length", min=1, max=window) if window > 1 else torch.export.Dim.STATIC
    shapes = [{0: batch, 1: length} if x.dim() == 2 else {0: batch} for x in inputs.values()]
    encoder = QueryEncoder(recommender.model, tuple(inputs)[2:]).eval()
    dynamic = (*shapes[:2], *([tuple(shapes[2:])] if shapes[2:] else []))
    try:
        with torch.no_grad(), dispatch.references():
            return torch.export.export(encoder, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever a plug-in's encoder does that a tracer cannot follow
        name = type(recommender.model.sequence.encoder).__name__
        # Of a size that cannot vary torch says why in a list below its first line.
        reasons = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
        reason = (reasons[0].split(". ")[0] if reasons else first_line(error)).rstrip(".")
        raise UserError(f"encoder {name} cannot be exported: {reason}; docs/extending.md says what can") from error


def plain_products(recommender: Recommender) -> bool:
    """Whether scores are products of states and items as they are exported, over the temperature.

    A plug-in's similarity may have products of what it makes of them, as cosines are.
    """
    similarity, items = recommender.model.similarity, recommender.snapshot.embeddings
    rows = torch.randn(4, items.shape[1], generator=torch.Generator().manual_seed(0)).to(items)
    operands = similarity.operands(rows, rows)
    if operands is None:
        return False
    states, weight = operands[0] * similarity.temperature, operands[1]
    # to the precision of bf16, which they may be rounded to
    return all(each.shape == rows.shape and torch.allclose(each, rows, rtol=0.01) for each in (states, weight))


def check_products(recommender: Recommender) -> None:
    """UserError where scores are no product of a state and an item, so that the two sides are not enough."""
    if not plain_products(recommender):
        name = type(recommender.model.similarity).__name__
        raise UserError(
            f"scores of {name} are no products of a state and an item: export its items as parquet or safetensors, and "
            "serve the run with python -m generative_recommenders.serve"
        )


def check_installed(form: str) -> None:
    """UserError where what writes a format is missing."""
    package = {"onnx": "onnxscript", "faiss": "faiss"}.get(form)
    if package is not None and find_spec(package) is None:
        raise not_installed(form, "export")


def write_onnx(program: torch.export.ExportedProgram, path: Path, names: list[str]) -> None:
    """names: of the inputs, in their order; the output is ``states``. Weights of more than torch puts into one file
    (1.5 GB) go into another beside it, whose name ends in ``.data``."""
    check_installed("onnx")
    # its optimizer takes the epsilon of a layer norm, 1e-8, for zero: padding would become NaN
    exported = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=["states"], optimize=False, verbose=False
    )
    assert exported is not None
    exported.save(path)


def build_index(embeddings: np.ndarray, kind: str) -> Any:
    """A faiss index of items ``[V, D]`` by inner product; its ids are internal ids minus 1."""
    check_installed("faiss")
    import faiss

    count, dim = embeddings.shape
    index: Any = faiss.IndexFlatIP(dim)
    if kind == "ivf":
        lists = max(1, min(int(4 * count**0.5), count // 39 or 1))  # faiss asks for 39 points a list
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, lists // 16)
        index.train(embeddings)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    index.add(embeddings)
    return index


@torch.no_grad()
def measured_recall(recommender: Recommender, index: Any, k: int = 10, queries: int = 1000) -> float:
    """Share of the k best items of an exact search that the index finds, over histories of one item each."""
    count = len(recommender.item_ids)
    some = torch.arange(0, count, max(1, count // queries))[:queries] + 1
    example = query_inputs(recommender, len(some), 1)
    states = recommender.model.encode_query(example | {"item_ids": some[:, None]}).states.float().cpu()
    _, exact = search_products(states, recommender.snapshot.embeddings.float().cpu(), min(k, count))
    found = torch.from_numpy(index.search(states.numpy(), exact.shape[1])[1]) + 1
    return float((exact[:, :, None] == found[:, None, :]).any(2).float().mean())
