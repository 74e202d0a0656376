"""Small files of ratings for the tests of their readers."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import EventReader, RawRatings, ReadOptions
from generative_recommenders.data.readers.times import NANOSECONDS
from generative_recommenders.errors import UserError

COMMAS = ReadOptions("user,item,rating,timestamp", ",", header=False)
PAIRS = ReadOptions("user,item", " ", header=False)


def read(path: Path, options: ReadOptions = COMMAS) -> dict[str, list]:
    """The events of a file as lists by column, times in seconds."""
    events = pa.concat_tables(EventReader([path], options).batches()).to_pydict()
    if "timestamp" in events:
        events["timestamp"] = [time / NANOSECONDS["s"] for time in events["timestamp"]]
    return events


def write(tmp_path: Path, data: str | bytes, name: str = "r.csv") -> Path:
    path = tmp_path / name
    path.unlink(missing_ok=True)  # a file that is written over goes to the disk at once on ext4, which takes long
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def error_of(path: Path, options: ReadOptions = COMMAS) -> str:
    with pytest.raises(UserError) as caught:
        read(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_parquet(tmp_path: Path, columns: dict, name: str = "r.parquet") -> Path:
    pq.write_table(pa.table(columns), tmp_path / name, row_group_size=2)
    return tmp_path / name


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return path


Row = tuple[str, str, float, int]


def write_csv(path: Path, rows: list[Row], line_end: str = "\n", bom: bool = False, zipped: bool = False) -> Path:
    quoted = [[f'"{text}"' if set(text) & set(',"') else text for text in map(_double, row[:2])] for row in rows]
    lines = [f"{user},{item},{row[2]},{row[3]}" for (user, item), row in zip(quoted, rows)]
    data = ("\ufeff" * bom + line_end.join(lines) + line_end).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def prepare_rows(rows: list[Row], folder: Path, **known: Any) -> Manifest:
    """The rows in ``folder / "r.csv"``, prepared in ``folder / "out"``. known: of `RawRatings`."""
    path = write_csv(folder / "r.csv", rows)
    return prepare(RawRatings("t", [path], COMMAS, **known), folder / "out")


def _double(text: str) -> str:
    return str(text).replace('"', '""')
