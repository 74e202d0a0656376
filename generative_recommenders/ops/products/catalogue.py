"""The sum of a row loss over a whole catalogue, in blocks, with gradients formed in the forward pass.

A row loss is a function of a token's positive logits ``[t, P]`` and of one number a token, its row statistic
over the catalogue (``ln sum_v exp(x_v)`` or ``sum_v softplus(x_v)``). ``catalogue_sum`` goes over blocks of
tokens:

1. logits ``x = h W_v^T`` of a tile of items, turned in place into exp(x - maximum of the row) while the tile
   is in cache;
2. the statistic of the block's rows from the tiles' values, their losses, and the derivative c of the losses
   by it;
3. ``dh += c x W_v`` and ``dW_v += x^T (c h)`` from the kept tiles: three matrix products in all.

A block keeps at most ``memory_bytes``; a catalogue too wide for that has its logits computed twice (a fourth
product). On a GPU kernels compute the statistic and its gradients without writing a logit (``catalogue_kernels``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.types import LossOutput

_FEWEST_TOKENS = 32  # products over fewer rows are slow: logits are computed twice instead

RowLoss = Callable[[Tensor, Tensor, Tensor], LossOutput]
"""(positive logits ``[t, P]``, statistic ``[t]``, weights ``[t, P]``) -> summed loss and weight."""


class Statistic(NamedTuple):
    """A row statistic: its value over a tile, its total over tiles, and its derivative by the logits."""

    tile: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Logits ``[t, v]`` -> (value, log scale), ``[t]``; overwrites them with the derivative, up to a factor per row."""
    total: Callable[[Tensor], Tensor]
    """Values ``[tiles, t]`` -> statistic ``[t]``."""
    factors: Callable[[Tensor, Tensor], Tensor]
    """(log scales ``[tiles, t]``, statistic ``[t]``) -> factors of the overwritten tiles ``[tiles, t]``."""
    reference: Callable[[Tensor], Tensor]
    """All logits ``[t, V]`` -> statistic ``[t]``, as its equation."""


def _exp_tile(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.amax(1)
    shift = top.masked_fill(top.isinf(), 0)  # a tile of nothing but excluded items: exp(-inf - 0) = 0
    x.sub_(shift[:, None]).exp_()
    return shift + x.sum(1).log(), top


def _softplus_tile(x: Tensor) -> tuple[Tensor, Tensor]:
    value = F.softplus(x).sum(1)
    x.sigmoid_()
    return value, torch.zeros_like(value)


LOGSUMEXP = Statistic(
    _exp_tile,
    lambda values: values.logsumexp(0),
    # inf - inf is NaN: a tile of nothing but excluded items gets 0
    lambda tops, total: (tops - total).masked_fill(tops == -math.inf, -math.inf).exp(),
    lambda x: x.logsumexp(1),
)
SOFTPLUS_SUM = Statistic(
    _softplus_tile,
    lambda values: values.sum(0),
    lambda zeros, _: torch.ones_like(zeros),
    lambda x: F.softplus(x).sum(1),
)


class Shared(NamedTuple):
    """Of a catalogue of which each process multiplies with a part: ``parts`` gives ``[processes, t]`` of a tensor
    ``[t]``, and ``largest`` is the number of rows of the largest part, so that all plan the same blocks."""

    parts: Callable[[Tensor], Tensor]
    largest: int


def _over_processes(own: Tensor, statistic: Statistic, shared: Shared | None) -> Tensor:
    """``[t]``: the statistic over the whole catalogue, from that over this process's part."""
    return own if shared is None else statistic.total(shared.parts(own))


class Blocks(NamedTuple):
    """Sizes of the work: tokens of a block, items of a tile, elements of the memory for logits."""

    tokens: int
    items: int
    elements: int

    @classmethod
    def plan(cls, hidden: Tensor, num_items: int, memory_bytes: int) -> Blocks:
        """The largest blocks within ``memory_bytes``; one tile of memory where too few tokens would fit."""
        most, tile = (256, 4096) if dispatch.fast_on_cpu(hidden) else (8192, 65536)
        most, tile = min(most, len(hidden)), min(tile, num_items)
        fitting = memory_bytes // (num_items * hidden.element_size())
        if fitting >= min(_FEWEST_TOKENS, most):
            tokens = min(most, fitting)
            return cls(tokens, tile, tokens * num_items)
        tokens = max(1, min(most, memory_bytes // (tile * hidden.element_size())))
        return cls(tokens, tile, tokens * tile)


class _Tiles(NamedTuple):
    """Logits of a block of tokens, tile by tile of ``width`` items: kept where they fit, computed again where not."""

    hidden: Tensor
    item_weight: Tensor
    excluded: Tensor | None
    width: int
    memory: Tensor

    @property
    def kept(self) -> bool:
        return self.memory.numel() >= len(self.hidden) * len(self.item_weight)

    def starts(self) -> range:
        return range(0, len(self.item_weight), self.width)

    def items(self, start: int) -> Tensor:
        return self.item_weight[start : start + self.width]

    def slot(self, start: int) -> Tensor:
        """Memory ``[t, v]`` of the tile that begins at item ``start``."""
        rows, columns = len(self.hidden), len(self.items(start))
        first = rows * start if self.kept else 0
        return self.memory[first : first + rows * columns].view(rows, columns)

    def logits(self, start: int) -> Tensor:
        """The tile's logits in its slot, -inf at excluded items."""
        x = torch.mm(self.hidden, self.items(start).t(), out=self.slot(start))
        if self.excluded is not None:
            column = self.excluded - start
            inside = (column >= 0) & (column < x.shape[1])
            ceiling = torch.full_like(column, math.inf, dtype=x.dtype).masked_fill(inside, -math.inf)
            x.scatter_reduce_(1, column.clamp(0, x.shape[1] - 1), ceiling, "amin")
        return x


class _Gradients(NamedTuple):
    hidden: Tensor
    item_weight: Tensor
    positive: Tensor


def _add_block(
    tiles: _Tiles,
    positive: Tensor,
    weights: Tensor,
    statistic: Statistic,
    row_loss: RowLoss,
    gradients: _Gradients | None,
    shared: Shared | None,
) -> LossOutput:
    """Loss of a block of tokens; its gradients are added to ``gradients``."""
    measured = [statistic.tile(tiles.logits(start)) for start in tiles.starts()]
    values, scales = (torch.stack(column) for column in zip(*measured))
    total = _over_processes(statistic.total(values), statistic, shared)
    if gradients is None:
        return row_loss(positive, total, weights)
    with torch.enable_grad():
        leaves = positive.detach().requires_grad_(), total.detach().requires_grad_()
        output = row_loss(*leaves, weights)
        by_positive, by_total = torch.autograd.grad(output.sum, leaves, materialize_grads=True)
    gradients.positive.copy_(by_positive)
    factors = by_total * statistic.factors(scales, total)
    for start, factor in zip(tiles.starts(), factors[:, :, None]):
        if not tiles.kept:
            statistic.tile(tiles.logits(start))
        x = tiles.slot(start)
        gradients.hidden.addcmul_(x @ tiles.items(start), factor)
        gradients.item_weight[start : start + tiles.width].addmm_(x.t(), tiles.hidden * factor)
    return LossOutput(output.sum.detach(), output.weight)


class _CatalogueSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, item_weight, positive, weights, excluded, statistic, row_loss, memory_bytes, train, shared
    ):
        leaves = (hidden, item_weight, positive)
        ctx.gradients = every = _Gradients(*map(torch.zeros_like, leaves)) if train else None
        total, weight = hidden.new_zeros(()), hidden.new_zeros(())
        blocks = Blocks.plan(hidden, len(item_weight) if shared is None else shared.largest, memory_bytes)
        memory = hidden.new_empty(blocks.elements)
        for start in range(0, len(hidden), max(blocks.tokens, 1)):
            rows = slice(start, start + blocks.tokens)
            out = None if excluded is None else excluded[rows]
            tiles = _Tiles(hidden[rows], item_weight, out, blocks.items, memory)
            own = every and every._replace(hidden=every.hidden[rows], positive=every.positive[rows])
            part = _add_block(tiles, positive[rows], weights[rows], statistic, row_loss, own, shared)
            total, weight = total + part.sum, weight + part.weight
        ctx.mark_non_differentiable(weight)
        return total, weight

    @staticmethod
    def backward(ctx, upstream, _):
        if ctx.gradients is None:
            raise RuntimeError("a catalogue loss hands out its gradients once: backward cannot run a second time")
        scaled = [gradient.mul_(upstream) for gradient in ctx.gradients]
        ctx.gradients = None
        return *scaled, *[None] * 7


def catalogue_sum(
    hidden: Tensor,
    item_weight: Tensor,
    positive: Tensor,
    weights: Tensor,
    excluded: Tensor | None,
    statistic: Statistic,
    row_loss: RowLoss,
    memory_bytes: int,
    shared: Shared | None = None,
) -> LossOutput:
    """``row_loss`` summed over T tokens, differentiable once by ``hidden``, ``item_weight`` and ``positive``.

    hidden: ``[T, D]``. item_weight: ``[V, D]``, the same dtype. positive, weights: ``[T, P]``.
    excluded: ``[T, P]`` int64 items left out of a token's statistic (-1 = none), or None.
    memory_bytes: bound of the logits held at a time. shared: where other processes hold the rest of the catalogue;
    hidden and positive are then the same on all, and this one's part of their gradients is given.
    """
    if not dispatch.fast():
        return catalogue_sum_reference(hidden, item_weight, positive, weights, excluded, statistic, row_loss, shared)
    if dispatch.takes_kernels(hidden):
        from generative_recommenders.ops.products import catalogue_kernels

        if catalogue_kernels.takes(hidden, item_weight):
            total = catalogue_kernels.statistic(hidden, item_weight, excluded, statistic is LOGSUMEXP)
            return row_loss(positive, _over_processes(total, statistic, shared), weights)
    leaves = (hidden, item_weight, positive)
    train = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    total, weight = _CatalogueSum.apply(*leaves, weights, excluded, statistic, row_loss, memory_bytes, train, shared)
    return LossOutput(total, weight)


def catalogue_sum_reference(
    hidden: Tensor,
    item_weight: Tensor,
    positive: Tensor,
    weights: Tensor,
    excluded: Tensor | None,
    statistic: Statistic,
    row_loss: RowLoss,
    shared: Shared | None = None,
) -> LossOutput:
    """`catalogue_sum` of all logits at once."""
    total = row_statistic_reference(hidden, item_weight, excluded, statistic)
    return row_loss(positive, _over_processes(total, statistic, shared), weights)


def row_statistic_reference(
    hidden: Tensor, item_weight: Tensor, excluded: Tensor | None, statistic: Statistic
) -> Tensor:
    """``[T]``: the statistic of each token's logits, of which excluded ones are -inf."""
    logits = hidden @ item_weight.t()
    if excluded is not None:
        out = logits.new_zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool)
        logits = logits.masked_fill(out.scatter_(1, excluded + 1, True)[:, 1:], -math.inf)
    return statistic.reference(logits)
