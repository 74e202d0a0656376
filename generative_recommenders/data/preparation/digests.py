"""Hash of prepared data that every engine computes alike, in any order of users.

The data hash is the sum, mod 2^128, of the digests of all users; a user's digest is the sum, mod 2^128, of
the digests of their events; an event's digest is two 64-bit words, each a chain of mixes over the user's and
the item's original ids (FNV-1a over their UTF-8 bytes), the float32 bits of the rating, the time in seconds
and the position in the user's sequence. ``mix`` is the finaliser of splitmix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from generative_recommenders.data.schema import KNOWN, KNOWN_KINDS

# The constants are part of the format: with another one no prepared folder would match its hash.
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_SEEDS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
_ABSENT = np.uint64(0xA5A5A5A5A5A5A5A5)
_LOW = np.uint64(0xFFFFFFFF)
_CHUNK = 1 << 19


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, elementwise on uint64 (wraps around)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def id_hashes(ids: pa.Array) -> np.ndarray:
    """``[n]`` uint64: FNV-1a of every string's UTF-8 bytes. ids: large_string without nulls."""
    _, offsets_buffer, bytes_buffer = ids.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(bytes_buffer, np.uint8) if bytes_buffer else np.empty(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.full(len(ids), _FNV_OFFSET)
    # Byte after byte, for all ids at once: sorted by length, those that still have a byte are a prefix.
    longest_first = np.argsort(-lengths, kind="stable")
    remaining = np.searchsorted(-lengths[longest_first], -np.arange(1, lengths.max(initial=0) + 1), side="right")
    for position, count in enumerate(remaining):
        rows = slice(None) if count == len(ids) else longest_first[:count]
        hashes[rows] = (hashes[rows] ^ data[starts[rows] + position]) * _FNV_PRIME
    return hashes


class EventDigests:
    """Sums of the digests of events and of their further columns, in any order.

    texts: large_string, row i is the user of number i, and the item or category of number i + 1, by the name of the
    column.
    kinds: of all columns but the user.
    """

    def __init__(self, texts: Mapping[str, pa.Array], kinds: Mapping[str, str]) -> None:
        # The number 0 of an item or category, a missing one, takes the last place.
        self.texts = {name: np.append(id_hashes(values), _ABSENT) for name, values in texts.items()}
        # Columns add up in any order, each under the hash of its name and kind.
        self.columns = {
            name: id_hashes(pa.array([f"{name}:{kind}"], pa.large_string()))[0]
            for name, kind in kinds.items()
            if name not in KNOWN
        }
        self.total = self.columns_total = 0

    def add(self, users: np.ndarray, positions: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Adds events ``[n]``. users: numbers from 0. positions: 0-based in the user's sequence. columns: as stored."""
        owners = self.texts["user"][users]
        words: dict[str, np.ndarray] = {}  # unsigned integers, equal where the values of a column are
        for name, values in columns.items():
            if name in self.texts:
                words[name] = self.texts[name][values - 1]
            elif values.dtype.kind == "f":
                one = np.where(np.isnan(values), np.float32("nan"), values + np.float32(0))  # one NaN, one zero
                words[name] = one.astype(np.float32).view(np.uint32)
            else:
                words[name] = np.asarray(values).view(np.uint64)
        known = [words.get(name, _ABSENT) for name in KNOWN_KINDS]
        self.total += _sum_of_digests([owners, *known, positions])
        for name, column in self.columns.items():
            self.columns_total += _sum_of_digests([owners, positions, column, words[name]])

    def hashes(self) -> tuple[str, str]:
        """32 hexadecimal digits of the events, and of their further columns ("" without any)."""
        columns = f"{self.columns_total % (1 << 128):032x}" if self.columns else ""
        return f"{self.total % (1 << 128):032x}", columns


def _sum_of_digests(words: Sequence[np.ndarray | np.uint64]) -> int:
    """Sum, mod 2^128, of the digests of E events, each of which has one of the words ``[E]``, or the same as all."""
    total = 0
    for start in range(0, max(np.size(word) for word in words), _CHUNK):  # which keeps the words in the cache
        part = [
            word[start : start + _CHUNK].astype(np.uint64, copy=False) if isinstance(word, np.ndarray) else word
            for word in words
        ]
        high, low = (chain(seed, part) for seed in _SEEDS)
        total += (_exact_sum(high) << 64) + _exact_sum(low)
    return total % (1 << 128)


def chain(seed: np.uint64, words: Sequence[np.ndarray | np.uint64]) -> np.ndarray:
    """``[n]`` uint64: a mix over all words, one after the other."""
    state = np.asarray(words[0]) ^ seed
    for word in words[1:]:
        state = mix(state) + word
    return mix(state)


def _exact_sum(words: np.ndarray) -> int:
    # numpy's sum of 64-bit words would wrap around; those of their halves do not, at less than 2^32 words.
    return (int((words >> np.uint64(32)).sum()) << 32) + int((words & _LOW).sum())


def split_hash(data_hash: str, protocol: str) -> str:
    """Identity of a split: 32 hexadecimal digits over the data's hash and the protocol's name."""
    return hashlib.sha256(f"{data_hash}:{protocol}".encode()).hexdigest()[:32]
