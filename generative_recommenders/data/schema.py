"""Columns of events: the four that every data set knows by name, and further ones by their kind.

The one place that says how a kind is read, stored, hashed and given to models. A column of any name needs no other
code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from generative_recommenders.errors import UserError

KNOWN = ("user", "item", "rating", "timestamp")
KNOWN_KINDS = {"item": "categorical", "rating": "numerical", "timestamp": "time"}
KINDS = {"categorical": pa.large_string(), "numerical": pa.float32(), "time": pa.int64()}
"""Kinds of further columns, with the type in which readers give their values (null where missing)."""
STORED: dict[str, np.dtype[Any]] = {
    "categorical": np.dtype("<i4"),
    "numerical": np.dtype("<f4"),
    "time": np.dtype("<i8"),
}
"""The type in a prepared folder: ids 1..C of the vocabulary, numbers, seconds; 0, NaN and 0 where missing."""
_RESERVED = {
    *KNOWN, "ratings", "timestamps", "next_timestamps", "user_ids", "item_ids", "ids", "lengths", "events", "users",
    "items",
}  # fmt: skip


@dataclass(frozen=True)
class EventColumn:
    """A further column of a prepared data set.

    cardinality: C, values of its vocabulary (0 unless categorical). mean, std: of the values that are there, by which
    models see a number or time; over all prepared events, whatever the split.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z]\w*$")]
    kind: Annotated[StrictStr, Field(pattern=f"^({'|'.join(KINDS)})$")]
    cardinality: Annotated[StrictInt, Field(ge=0)] = 0
    mean: StrictFloat = 0.0
    std: Annotated[StrictFloat, Field(gt=0)] = 1.0

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Stored values as batches hold them: ids int64, numbers float32 with mean 0 and variance 1, seconds int64; the
        fill, which stands where a value is missing, padded or hidden, is 0."""
        if self.kind != "numerical":
            return values.astype(np.int64)
        return np.nan_to_num((values - np.float32(self.mean)) / np.float32(self.std), nan=0.0)


def check_names(kinds: Mapping[str, str]) -> None:
    """UserError for a column whose name batches use otherwise. kinds: by name."""
    for name, kind in kinds.items():
        odd = not re.fullmatch(r"[A-Za-z]\w*", name) or name.startswith(("past_", "target_"))
        if name not in KNOWN and (odd or name in _RESERVED):
            raise UserError(
                f"--columns: an event column cannot be called {name!r}; choose a word of letters, digits and _ that is "
                f"none of {', '.join(sorted(_RESERVED))} and begins with neither past_ nor target_, "
                f"as NAME={name}:{kind}"
            )


def is_missing(name: str, values: np.ndarray) -> np.ndarray:
    """``[n]`` bool: where a stored column has no value. A known one always has: a time of 0 is 1970."""
    if name in KNOWN:
        return np.zeros(len(values), bool)
    return np.isnan(values) if values.dtype.kind == "f" else values == 0


def large_strings(column: pa.ChunkedArray) -> pa.Array:
    """Texts in one array; with 64-bit offsets, as all of a data set may be longer than 2 GiB together."""
    return column.cast(pa.large_string()).combine_chunks()
