"""Inverted dropout whose masks cost little on a CPU.

torch draws one Bernoulli variable per element from a slow serial generator; here 64 bits of SFC64 (numpy's) serve eight
elements. Eight bits hold a rate to a multiple of 1 / 256, so each source of masks takes one of the two multiples around
the rate, drawn so that an element is dropped with the rate itself. Each source is seeded by torch's default generator,
so `torch.manual_seed` decides them all. Within `numbered_rows.opened` masks are drawn by the rows' numbers instead.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch, numbered_rows
from generative_recommenders.ops.counter_random import counter_bits, stream_key

_LEVELS = 1 << 8
_BLOCK = 1 << 24  # elements, 16 MiB of bits


class KeepMasks:
    """A source of masks: 0 with probability ``rate``, else 1, in the dtype and on the device of ``like``."""

    def __init__(self, rate: float, like: torch.Tensor, elements: int = 0) -> None:
        """elements: how many will be drawn in all. Their bits are made at once, so that torch's other threads wait
        once."""
        self.rate, self.dtype, self.device = rate, like.dtype, like.device
        self.elements, self.numbered = elements, numbered_rows.current()
        self.on_device = dispatch.waits(like)
        if self.numbered is not None:
            self.key, self.calls = self.numbered.next_key(), 0
            # Of the 16 bits, as a signed number, that a counter gives each element.
            self.lowest_kept = round(rate * (1 << 16)) - (1 << 15)
        elif not self.on_device:
            self.generator = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))
            # One of the two multiples of 1 / 256 around the rate, by chance such that the rate is met on average.
            level = math.floor(rate * _LEVELS + self.generator.random_raw() * 2.0**-64)
            self.lowest_kept = level - _LEVELS // 2
            self.unused = torch.empty(0, dtype=torch.int8)

    def draw(self, shape: torch.Size | tuple[int, ...], numbers: torch.Tensor | None = None) -> torch.Tensor:
        """A new tensor of the given shape. numbers: see `bits`."""
        if self.numbered is None and self.on_device:
            return (torch.rand(shape, device=self.device) >= self.rate).to(self.dtype)
        return self.kept(self.bits(math.prod(shape), numbers)).view(shape)

    def bits(self, count: int, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """``[count]`` int8 (int16 of numbered rows), on a CPU or of numbered rows: what `kept` makes a mask of.

        numbers: ``[n]`` int64 of the rows that the elements belong to, count / n each, of which a part may be drawn
        here and others in other calls; all current rows unless given.
        """
        if self.numbered is not None:
            self.calls += numbers is None
            rows = self.numbered.numbers if numbers is None else numbers
            each = count // max(len(rows), 1)
            drawn = counter_bits(stream_key(self.key, self.calls), rows, (each + 1) // 2)
            return drawn.to(torch.int32).view(torch.int16)[:, :each].flatten()
        if count > self.unused.numel():
            words = -(-max(count, min(self.elements, _BLOCK)) // 8)
            self.unused = torch.from_numpy(self.generator.random_raw(words).view(np.int8))
        bits, self.unused = self.unused[:count], self.unused[count:]
        self.elements -= count
        return bits

    def kept(self, bits: torch.Tensor) -> torch.Tensor:
        """The mask of these bits, a new tensor."""
        if self.lowest_kept > torch.iinfo(bits.dtype).max:  # torch would wrap it around
            return torch.zeros(bits.shape, dtype=self.dtype, device=self.device)
        out = torch.empty(bits.shape, dtype=self.dtype, device=self.device)
        return torch.ge(bits, self.lowest_kept, out=out)


def dropout(x: torch.Tensor, rate: float, training: bool, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` with a share ``rate`` of elements set to 0 and the rest scaled by 1 / (1 - rate), when training; plus the
    residual."""
    if training and rate > 0.0:
        if not dispatch.fast() or (dispatch.waits(x) and numbered_rows.current() is not None):
            return dropout_reference(x, rate, residual)
        if dispatch.fast_on_cpu(x):
            return _Dropout.apply(x, residual, rate)
    dropped = F.dropout(x, rate, training) if rate > 0.0 else x
    return dropped if residual is None else dropped + residual


def dropout_reference(x: torch.Tensor, rate: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`dropout` in training as its equation, ``x * mask / (1 - rate)``, under the mask that a CPU draws from the same
    seed."""
    dropped = x * KeepMasks(rate, x).draw(x.shape) / (1.0 - rate)
    return dropped if residual is None else dropped + residual


class _Dropout(torch.autograd.Function):
    """Two passes over x, and its bits are kept, not a mask."""

    @staticmethod
    def forward(ctx, x, residual, rate):
        # addcmul adds something anyway: without a residual a scalar 0.
        added = x.new_zeros(()) if residual is None else residual
        like = x.new_empty((), dtype=torch.result_type(x, added))  # of the sum, under autocast
        ctx.masks, ctx.scale = KeepMasks(rate, like), 1.0 / (1.0 - rate)
        bits = ctx.masks.bits(x.numel())
        ctx.save_for_backward(bits)
        return _scaled(x, ctx, bits, added)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        return _scaled(grad, ctx, bits, grad.new_zeros(())), grad if ctx.needs_input_grad[1] else None, None


def _scaled(x: torch.Tensor, ctx, bits: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    kept = ctx.masks.kept(bits).view(x.shape)
    return torch.addcmul(added, x, kept, value=ctx.scale, out=kept)


class Dropout(torch.nn.Module):
    """Module form of `dropout`; rate in [0, 1)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.rate, self.training)
