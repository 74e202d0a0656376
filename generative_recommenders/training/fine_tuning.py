"""Training that starts from another run: its weights, moved by the original ids of items, users and categories."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.parts import build_model
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import data_facts, load_model, tensors_of, user_ids
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.sync import on_main
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.objectives.task import TrainingTask

MAY_DIFFER = (
    "mask_embedding.", "sequence.event_features.", "sequence.context_merger.", "items.tower.", "similarity.",
)  # fmt: skip
"""Parts that one model may have and the other not: they start new, or are left out."""
DATA = ("items.row_of_item", "items.features.", "sequence.context_merger.features.")
"""Tensors that hold data: those of the data that are trained on stay."""
Rows = tuple[Any, Any]
"""Rows of one of our tensors, and the rows of theirs that go there: ``[n]`` int64 each, or `EVERYTHING`."""
EVERYTHING: Rows = (..., ...)


def initialize(
    settings: RunSettings,
    task: TrainingTask,
    catalogue: Catalogue,
    dataset: SequenceDataset,
    collectives: Collectives | None = None,
) -> None:
    """Gives a task that was just built the weights of ``train_fn.initialize_from``, where that names a run or a
    checkpoint.

    catalogue, dataset: what the task was built for. The main process reads, and sends the others what it has. UserError
    where there is no such run, or its model does not fit.
    """
    source, collectives = settings.fine_tuning.initialize_from, collectives or Collectives()
    if source is None:
        return

    def work() -> None:
        checkpoint = checkpoint_of(source)
        try:
            transfer(checkpoint, settings, task, catalogue, dataset)
        except UserError as error:
            raise UserError(f"train_fn.initialize_from: {error}") from error

    on_main(collectives, work)
    for tensor in (*task.model.state_dict().values(), *task.criterion.state_dict().values()):
        collectives.broadcast_(tensor)


def checkpoint_of(source: str) -> Checkpoint:
    """The best checkpoint (else the newest) of a run's folder, or the checkpoint that the folder is."""
    folder, found = Path(source), None
    try:
        if (folder / "checkpoints").is_dir():
            store = CheckpointStore(folder / "checkpoints", read_only=True)
            found = store.load_best_or_newest()
        elif (folder / "manifest.json").is_file():
            found = CheckpointStore(folder.parent, read_only=True).load(folder)
    except (OSError, ValueError):  # a name that no file can have
        found = None
    if found is None:
        shown = source if len(source) < 200 else f"{source[:200]}..."
        raise UserError(f"train_fn.initialize_from: there is no run with a whole checkpoint at {shown!r}")
    return found


@torch.no_grad()
def transfer(
    checkpoint: Checkpoint,
    settings: RunSettings,
    task: TrainingTask,
    catalogue: Catalogue,
    dataset: SequenceDataset,
) -> None:
    """Copies the checkpoint's weights into the task, and says in the log what is known, new and left out.

    Rows of items, users and categories go where their original ids are now. UserError: tensors that are missing, or of
    another shape, except where `MAY_DIFFER` lets them.
    """
    model, ids = task.model, checkpoint.item_ids().to_pylist()
    saved = RunSettings.from_json(checkpoint.settings())
    kinds = {saved.item_embedding, settings.item_embedding}
    if len(kinds) > 1 and "categorical" in kinds:
        raise UserError(
            f"{checkpoint.path} embeds items as {saved.item_embedding!r}, this run as {settings.item_embedding!r}"
        )
    with torch.random.fork_rng([]):
        source = build_model(saved, Catalogue.of_facts(data_facts(checkpoint), len(ids), checkpoint.tensors))
    load_model(source, checkpoint)
    known_items = pairs(dataset.original_item_ids().to_pylist(), ids)
    moves, summary = _moves(model, source, catalogue, dataset, checkpoint, known_items)
    own, theirs = model.state_dict(), source.state_dict()
    moves |= {name: (name, EVERYTHING) for name in own if name in theirs and name not in moves}
    new = [name for name in own if moves.get(name) is None and not name.startswith(DATA)]
    taken = {move[0] for move in moves.values() if move is not None}
    left_out = [name for name in theirs if name not in taken and not name.startswith(DATA)]
    for name in (*new, *left_out):
        if not name.startswith(MAY_DIFFER):
            where = ("this run", "the checkpoint") if name in new else ("the checkpoint", "this run")
            raise UserError(f"{checkpoint.path} does not fit: {where[0]} has {name}, {where[1]} has not")
    for name, move in moves.items():
        if move is None or name.startswith(DATA):
            continue
        source_name, (to, of) = move
        target, value = own[name], theirs[source_name]
        numbered = int(to is not ...)  # as many dimensions count rows, which may be more here than there
        if target.shape[numbered:] != value.shape[numbered:]:
            raise UserError(
                f"{checkpoint.path} does not fit: {source_name} is {list(value.shape)} there and "
                f"{list(target.shape)} here"
            )
        target[to] = value[of].to(target.device)
    criterion, saved_criterion = task.criterion.state_dict(), tensors_of(checkpoint, "criterion")
    if {name: x.shape for name, x in criterion.items()} == {n: x.shape for n, x in saved_criterion.items()}:
        task.criterion.load_state_dict(saved_criterion)
    else:
        new += [f"criterion.{name}" for name in criterion]
    known = len(known_items[0])
    items = f"{known} of {dataset.num_items} items known, {dataset.num_items - known} new, {len(ids) - known} gone"
    summary = [items, *summary]
    summary += [f"new: {', '.join(new)}"] * bool(new) + [f"left out: {', '.join(left_out)}"] * bool(left_out)
    logging.info("weights of %s: %s", checkpoint.path, "; ".join(summary))


def _moves(
    model: SequenceRecommender,
    source: SequenceRecommender,
    catalogue: Catalogue,
    dataset: SequenceDataset,
    checkpoint: Checkpoint,
    items: Rows,
) -> tuple[dict[str, tuple[str, Rows] | None], list[str]]:
    """Tables whose rows belong to items, users or categories: their names in the source, and which rows go where; None
    for one that starts new. Beside them what is to be said of users.
    """
    row_of_item = [getattr(each.items, "row_of_item", None) for each in (model, source)]
    item_rows = [rows if table is None else table.cpu().numpy()[rows] for rows, table in zip(items, row_of_item)]
    moves: dict[str, tuple[str, Rows] | None] = {"items.table": ("items.table", with_fill(first_of(*item_rows)))}
    summary = []
    tables = [getattr(each.similarity, "user_tables", ()) for each in (model, source)]
    if len(tables[0]):
        known, now = user_ids(checkpoint), dataset.original_user_ids().to_pylist()
        old = [] if known is None else known.to_pylist()
        users = pairs(now, old)
        summary.append(f"{len(users[0])} of {len(now)} users known")
        for place, (own, their) in enumerate(zip(*tables)):
            # a user's row is its number modulo the table's size; rows that no user has do not matter
            rows = first_of(users[0] % own.num_embeddings, users[1] % their.num_embeddings)
            as_it_is = now == old and own.num_embeddings == their.num_embeddings
            name = f"similarity.user_tables.{place}.weight"
            moves[name] = name, EVERYTHING if as_it_is else rows
    facts, saved = catalogue.facts(model, dataset), data_facts(checkpoint)
    columns, saved_columns = (
        {each["name"]: each["categories"] for each in of_data.get("event_columns", ())} for of_data in (facts, saved)
    )
    for column, names in columns.items():
        if names and saved_columns.get(column):
            weight = f"sequence.event_features.weights.of_{column}"
            moves[weight] = weight, with_fill(pairs(names, saved_columns[column]))
    hashes = "data_hash", "features_hash"
    unchanged = all(checkpoint.state.get(name) == getattr(dataset.manifest, name) for name in hashes)
    for owner in ("item", "user"):
        ours, theirs = (_feature_modules(each, owner) for each in (model, source))
        for feature, (prefix, module) in ours.items():
            old_prefix, old = theirs.get(feature, ("", None))
            categories = [
                of_data.get(f"{owner}_encodings", {}).get(feature, {}).get("categories") for of_data in (facts, saved)
            ]
            fits, rows = type(old) is type(module), EVERYTHING
            if fits and all(categories):  # the last row is that of categories never seen
                rows = with_fill(pairs(*categories), (len(categories[0]) + 1, len(categories[1]) + 1))
            elif any(categories) and not unchanged:  # older releases did not write those of users
                fits = False
            for name in module.state_dict():
                moves[f"{prefix}.{name}"] = (f"{old_prefix}.{name}", rows) if fits else None
    return moves, summary


def _feature_modules(model: SequenceRecommender, owner: str) -> dict[str, tuple[str, torch.nn.Module]]:
    """Embeddings of the features of items or users, and what their tensors' names begin with, by feature."""
    path = "items.tower" if owner == "item" else "sequence.context_merger"
    part: Any = model.items.tower if owner == "item" else model.sequence.context_merger
    if part is None:
        return {}
    names = {module: name for name, module in part.embedder.named_modules()}
    modules = {spec.name: part.embedder.embedder(spec.name) for spec in part.embedder.schema}
    return {feature: (f"{path}.embedder.{names[module]}", module) for feature, module in modules.items()}


def pairs(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> Rows:
    """Numbers, from 1, of what both lists hold."""
    places = {name: number for number, name in enumerate(theirs, start=1)}
    found = [(number, places[name]) for number, name in enumerate(ours, start=1) if name in places]
    both = np.array(found, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def first_of(to: np.ndarray, of: np.ndarray) -> Rows:
    """Each row of ours once, where several items or users share it: with the first one's."""
    rows, first = np.unique(to, return_index=True)
    return rows, of[first]


def with_fill(rows: Rows, *more: tuple[int, int]) -> Rows:
    """The rows, that of padding (0) and more."""
    to, of = (np.array([0, *(pair[side] for pair in more)], np.int64) for side in (0, 1))
    return np.concatenate([to, rows[0]]), np.concatenate([of, rows[1]])
