"""Raw events as integer columns, in memory or (beyond a limit) in files, and the dictionaries of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from absl import logging

BYTES_PER_EVENT = 100
"""Memory that one event takes at most while ids are collected: strings, codes and the dictionary's share."""
CHUNK_EVENTS = 1 << 22


@dataclass
class Events:
    """All raw events in input order.

    columns: ``[E]`` by name: user, item and categories are int32 codes into their ``texts`` (-1 where missing), numbers
    are float32 (NaN), times int64 ticks (0). Arrays may be memory-mapped. texts: large_string, in order of first sight.
    """

    columns: dict[str, np.ndarray]
    texts: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.columns["user"])

    @property
    def kinds(self) -> dict[str, str]:
        """Of all columns but the user, in their order: see `schema.KINDS`."""
        kinds = {
            name: "categorical" if name in self.texts else "numerical" if values.dtype.kind == "f" else "time"
            for name, values in self.columns.items()
        }
        del kinds["user"]
        return kinds

    def counts(self, name: str, keep: np.ndarray | None = None) -> np.ndarray:
        """Counts of each text of a column. keep: ``[E]`` bool, the events that count; None for all."""
        codes, found = self.columns[name], np.zeros(len(self.texts[name]) + 1, np.int64)
        for part in chunks(len(self)):
            counted = codes[part] if keep is None else codes[part][keep[part]]
            found += np.bincount(counted + 1, minlength=len(found))
        return found[1:]


def chunks(length: int, most: int = CHUNK_EVENTS) -> Iterator[slice]:
    """Slices that cover ``length`` events, a bounded number each."""
    for start in range(0, length, most):
        yield slice(start, min(start + most, length))


def user_blocks(offsets: np.ndarray, events: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of consecutive users who have about so many events together. offsets: ``[U + 1]``."""
    first, num_users = 0, len(offsets) - 1
    while first < num_users:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + events, side="right")) - 1)
        yield first, last
        first = last


def consecutive(firsts: np.ndarray | int, counts: np.ndarray) -> np.ndarray:
    """``[T]`` places ``first, first + 1, ...``, of each of ``firsts [n]`` so many as its entry of ``counts [n]``."""
    return np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)


def write_numbers(file: BinaryIO, values: np.ndarray) -> None:
    """Append the raw numbers; unlike ``ndarray.tofile`` it says why it cannot (the disk is full)."""
    file.write(np.ascontiguousarray(values).data)


def collect_events(batches: Iterable[pa.Table], run_events: int, spill: Path) -> Events:
    """All events of the batches (columns as ``EventReader.batches`` yields them), of which there must be one.

    Texts are kept until ``run_events`` of them are there and then dictionary-encoded as one run, in threads while the
    next run is read; at the end the dictionaries of the runs are merged. Where there are several runs their columns go
    to files in the folder ``spill``; only the dictionaries stay in memory then.
    """
    runs = _Runs(spill)
    pending: list[pa.Table] = []
    waiting = 0
    with ThreadPoolExecutor(2) as pool:
        encoding: dict[str, Future] = {}
        for batch in batches:
            pending.append(batch)
            waiting += batch.num_rows
            if waiting >= run_events:
                runs.add(encoding)
                table, pending, waiting = pa.concat_tables(pending), [], 0
                encoding = {name: pool.submit(_encode, table[name]) for name in table.column_names}
        runs.add(encoding)
        if waiting:
            table = pa.concat_tables(pending)
            runs.add({name: pool.submit(_encode, table[name]) for name in table.column_names})
        dictionaries = dict(zip(runs.dictionaries, pool.map(runs.merge, runs.dictionaries)))
    return Events({name: runs.join(name) for name in runs.columns}, dictionaries)


class _Runs:
    """Encoded runs of events: dictionaries of the text columns, and the numbers of all columns."""

    def __init__(self, spill: Path) -> None:
        self.spill = spill
        self.dictionaries: dict[str, list[pa.Array]] = {}
        self.columns: dict[str, list[np.ndarray]] = {}

    def add(self, encoding: dict[str, Future]) -> None:
        """Takes on a run; from the second one on the numbers lie in a file a column, mapped."""
        for name, job in encoding.items():
            dictionary, values = job.result()
            if dictionary is not None:
                self.dictionaries.setdefault(name, []).append(dictionary)
            runs = self.columns.setdefault(name, [])
            runs.append(values)
            # The first run moves when a second one comes: what fits into memory never touches the disk.
            for place, values in enumerate(runs if len(runs) > 1 else []):
                if isinstance(values, np.memmap):
                    continue
                if not self.spill.exists():
                    logging.info("the input exceeds the memory limit: events are kept in files")
                    self.spill.mkdir()
                with (self.spill / f"{name}.bin").open("ab") as out:
                    first = out.tell()
                    write_numbers(out, values)
                runs[place] = np.memmap(out.name, values.dtype, "r+", first, values.shape)  # `merge` writes codes

    def merge(self, name: str) -> pa.Array:
        """The texts of all runs, each once; the codes of the runs become codes into them."""
        # A run without any text has no code to change, and pyarrow leaves its empty chunk out.
        with_texts = [(own, codes) for own, codes in zip(self.dictionaries[name], self.columns[name]) if len(own)]
        if len(with_texts) < 2:
            return with_texts[0][0] if with_texts else self.dictionaries[name][0]
        merged = pa.chunked_array([own for own, _ in with_texts]).dictionary_encode()
        for (_, codes), run in zip(with_texts, merged.chunks):
            new_code = np.append(run.indices.to_numpy(), np.int32(-1))  # a missing value stays -1
            for part in chunks(len(codes)):
                codes[part] = new_code[codes[part]]
        return merged.chunk(0).dictionary

    def join(self, name: str) -> np.ndarray:
        runs = self.columns[name]
        return runs[0] if len(runs) == 1 else np.memmap(self.spill / f"{name}.bin", runs[0].dtype, "r+")


def _encode(column: pa.ChunkedArray) -> tuple[pa.Array | None, np.ndarray]:
    """The dictionary of a text column, and the numbers of the column; a missing value is -1, NaN or 0."""
    if not pa.types.is_large_string(column.type):
        missing = 0 if pa.types.is_integer(column.type) else float("nan")
        values = column.fill_null(missing).to_numpy() if column.null_count else column.to_numpy()
        return None, values
    encoded = column.dictionary_encode()
    codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks]
    return encoded.chunk(0).dictionary, np.concatenate(codes)
