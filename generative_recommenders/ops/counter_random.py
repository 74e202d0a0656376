"""Counter-based random integers: what is drawn depends on (seed, step, counter) alone.

So neither prefetching, nor grouping, nor the number of processes, nor a resumed run changes a draw. The 64-bit mixer is
SplitMix64 (Steele et al., OOPSLA 2014), the 32-bit one a multiply-xorshift hash (C. Wellons' lowbias32).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


Key: TypeAlias = int | torch.Tensor
"""A signed 64-bit integer, or an int64 scalar that holds one on a device."""


def stream_key(first: Key, *parts: int) -> Any:
    """One 64-bit `Key` from integers (seed, purpose, step, ...), a Python int unless the first is a tensor."""
    if isinstance(first, torch.Tensor):
        key = _mix64(first + _signed(_GOLDEN))
        for part in parts:
            key = _mix64(key + _signed((_GOLDEN + part) & _MASK64))
        return key
    number = 0
    for part in (first, *parts):
        # `_mix64` in Python's integers, which do not wrap around by themselves
        number = (number + _GOLDEN + (part & _MASK64)) & _MASK64
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK64
        number ^= number >> 31
    return _signed(number)


def counter_bits(key: Key, counters: torch.Tensor, draws: int) -> torch.Tensor:
    """``[n, draws]`` int64 holding uniform 32-bit integers (0 .. 2^32 - 1) for ``counters [n]`` int64."""
    keys = _mix64(counters * _signed(_GOLDEN) + key).to(torch.int32)
    steps = torch.arange(draws, device=counters.device, dtype=torch.int32) * _signed32(0x9E3779B9)
    bits = keys[:, None] + steps
    # torch has no unsigned shift: the copies of the sign that come in from the left are masked.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= _signed32(factor)
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


def _mix64(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift64(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift64(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift64(z, 31)


def _shift64(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
