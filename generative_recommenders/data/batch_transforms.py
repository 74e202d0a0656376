"""What is seen and what is predicted: the loader's columns as histories and targets.

Rectangles ``[B, N]`` are right-padded with 0; a batch is never changed, a new mapping is returned.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, arange

from generative_recommenders.errors import UserError


def event_stems(batch: Mapping[str, Tensor]) -> dict[str, str]:
    """The loader's ``[B, N]`` columns, each with the stem of its later names (``past_ids``, ``target_ids``)."""
    shape = batch["item_ids"].shape if "item_ids" in batch else None
    return {name: "ids" if name == "item_ids" else name for name, x in batch.items() if x.shape == shape}


def next_token_batch(
    batch: Mapping[str, Tensor], columns: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Histories ``[B, N + 1]`` split into what training sees and what it predicts.

    For every column of stem ``s`` that the batch has (those of the shape of ``item_ids`` unless given): ``past_s [B, N]``, the
    events before the last one (0 behind them), and ``target_s [B, N]``, the event after each of them (0 where there is none).
    ``lengths`` becomes ``past_lengths [B]`` = lengths - 1, at least 0; ``next_timestamps [B]`` is the time of the last target,
    0 for an empty row. Every other column
    stays. ``UserError`` for a rectangle of one column.
    """
    columns = event_stems(batch) if columns is None else columns
    past_lengths = (batch["lengths"] - 1).clamp(min=0)
    split = [name for name in columns if name in batch]
    out = {name: value for name, value in batch.items() if name not in columns and name != "lengths"}
    out["past_lengths"] = past_lengths
    for name in split:
        column, stem = batch[name], columns[name]
        width = column.shape[1] - 1
        if width < 1:
            raise UserError(f"next-token batch: '{name}' has {column.shape[1]} columns, needs at least 2")
        behind = arange(width, device=column.device) >= past_lengths[:, None]
        behind = behind.reshape(behind.shape + (1,) * (column.dim() - 2))
        out[f"past_{stem}"] = column[:, :width].masked_fill(behind, 0)
        out[f"target_{stem}"] = column[:, 1:]
    if "target_timestamps" in out:
        last = out["target_timestamps"].gather(1, (past_lengths - 1).clamp(min=0)[:, None])[:, 0]
        out["next_timestamps"] = last.masked_fill(past_lengths == 0, 0)
    return out
