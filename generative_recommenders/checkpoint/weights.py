"""Weights of a checkpoint, and what it keeps of the data so that its model answers without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from absl import logging

from generative_recommenders.checkpoint.store import Checkpoint
from generative_recommenders.errors import UserError, first_line
from generative_recommenders.ops.embedding import all_finite

_COUNTS, _USER_BYTES, _USER_OFFSETS = "data.item_counts", "data.user_ids.bytes", "data.user_ids.offsets"


def load_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The checkpoint's weights; UserError where they do not fit the model or are not finite."""
    _load(model, checkpoint, "model")


def load_criterion(criterion: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The checkpoint's weights of a loss that has some; one warning where it was written by a release that kept
    none."""
    if criterion.state_dict() and not tensors_of(checkpoint, "criterion"):
        logging.warning(
            "%s holds no weights of the loss (a discriminator's), as older releases wrote: they start anew",
            checkpoint.path,
        )
        return
    _load(criterion, checkpoint, "criterion")


def tensors_of(checkpoint: Checkpoint, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part of a run ("model", "criterion" or "optimizer") under its own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): x for name, x in checkpoint.tensors.items() if name.startswith(prefix)}


def _load(module: torch.nn.Module, checkpoint: Checkpoint, part: str) -> None:
    own = module.state_dict()
    state = tensors_of(checkpoint, part)
    for name, value in state.items():
        # torch converts other dtypes without a word, and a NaN would show in the numbers alone.
        if name in own and value.dtype != own[name].dtype:
            raise UserError(
                f"{checkpoint.path} does not fit the configuration: {part}.{name} is {value.dtype}, "
                f"not {own[name].dtype}"
            )
        if not all_finite(value):
            raise UserError(f"{checkpoint.path}: {part}.{name} holds numbers that are not finite")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint.path} does not fit the configuration: {first}") from error


def data_tensors(item_counts: torch.Tensor | None, user_ids: pa.ChunkedArray | None) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint. item_counts: ``[V]`` training events. user_ids: original ids, of models that read
    users."""
    tensors = {} if item_counts is None else {_COUNTS: item_counts}
    if user_ids is not None:
        text = user_ids.cast(pa.large_string()).combine_chunks()
        _, bounds, data = text.buffers()
        # Of a slice, the buffers hold the whole.
        offsets = np.frombuffer(bounds or bytes(8), np.int64)[text.offset : text.offset + len(text) + 1]
        joined = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
        joined = joined.copy() if joined.size else np.zeros(1, np.uint8)
        tensors |= {_USER_BYTES: torch.from_numpy(joined), _USER_OFFSETS: torch.from_numpy(offsets - offsets[0])}
    return tensors


def item_counts(checkpoint: Checkpoint) -> torch.Tensor | None:
    """``[V]`` training events of each item; None in checkpoints of releases before 0.2.0."""
    return checkpoint.tensors.get(_COUNTS)


def user_ids(checkpoint: Checkpoint) -> pa.Array | None:
    """Original ids of the users that the model was trained on, where it reads users; row i is internal id i + 1.

    UserError where the checkpoint holds no text.
    """
    if _USER_OFFSETS not in checkpoint.tensors:
        return None
    bounds, data = (checkpoint.tensors[name].numpy() for name in (_USER_OFFSETS, _USER_BYTES))
    buffers = [pa.py_buffer(each.tobytes()) for each in (bounds, data)]
    try:
        ids = pa.LargeStringArray.from_buffers(max(bounds.size - 1, 0), *buffers)
        ids.validate(full=True)  # the checkpoint may have been written by anybody
    except pa.ArrowInvalid as error:
        raise UserError(f"{checkpoint.path}: its ids of users are no text: {first_line(error)}") from error
    return ids


def data_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The data-set facts that the trainer recorded (`Catalogue.facts`); empty in checkpoints of releases before
    0.2.0."""
    facts = checkpoint.state.get("data", {})
    if not isinstance(facts, dict):
        raise UserError(f"{checkpoint.path}: its record of the data is no object")
    return facts
