"""Export of a run for other programs: the query encoder, the items, an index of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from absl import logging

from generative_recommenders.commands.setup import Options
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.export import (
    build_index,
    check_products,
    export_program,
    measured_recall,
    plain_products,
    query_inputs,
    write_onnx,
)
from generative_recommenders.retrieval.recommender import Recommender


def export(options: Options, form: str, output: Path | None, index: str) -> int:
    """Writes a format's file, item_ids.txt (line i + 1 is internal id i + 1) and export.json, which says how to use
    them.

    form: "torch", "onnx", "faiss", "safetensors" or "parquet". output: a folder, RUN/export unless given. index: kind
    of the faiss index.
    """
    if options.run_dir is None:
        raise UserError("--mode=export needs --run_dir, the folder of a trained run")
    recommender = Recommender.load(options.run_dir, "cpu", plugins=options.plugins)
    folder = output or Path(options.run_dir) / "export"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={folder}: {error.strerror}") from error
    temperature = recommender.model.similarity.temperature
    about: dict[str, Any] = {
        "run": Path(options.run_dir).name,
        "items": len(recommender.item_ids),
        "width": recommender.snapshot.embeddings.shape[1],
        "max_length": recommender.reader.max_length,
        "score": f"states @ item_embeddings.T / {temperature}" if plain_products(recommender) else "no product",
    }
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none yet, or it is not ours
        before = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        about["formats"] = before.get("formats", {}) if before.get("run") == about["run"] else {}
    about.setdefault("formats", {})[form] = write(recommender, folder, form, index)
    with new_file(folder / "item_ids.txt") as scratch:
        scratch.write_text("".join(f"{item}\n" for item in recommender.item_ids.to_pylist()), encoding="utf-8")
    with new_file(folder / "export.json") as scratch:
        scratch.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    logging.info("%s written to %s", form, folder)
    return 0


def write(recommender: Recommender, folder: Path, form: str, kind: str) -> dict[str, Any]:
    """Writes the file of a format; returns what export.json says of it."""
    embeddings = recommender.snapshot.embeddings
    if form == "faiss":
        check_products(recommender)
        index = build_index(embeddings.float().numpy(), kind)
        import faiss  # which the index is made by

        with new_file(folder / f"items.{kind}.faiss") as scratch:
            faiss.write_index(index, str(scratch))
        recall = measured_recall(recommender, index)
        logging.info("the %s index finds %.4f of the 10 best items", kind, recall)
        return {"index": kind, "recall@10": round(recall, 4)}
    if form == "safetensors":
        with new_file(folder / "item_embeddings.safetensors") as scratch:
            safetensors.torch.save_file({"item_embeddings": embeddings.contiguous()}, scratch)
        return {}
    if form == "parquet":
        values = pa.array(embeddings.float().numpy().ravel())
        rows = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
        with new_file(folder / "item_embeddings.parquet") as scratch:
            pq.write_table(pa.table({"item_id": recommender.item_ids, "embedding": rows}), scratch)
        return {}
    program, inputs = export_program(recommender), query_inputs(recommender)
    if form == "onnx":
        with new_file(folder / "query_encoder.onnx") as scratch:
            write_onnx(program, scratch, list(inputs))
    else:
        with new_file(folder / "query_encoder.pt2") as scratch, open(scratch, "wb") as file:
            # A name would have to end in .pt2, and the scratch file's does not.
            torch.export.save(program, file)
    shapes = {
        name: {"type": str(x.dtype).removeprefix("torch."), "shape": ["batch", "length"][: x.dim()]}
        for name, x in inputs.items()
    }
    return {"inputs": shapes, "output": "states"}
