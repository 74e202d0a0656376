"""The text format in which users of HSTU's public code exchange sequences.

A CSV with the header ``index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps``, one user a line, oldest
event first; the last three are quoted, comma-joined lists of equal length. `export.export_text` writes users and items
by their internal numbers, and zeros for ratings or times that a data set lacks; a column that is zero throughout is
read as absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from generative_recommenders.data.readers import text
from generative_recommenders.data.readers.files import EmptyFileError
from generative_recommenders.data.readers.tables import SAMPLE_ROWS, TableSource
from generative_recommenders.data.readers.values import Rows, first_true
from generative_recommenders.errors import UserError

HEADER = ("index", "user_id", "sequence_item_ids", "sequence_ratings", "sequence_timestamps")
_EVENT = ("user", "item", "rating", "timestamp")
_DIALECT = text.Dialect(",", quoting=True)


class ExchangeSource(TableSource):
    """An exchange file, gzip and zstd included, as a table of a row an event."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # The format has no mark for what a data set lacks but zeros throughout, so that the file is read up to the
        # first number of each column.
        zero = {"rating", "timestamp"}
        sample = None
        for _, events in self._events():
            sample = events.head(SAMPLE_ROWS) if sample is None else sample
            nonzero = events.select(pl.col(*zero).cast(pl.Float64, strict=False).fill_null(1) != 0)
            zero -= {name for name in zero if nonzero[name].any()}
            if not zero:
                break
        if sample is None:
            raise EmptyFileError(path)
        self.header = [name for name in _EVENT if name not in zero]
        self.sample = sample.select(pl.col(name).alias(str(place)) for place, name in enumerate(self.header))

    def batches(self, columns):
        for rows, events in self._events():
            yield rows, events.select(pl.col(column.header).alias(column.name) for column in columns)

    def _events(self) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """User, item, rating and time of the events as text; UserError for lists of unequal length and items that are
        no numbers."""
        for block in text.read_blocks(self.path, max_line_bytes=text.MAX_FIELD_BYTES):
            header = block.data.partition(b"\n")[0]
            if block.first_line == 1 and header.replace(b'"', b"").strip() != ",".join(HEADER).encode():
                raise UserError(f"{self.path}, line 1: not the exchange format, whose header is {','.join(HEADER)}")
            body = block.after_line(1)
            if not body.data.strip():
                continue
            table = text.parse(self.path, body, _DIALECT, len(HEADER), [1, 2, 3, 4])
            users, *lists = pl.DataFrame(pl.from_arrow(table)).get_columns()
            by_line = text.rows_of(self.path, body, _DIALECT)
            by_line.refuse(users.str.contains("\n", literal=True), users, "user", "holds a line end")
            lists = [each.str.split(",") for each in lists]
            items, ratings, times = (each.list.len() for each in lists)
            uneven = (items != ratings) | (items != times)
            if (at := first_true(uneven)) is not None:
                counts = f"{items[at]}, {ratings[at]} and {times[at]}"
                raise UserError(f"{self.path}, {by_line.place_of(at)}: the lists have {counts} entries")
            owners = np.repeat(np.arange(len(users)), items.to_numpy())
            events = pl.DataFrame([users.gather(owners), *(each.explode() for each in lists)], schema=list(_EVENT))

            def line_of_event(event: int, owners: np.ndarray = owners, by_line: Rows = by_line) -> str:
                return by_line.place_of(owners[event])

            by_event = Rows(str(self.path), line_of_event)
            number = events["item"].str.contains(r"^\s*[0-9]+\s*$")
            by_event.refuse(~number, events["item"], "item", "is not a whole number")
            plain = pl.col("item").str.strip_chars().str.replace(r"^0+([0-9])", "$1")
            yield by_event, events.with_columns(plain)
