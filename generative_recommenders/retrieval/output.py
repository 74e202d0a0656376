"""Answers as tables of the library that is asked for."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import polars as pl
import pyarrow as pa
import torch

from generative_recommenders.errors import not_installed

Output = Literal["pandas", "polars", "spark", "torch"]
OUTPUTS: tuple[str, ...] = get_args(Output)


def answer_frame(
    item_ids: pa.Array,
    users: list[Any],
    items: torch.Tensor,
    scores: torch.Tensor,
    numeric: bool,
    output: str = "pandas",
) -> Any:
    """One row a recommendation: ``user_id, item_id, rank, score``; places without an item are left out.

    item_ids: ``[V]`` original ids as text. users: ``[B]``. items, scores: ``[B, k]``, internal ids, 0 for none. numeric: item
    ids are given back as numbers, where all of them are.
    """
    row, column = (items > 0).nonzero(as_tuple=True)
    taken = item_ids.take(pa.array((items[row, column] - 1).numpy()))
    with contextlib.suppress(pa.ArrowInvalid):  # there may be items whose ids are no numbers
        taken = taken.cast(pa.int64()) if numeric else taken
    frame = pl.DataFrame(
        {
            "user_id": pl.Series(users, strict=False).gather(row.numpy()) if users else [],
            "item_id": pl.Series(pl.from_arrow(taken)),
            "rank": (column + 1).numpy(),
            "score": scores[row, column].numpy(),
        }
    )
    if output == "polars":
        return frame
    if output == "pandas":
        return frame.to_pandas()
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise not_installed("pyspark", "spark") from error
    return SparkSession.builder.getOrCreate().createDataFrame(frame.to_pandas())
