"""Split of loader batches into histories and targets.

Rectangles ``[B, N]`` are right-padded with 0; a batch is never changed, a new mapping is returned.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, arange

from generative_recommenders.errors import UserError


def next_token_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Histories ``[B, N + 1]`` split into what training sees and what it predicts.

    For every column of the shape of ``item_ids``, by its name (``ids`` for that one): ``past_NAME [B, N]``, the events
    before the last one (0 after them), and ``target_NAME [B, N]``, the event after each of them (0 where there is
    none). ``lengths`` becomes ``past_lengths [B]`` = lengths - 1, at least 0; ``next_timestamps [B]`` is the time of
    the last target, 0 for an empty row. Every other column stays. ``UserError`` for a rectangle of one column.
    """
    shape = batch["item_ids"].shape
    if shape[1] < 2:
        raise UserError(f"next-token batch: 'item_ids' has {shape[1]} columns, needs at least 2")
    past_lengths = (batch["lengths"] - 1).clamp(min=0)
    past_end = arange(shape[1] - 1, device=past_lengths.device) >= past_lengths[:, None]
    out = {"past_lengths": past_lengths}
    for name, column in batch.items():
        if column.shape == shape:
            stem = "ids" if name == "item_ids" else name
            out[f"past_{stem}"] = column[:, :-1].masked_fill(past_end, 0)
            out[f"target_{stem}"] = column[:, 1:]
        elif name != "lengths":
            out[name] = column
    if "target_timestamps" in out:
        last = out["target_timestamps"].gather(1, (past_lengths - 1).clamp(min=0)[:, None])[:, 0]
        out["next_timestamps"] = last.masked_fill(past_lengths == 0, 0)
    return out
