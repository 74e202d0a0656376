"""Parquet columns of numbers and of lists of numbers, and such columns as rectangles, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.errors import UserError


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """The columns of a file, or of all .parquet files of a folder, memory-mapped; UserError where there is none
    such."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"there is no Parquet file at {path}")
    try:
        require_columns(pq.read_schema(files[0]).names, columns, path)
        return pa.concat_tables([pq.read_table(file, columns=list(columns), memory_map=True) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def require_columns(names: Sequence[str], columns: Sequence[str], where: object) -> None:
    """UserError for the first of the columns that is not among the names."""
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{where} has no column {missing[0]!r}; it has {', '.join(names)}")


def padded(column: pa.Array, shape: tuple[int, ...], padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[n, *shape]`` and a mask like them, True = real; lists keep their last entries, to the right.

    int64, float32 or bool. ValueError where there are more or fewer levels of lists than the shape has, or empty
    values.
    """
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if lists != bool(shape):
        raise ValueError(
            f"it holds {column.type}, and its metadata " + (f"say shape {list(shape)}" if shape else "name no shape")
        )
    if column.null_count:
        raise ValueError(f"{column.null_count} values are empty")
    if not lists:
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"it holds {column.type}, no numbers: encode it first")
        kind = {"b": np.bool_, "f": np.float32}.get(values.dtype.kind, np.int64)
        return values.astype(kind), np.ones(len(values), bool)
    bounds = column.offsets.to_numpy()
    inner, real = padded(column.values[bounds[0] : bounds[-1]], shape[1:], padding)
    bounds = bounds - bounds[0]
    # Counted back from each list's end, so that its last entries stand on the right; places before its begin are
    # padding.
    places = bounds[1:, None] - shape[0] + np.arange(shape[0])
    places = np.where(places >= bounds[:-1, None], places, len(inner))  # padding, which is appended below
    shape_of_row = (1, *inner.shape[1:])
    inner = np.concatenate([inner, np.full(shape_of_row, padding, inner.dtype)])
    real = np.concatenate([real, np.zeros(shape_of_row, bool)])
    return inner[places], real[places]
