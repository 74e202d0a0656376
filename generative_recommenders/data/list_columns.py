"""Columns of numbers and of lists of numbers as rectangles, padded on the left."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def padded(column: pa.Array, shape: tuple[int, ...], padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[n, *shape]`` and a mask like them, True = real; lists keep their last entries, to the right.

    int64, float32 or bool. ValueError where there are more or fewer levels of lists than the shape has, or empty values.
    """
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if lists != bool(shape):
        raise ValueError(
            f"it holds {column.type}, and its metadata "
            + (f"say shape {list(shape)}" if shape else "name no shape")
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
    places = bounds[1:, None] - shape[0] + np.arange(shape[0])
    mask = places >= bounds[:-1, None]
    blank = np.full((1, *inner.shape[1:]), padding, inner.dtype)
    places = np.where(mask, places, len(inner))  # the last row of what follows is padding
    return np.concatenate([inner, blank])[places], np.concatenate(
        [real, np.zeros_like(real, shape=blank.shape)]
    )[places]
