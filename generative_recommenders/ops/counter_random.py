"""Counter-based random integers: what is drawn depends on (seed, step, counter) alone.

So neither prefetching, nor grouping, nor the number of processes, nor a resumed run changes a draw. The 64-bit mixer is
SplitMix64 (Steele et al., OOPSLA 2014), the 32-bit one a multiply-xorshift hash (C. Wellons' lowbias32).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


Key: TypeAlias = int | torch.Tensor
"""A signed 64-bit integer, or an int64 scalar that holds one on a device."""


def stream_key(first: Key, *parts: int) -> Any:
    """One 64-bit `Key` from integers (seed, purpose, step, ...), a Python int unless the first is a tensor."""
    key = _mix64(_wrapped(first + _GOLDEN))
    for part in parts:
        key = _mix64(_wrapped(key + _wrapped(part + _GOLDEN)))
    return key


def counter_bits(key: Key, counters: torch.Tensor, draws: int) -> torch.Tensor:
    """``[n, draws]`` int64 holding uniform 32-bit integers (0 .. 2^32 - 1) for ``counters [n]`` int64."""
    keys = _mix64(counters * _GOLDEN + key).to(torch.int32)
    steps = torch.arange(draws, device=counters.device, dtype=torch.int32) * (0x9E3779B9 - (1 << 32))
    bits = keys[:, None] + steps
    # torch has no unsigned shift: the copies of the sign that come in from the left are masked.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= factor
    bits ^= (bits >> 16) & 0xFFFF
    return bits.to(torch.int64).bitwise_and_(0xFFFFFFFF)


def counter_integers(key: Key, counters: torch.Tensor, draws: int, high: int) -> torch.Tensor:
    """``[n, draws]`` int64, uniform in [0, high) for high up to 2^31 (bias below high / 2^32)."""
    return counter_bits(key, counters, draws).mul_(high).bitwise_right_shift_(32)


def counter_uniform(key: Key, counters: torch.Tensor, draws: int) -> torch.Tensor:
    """``[n, draws]`` float32 in [0, 1), 24 random bits each."""
    return counter_bits(key, counters, draws).bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24)


class CounterDraws:
    """Uniform draws of numbered rows: what a row gets depends on the key, its number and the number of the call alone.

    numbers: ``[n]`` int64, places in the global batch.
    """

    def __init__(self, key: Key, numbers: torch.Tensor) -> None:
        self.key, self.numbers, self.calls = key, numbers, 0

    def uniform(self, count: int) -> torch.Tensor:
        """``[n, count]`` float32 in [0, 1)."""
        self.calls += 1
        return counter_uniform(stream_key(self.key, self.calls), self.numbers, count)


def _mix64(z: Key) -> Any:
    z = _wrapped((z ^ _shift64(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64)))
    z = _wrapped((z ^ _shift64(z, 27)) * (0x94D049BB133111EB - (1 << 64)))
    return _wrapped(z ^ _shift64(z, 31))


def _shift64(z: Key, bits: int) -> Any:
    """Logical right shift; torch's and Python's are arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(z: Key) -> Any:
    """As a signed 64-bit integer: a tensor's numbers are, Python's do not wrap around by themselves."""
    return z if isinstance(z, torch.Tensor) else (z + (1 << 63)) % (1 << 64) - (1 << 63)
