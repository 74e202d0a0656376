"""Time and memory of preparing Amazon Books, on a file of its shape; the last line is JSON.

    python benchmarks/prepare.py                    # 22.5 million lines, 8.0 M users, 2.3 M items
    python benchmarks/prepare.py --lines=1000000    # the same shape, smaller

The file is made first and not timed: users like A2SUAM1J3GNN3B, items like ISBNs, both drawn from Zipf-like
laws with every user and every item present, whole stars, times at midnight. Preparation runs in a process of
its own, whose wall-clock time and peak resident memory are reported, with the machine's load before it.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import records
from absl import app, flags

from generative_recommenders.data.preparation.digests import mix

REAL_LINES, REAL_USERS, REAL_ITEMS = 22_507_155, 8_026_324, 2_330_066
USER_EXPONENT, ITEM_EXPONENT = 0.75, 0.7
_DAY, _FIRST_DAY, _LAST_DAY = 86_400, 10_000, 16_270
_CHUNK_LINES = 1_000_000
_DIGITS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)

_LINES = flags.DEFINE_integer("lines", REAL_LINES, "lines; users and items shrink with it", lower_bound=100)
_FOLDER = flags.DEFINE_string("folder", None, "where file and result go and stay; by default a temporary folder")
_MEMORY_LIMIT = flags.DEFINE_integer("memory_limit", 4 << 30, "bytes for events, as in preprocess_public_data.py")
_RESULT = flags.DEFINE_string("result", None, "also write the JSON line to this file")


def zipf_ranks(rng: np.random.Generator, exponent: float, names: int, lines: int) -> np.ndarray:
    """``[lines]`` int32 ranks below ``names``: each once, the rest with probability ~ rank ** -exponent."""
    uniform = rng.random(lines - names)
    drawn = (uniform * names ** (1 - exponent)) ** (1 / (1 - exponent))
    ranks = np.concatenate([np.arange(names, dtype=np.int32), np.minimum(drawn, names - 1).astype(np.int32)])
    rng.shuffle(ranks)
    return ranks


def in_digits(values: np.ndarray, base: int, width: int, prefix: bytes = b"") -> pa.Array:
    """``values`` uint64 written in ``base`` with ``width`` digits after ``prefix``, as strings."""
    letters = np.empty((len(values), len(prefix) + width), np.uint8)
    letters[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    for position in range(width - 1, -1, -1):
        values, digit = np.divmod(values, np.uint64(base))
        letters[:, len(prefix) + position] = _DIGITS[digit]
    offsets = np.arange(len(letters) + 1, dtype=np.int32) * letters.shape[1]
    return pa.StringArray.from_buffers(len(letters), pa.py_buffer(offsets), pa.py_buffer(letters))


def user_names(ranks: np.ndarray) -> pa.Array:
    """Distinct names in an order unlike that of the ranks (the mixing function is a bijection)."""
    return in_digits(mix(ranks.astype(np.uint64) + np.uint64(1)), 36, 13, b"A")


def item_names(ranks: np.ndarray) -> pa.Array:
    """Distinct ten-digit names: multiples of a number without common divisor with 10^10."""
    return in_digits(ranks.astype(np.uint64) * np.uint64(6_180_339_887) % np.uint64(10**10), 10, 10)


def write_ratings(path: Path, lines: int, seed: int = 1) -> None:
    """Write ``lines`` ratings, without header."""
    rng = np.random.default_rng(seed)
    users = zipf_ranks(rng, USER_EXPONENT, max(1, lines * REAL_USERS // REAL_LINES), lines)
    items = zipf_ranks(rng, ITEM_EXPONENT, max(1, lines * REAL_ITEMS // REAL_LINES), lines)
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    schema = pa.schema([("u", pa.string()), ("i", pa.string()), ("r", pa.string()), ("t", pa.int64())])
    stars = pa.array(["1.0", "2.0", "3.0", "4.0", "5.0"])
    with pyarrow.csv.CSVWriter(path, schema, write_options=options) as writer:
        for start in range(0, lines, _CHUNK_LINES):
            part = slice(start, min(start + _CHUNK_LINES, lines))
            count = part.stop - part.start
            columns = [
                user_names(users[part]),
                item_names(items[part]),
                stars.take(pa.array(rng.choice(5, count, p=[0.05, 0.05, 0.1, 0.2, 0.6]))),
                pa.array(rng.integers(_FIRST_DAY, _LAST_DAY, count) * _DAY),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def peak_kibibytes() -> int:
    """Of this process's memory, as `run.summary.peak_memory` reads it, which brings torch."""
    own = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    # getrusage's is at least what the process that started this one took.
    return int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prepare_measured(ratings: Path, out: Path, memory_limit: int) -> dict[str, object]:
    """What preparation takes in this process, from its first import on."""
    start = time.monotonic()
    from generative_recommenders.data.preparation.prepare import prepare
    from generative_recommenders.data.readers.events import RawRatings, ReadOptions

    options = ReadOptions("user,item,rating,timestamp", ",", header=False)
    manifest = prepare(RawRatings("bench", [ratings], options, "amazon_five"), out, memory_limit)
    return {
        "seconds": round(time.monotonic() - start, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "peak_rss_mb": round(peak_kibibytes() / 1024),
        "data_hash": manifest.data_hash,
        "counts_before": manifest.counts_before,
        "counts": manifest.counts,
    }


def measure(folder: Path, lines: int, memory_limit: int) -> dict[str, object]:
    """Make the file, prepare it in a process of its own, and return what that process measured."""
    ratings = folder / "ratings.csv"
    if not ratings.exists():
        write_ratings(ratings, lines)
    started = time.monotonic()
    with ratings.open("rb") as source:
        while source.read(1 << 24):
            pass
    reading = round(time.monotonic() - started, 3)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        result = process.submit(prepare_measured, ratings, folder / "prepared", memory_limit).result()
    head = {
        "lines": lines,
        "file_mb": round(ratings.stat().st_size / 1e6),
        "reading_seconds": reading,
    }
    return {**head, "memory_limit_mb": memory_limit >> 20, **result}


def main(argv: list[str]) -> None:
    """Print one JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(_FOLDER.value or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, _LINES.value, _MEMORY_LIMIT.value)
    records.finish(result, _RESULT.value and Path(_RESULT.value))


if __name__ == "__main__":
    app.run(main)
