"""Raw events as integer columns, in memory or (beyond a limit) in files, and the dictionaries of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from generative_recommenders.data import schema

BYTES_PER_EVENT = 100
"""Memory that one event takes at most while ids are collected: strings, codes and the dictionary's share."""
CHUNK_EVENTS = 1 << 22


@dataclass
class Events:
    """Columns of all raw events in input order.

    users, items: ``[E]`` int32 codes into ``user_ids`` and ``item_ids`` (large_string, in order of first
    sight). ratings: ``[E]`` float32 or None. timestamps: ``[E]`` int64 or None. extra: further columns, ``[E]``: int32 codes
    into ``vocabularies`` (-1 where missing), float32 (NaN) or int64 (0). Arrays may be memory-mapped.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None
    timestamps: np.ndarray | None
    user_ids: pa.Array
    item_ids: pa.Array
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    vocabularies: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)


def chunks(length: int) -> Iterator[slice]:
    """Slices that cover ``length`` events, a bounded number each."""
    for start in range(0, length, CHUNK_EVENTS):
        yield slice(start, min(start + CHUNK_EVENTS, length))


def write_numbers(file: BinaryIO, values: np.ndarray) -> None:
    """Append the raw numbers; unlike ``ndarray.tofile`` it says why it cannot (the disk is full)."""
    file.write(np.ascontiguousarray(values).data)


class EventCollector:
    """Turns batches of ratings into ``Events``.

    Strings are kept until ``run_events`` of them are there, then dictionary-encoded as one run. With
    ``spill`` (a folder) every run's columns go to files and only the dictionaries stay in memory; at the end
    the dictionaries of the runs are merged and the codes rewritten.
    """

    def __init__(self, run_events: int, spill: Path | None = None) -> None:
        self.run_events = run_events
        self.spill = spill
        self.pending: list[pa.Table] = []
        self.pending_events = 0
        self.columns: dict[str, list[np.ndarray]] = {}
        self.dictionaries: dict[str, list[pa.Array]] = {"user": [], "item": []}
        self.kinds: dict[str, str] = {}

    def extend(self, batches: Iterable[pa.Table]) -> EventCollector:
        """Add all batches (columns as ``EventReader.batches`` yields them)."""
        for batch in batches:
            self.pending.append(batch)
            self.pending_events += batch.num_rows
            if self.pending_events >= self.run_events:
                self._encode_run()
        return self

    def finish(self) -> Events:
        """All events; at least one must have been added."""
        self._encode_run()
        user_ids, user_codes = self._merge("user")
        item_ids, item_codes = self._merge("item")
        ratings, timestamps = (
            self._join(name) if name in self.columns else None for name in ("rating", "timestamp")
        )
        extra, vocabularies = {}, {}
        for name, kind in self.kinds.items():
            if kind == "categorical":
                vocabularies[name], extra[name] = self._merge(name)
            else:
                extra[name] = self._join(name)
        return Events(user_codes, item_codes, ratings, timestamps, user_ids, item_ids, extra, vocabularies)

    def _encode_run(self) -> None:
        if not self.pending:
            return
        table = pa.concat_tables(self.pending)
        self.pending, self.pending_events = [], 0
        self.kinds = schema.extra_kinds(table.schema)
        texts = ["user", "item", *(name for name, kind in self.kinds.items() if kind == "categorical")]
        with ThreadPoolExecutor(2) as pool:
            encoded = list(pool.map(lambda name: table[name].dictionary_encode(), texts))
        for name, column in zip(texts, encoded):
            self.dictionaries.setdefault(name, []).append(column.chunk(0).dictionary)
            codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in column.chunks]
            self._keep(name, np.concatenate(codes))
        for name in table.column_names:
            if name not in texts:
                missing = 0 if pa.types.is_integer(table[name].type) else float("nan")
                self._keep(name, table[name].fill_null(missing).to_numpy())

    def _keep(self, name: str, values: np.ndarray) -> None:
        runs = self.columns.setdefault(name, [])
        if self.spill is not None:
            path = self.spill / f"run{len(runs)}.{name}.bin"
            with path.open("wb") as out:
                write_numbers(out, values)
            values = np.memmap(path, values.dtype, mode="r+", shape=values.shape)
        runs.append(values)

    def _merge(self, role: str) -> tuple[pa.Array, np.ndarray]:
        """The ids of all runs, each once, and every event's code into them."""
        runs = self.dictionaries.pop(role)
        if len(runs) == 1:
            return runs[0], self._join(role)
        merged = pa.chunked_array(runs).dictionary_encode()
        for codes, run in zip(self.columns[role], merged.chunks):
            new_code = np.append(run.indices.to_numpy(), np.int32(-1))  # a missing value stays -1
            for part in chunks(len(codes)):
                codes[part] = new_code[codes[part]]
        return merged.chunk(0).dictionary, self._join(role)

    def _join(self, name: str) -> np.ndarray:
        runs = self.columns.pop(name)
        if len(runs) == 1:
            return runs[0]
        if self.spill is None:
            return np.concatenate(runs)
        path = self.spill / f"{name}.bin"
        with path.open("wb") as out:
            for run in runs:
                write_numbers(out, run)
        return np.memmap(path, runs[0].dtype, mode="r")
