"""Exported query encoders give the numbers of the model, at any batch and length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generative_recommenders import Recommender
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.retrieval.export import (
    build_index,
    check_products,
    export_program,
    measured_recall,
    query_inputs,
    write_onnx,
)
from recommender_runs import CHOICES, make_run
from tiny_data import ragged_sequences, tiny_dataset

EXPORTED = {name: choice for name, choice in CHOICES.items() if name != "MoL with users"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"), ragged_sequences(57, 30, seed=5), item_features=True)


def some_histories(rec: Recommender, rows: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    inputs = query_inputs(rec, rows, width)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    real = torch.arange(width) < lengths[:, None]
    inputs["item_ids"] = torch.randint(1, 31, (rows, width), generator=generator) * real
    inputs["lengths"] = lengths
    if "ratings" in inputs:
        inputs["ratings"] = torch.randint(1, 6, (rows, width), generator=generator) * real.float()
    if "timestamps" in inputs:
        inputs["timestamps"] = torch.randint(1, 9**6, (rows, width), generator=generator).sort(1).values * real
        inputs["next_timestamps"] = torch.full((rows,), 2 * 9**6)
    return inputs


QUICK = ("SASRec", "HSTU", "masked")
"""Tracing takes seconds a model: the others are slow tests."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPORTED]
)
def test_exported_numbers_are_those_of_the_model(tmp_path: Path, dataset: SequenceDataset, name: str) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, EXPORTED[name])[0])
    program = export_program(rec)
    torch.export.save(program, tmp_path / "encoder.pt2")
    encoder = torch.export.load(tmp_path / "encoder.pt2").module()
    session = None
    if name in (*QUICK, "ratings"):
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        write_onnx(program, tmp_path / "encoder.onnx", list(query_inputs(rec)))
        session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for rows, width in ((1, 1), (1, 7), (3, 5), (8, 2)):
        inputs = some_histories(rec, rows, width)
        with torch.no_grad():
            expected = rec.model.encode_query(inputs).states
            torch.testing.assert_close(encoder(*inputs.values()), expected, atol=1e-5, rtol=1e-4)
        if session is not None:
            wanted = {each.name for each in session.get_inputs()}
            (states,) = session.run(None, {key: x.numpy() for key, x in inputs.items() if key in wanted})
            torch.testing.assert_close(torch.from_numpy(states), expected, atol=1e-5, rtol=1e-4)


def test_a_window_of_one_event_is_exported(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "SASRec", "max_sequence_length": 1})[0])
    inputs = some_histories(rec, 3, 1)
    with torch.no_grad():
        expected = rec.model.encode_query(inputs).states
        torch.testing.assert_close(export_program(rec).module()(*inputs.values()), expected, atol=1e-5, rtol=1e-4)


def test_a_mixture_of_logits_is_refused_in_one_line(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, CHOICES["MoL with users"])[0])
    with pytest.raises(UserError, match="scores of MoLSimilarity are no products") as error:
        export_program(rec)
    assert "\n" not in str(error.value)


class Loop(torch.nn.Module):
    """An encoder as a plug-in may have it: one step a position."""

    causal, output_dim = True, 16

    def forward(self, x, layout, events):
        return layout.flatten(torch.stack([*layout.to_rectangle(x).unbind(1)], 1))


class Neighbours(Loop):
    """A difference of neighbours, which is shorter than the history."""

    def forward(self, x, layout, events):
        rows = layout.to_rectangle(x)
        return layout.flatten(torch.nn.functional.pad(rows[:, 1:] - rows[:, :-1], (0, 0, 1, 0)))


class Unfit(Loop):
    """An encoder that says why by itself."""

    def forward(self, x, layout, events):
        raise ValueError("its heads divide no width, e.g. 3 of 16.")


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (Loop, r"length .* a constant \(3\); docs"),
        (Neighbours, r"values of length .* guard .*; docs"),
        (Unfit, r"its heads divide no width, e\.g\. 3 of 16; docs"),
    ],
)
def test_an_encoder_that_cannot_be_exported_is_refused_with_why(
    tmp_path: Path, dataset: SequenceDataset, encoder: type[torch.nn.Module], words: str
) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "SASRec"})[0])
    rec.model.sequence.encoder = encoder()
    with pytest.raises(UserError, match=f"encoder {encoder.__name__} cannot be exported: .*{words}") as error:
        export_program(rec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_an_index_finds_what_its_recall_says(tmp_path: Path, dataset: SequenceDataset, kind: str) -> None:
    pytest.importorskip("faiss")
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "SASRec"})[0])
    index = build_index(rec.snapshot.embeddings.float().numpy(), kind)
    assert index.ntotal == 30
    recall = measured_recall(rec, index)
    assert recall == pytest.approx(1.0) if kind != "ivf" else 0.1 < recall <= 1.0


class Cosine(DotProductSimilarity):
    """As a plug-in may have it: what is multiplied is not what is exported."""

    def operands(self, states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().operands(torch.nn.functional.normalize(states, dim=1), weight)


def test_products_of_other_states_are_refused(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "SASRec", "temperature": 0.3})[0])
    check_products(rec)
    rec.model.similarity = DotProductSimilarity(0.3, torch.bfloat16)
    check_products(rec)
    rec.model.similarity = Cosine(0.3)
    with pytest.raises(UserError, match="scores of Cosine are no products"):
        check_products(rec)
