"""Export of a run for other programs: the query encoder, the items, an index of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from absl import logging

from generative_recommenders.checkpoint.files import write_tensors
from generative_recommenders.commands.setup import Options
from generative_recommenders.data.preparation.folder import check_file, new_file, write_text
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.export import (
    build_index,
    check_installed,
    check_products,
    export_program,
    measured_recall,
    plain_products,
    query_inputs,
    write_onnx,
)
from generative_recommenders.retrieval.recommender import Recommender

FILES = {
    "torch": "query_encoder.pt2",
    "onnx": "query_encoder.onnx",
    "faiss": "items.{index}.faiss",
    "safetensors": "item_embeddings.safetensors",
    "parquet": "item_embeddings.parquet",
}


def export(options: Options, form: str, output: Path | None, index: str) -> int:
    """Writes a format's file, item_ids.txt (line i + 1 is internal id i + 1), likewise user_ids.txt where the model
    reads users, and export.json, which says how to use them.

    form: "torch", "onnx", "faiss", "safetensors" or "parquet". output: a folder, RUN/export unless given. index: kind
    of the faiss index. UserError: a file that cannot be written, an extra that is missing, an id that is no line.
    """
    if options.run_dir is None:
        raise UserError("--mode=export needs --run_dir, the folder of a trained run")
    check_installed(form)
    folder = output or Path(options.run_dir) / "export"
    target = folder / FILES[form].format(index=index)
    for path in (folder / "item_ids.txt", folder / "user_ids.txt", folder / "export.json", target):
        check_file(path, "" if output is None else "--output=")
    recommender = Recommender.load(options.run_dir, "cpu", plugins=options.plugins)
    lists = {"item_ids.txt": _lines(recommender.item_ids, "item")}
    if recommender.known_users is not None:
        lists["user_ids.txt"] = _lines(recommender.known_users, "user")
    temperature = recommender.model.similarity.temperature
    about: dict[str, Any] = {
        "run": Path(options.run_dir).name,
        "model": digest(recommender),
        "items": len(recommender.item_ids),
        "width": recommender.snapshot.embeddings.shape[1],
        "max_length": recommender.reader.max_length,
        "score": f"states @ item_embeddings.T / {temperature}" if plain_products(recommender) else "no product",
    }
    # categories by number, means and deviations; where items were added since, how many a history may have
    about |= {name: of for name in ("event_columns", "trained_items") if (of := recommender.facts.get(name))}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none yet, or it is not ours
        before = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        about["formats"] = before.get("formats", {}) if before.get("model") == about["model"] else {}
    about.setdefault("formats", {})[form] = write(recommender, target, form, index)
    for name, text in lists.items():
        write_text(folder / name, text)
    write_text(folder / "export.json", json.dumps(about, indent=1) + "\n")
    logging.info("%s written to %s", form, folder)
    return 0


def digest(recommender: Recommender) -> str:
    """Names a model by its weights and items, so that export.json lists no file of another one."""
    found = hashlib.sha256("\n".join(recommender.item_ids.to_pylist()).encode())
    for name, weight in recommender.model.state_dict().items():
        found.update(name.encode())
        found.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _lines(ids: pa.Array, what: str) -> str:
    """Ids, one a line; UserError for one that holds the end of a line."""
    names = ids.to_pylist()
    wrong = next((name for name in names if "\n" in name or "\r" in name), None)
    if wrong is not None:
        raise UserError(
            f"{what} id {wrong!r} holds the end of a line, and {what}_ids.txt has one id a line: "
            "rename it in the data, prepare them again and train anew"
        )
    return "".join(f"{name}\n" for name in names)


def write(recommender: Recommender, path: Path, form: str, kind: str) -> dict[str, Any]:
    """Writes the file of a format; returns what export.json says of it."""
    embeddings = recommender.snapshot.embeddings
    if form == "faiss":
        check_products(recommender)
        index = build_index(embeddings.float().numpy(), kind)
        import faiss  # which the index is made by

        with new_file(path) as scratch:
            # faiss's own writer raises nothing where the last bytes find no place on the disk
            scratch.write_bytes(faiss.serialize_index(index).data)
        recall = measured_recall(recommender, index)
        logging.info("the %s index finds %.4f of the 10 best items", kind, recall)
        return {"index": kind, "recall@10": round(recall, 4)}
    if form == "safetensors":
        with new_file(path) as scratch:
            write_tensors(scratch, {"item_embeddings": embeddings})
        return {}
    if form == "parquet":
        values = pa.array(embeddings.float().numpy().ravel())
        rows = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
        with new_file(path) as scratch:
            pq.write_table(pa.table({"item_id": recommender.item_ids, "embedding": rows}), scratch)
        return {}
    program, inputs = export_program(recommender), query_inputs(recommender)
    weights = {}
    if form == "onnx":
        # The file of the weights, where there is one, is found by its name: both are written under their own names, in
        # a folder whose name the next `new_file` knows as a leftover, should this process be killed.
        with (
            new_file(path) as scratch,
            TemporaryDirectory(f"-{os.getpid()}", f"{scratch.name}-", path.parent) as folder,
        ):
            whole = Path(folder, path.name)
            write_onnx(program, whole, list(inputs))
            data = whole.with_name(f"{path.name}.data")
            if data.exists():
                data.replace(path.with_name(data.name))
                weights = {"weights": data.name}
            else:
                path.with_name(data.name).unlink(missing_ok=True)  # of an earlier model
            whole.replace(scratch)
    else:
        # In memory first: where a write fails, as on a full disk, torch's writer aborts the process.
        content = io.BytesIO()
        torch.export.save(program, content)
        with new_file(path) as scratch:
            scratch.write_bytes(content.getbuffer())
    shapes = {
        name: {"type": str(x.dtype).removeprefix("torch."), "shape": ["batch", "length"][: x.dim()]}
        for name, x in inputs.items()
    }
    return {"inputs": shapes, "output": "states", **weights}
