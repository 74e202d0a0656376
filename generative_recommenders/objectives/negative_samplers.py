"""Negative samplers: from the catalogue, from the batch, by popularity, or mixtures.

Draws are counter-based (see `counter_random`): a sampler is given a key for the step and the global numbers of the
positions or blocks that share a draw. Padding (id 0) is never drawn; collisions with positives are masked later, in
`scoring`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from generative_recommenders.config.fields import NonNegative
from generative_recommenders.config.registry import register_negative_sampler
from generative_recommenders.config.sections import NegativesSharing
from generative_recommenders.errors import UserError
from generative_recommenders.ops.counter_random import (
    Key,
    counter_bits,
    counter_integers,
    counter_uniform,
    stream_key,
)
from generative_recommenders.ops.products.sampled import join_blocks

ClassSelector = Literal["random", "target"]
SHARINGS: tuple[str, ...] = get_args(NegativesSharing)


@dataclass(frozen=True)
class Sharing:
    """Positions that share one draw: each its own, blocks of consecutive ones, or the whole batch."""

    granularity: str = "position"
    block_size: int = 256

    def __post_init__(self) -> None:
        if self.granularity not in SHARINGS:
            raise ValueError(f"unknown negatives_sharing {self.granularity!r}; known: {', '.join(SHARINGS)}")
        if self.block_size < 1:
            raise ValueError(f"negatives_block_size must be 1 or more, got {self.block_size}")

    def units(self, first_token: int, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Global numbers ``[G]`` of the draws that tokens first_token .. first_token + num_tokens - 1 need."""
        if self.granularity == "batch":
            return torch.zeros(1, dtype=torch.int64, device=device)
        size = 1 if self.granularity == "position" else self.block_size
        stop = -(-(first_token + num_tokens) // size)
        return torch.arange(first_token // size, stop, device=device)

    def lead(self, first_token: int) -> int:
        """Tokens of the first block that lie before first_token (on another process)."""
        return first_token % self.block_size if self.granularity == "block" else 0


@dataclass(frozen=True)
class Negatives:
    """ids: ``[G, R]`` int64, one row per position, per block, or one for all; lead: see `Sharing.lead`.

    log_q: ``[G, R]`` float32, ln(R q) with q an id's probability of being drawn, or None for no correction.
    """

    ids: torch.Tensor
    sharing: Sharing
    lead: int = 0
    log_q: torch.Tensor | None = None

    def per_token(self, values: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """``[G, R]`` values as ``[T, R]`` (a view where tokens do not share)."""
        if self.sharing.granularity == "position":
            return values
        if self.sharing.granularity == "batch":
            return values.expand(num_tokens, -1)
        return join_blocks(values[:, None].expand(-1, self.sharing.block_size, -1), num_tokens, self.lead)

    def spans(self, num_tokens: int) -> list[slice] | None:
        """The tokens that each row of ids belongs to, or None where every token has a row of its own."""
        if self.sharing.granularity == "position":
            return None
        if self.sharing.granularity == "batch":
            return [slice(0, num_tokens)]
        size = self.sharing.block_size
        starts = range(-self.lead, num_tokens, size)
        return [slice(max(start, 0), min(start + size, num_tokens)) for start in starts]


@dataclass(frozen=True)
class BatchItems:
    """Inputs of a sampler in a step. pool: ``[M]`` int64 sorted unique ids of the global batch; targets: ``[T]`` int64,
    those of this process's tokens.
    """

    pool: torch.Tensor | None = None
    targets: torch.Tensor | None = None


class NegativesSampler(torch.nn.Module, ABC):
    """Base. num_negatives: R drawn for each unit of sharing. log_q_correction: give `Negatives.log_q`."""

    SUPPLIED = frozenset({"num_items", "num_negatives", "sharing", "counts", "samplers", "assignment"})
    """Passed by the program where a constructor asks for it; all other arguments are options.

    counts: ``[V]`` training events of each item; samplers: those of a mixture; assignment: ``[C, V]`` bool, items of
    classes.
    """
    uses_batch_pool = False
    """Whether ``BatchItems.pool`` must be given."""

    def __init__(self, num_negatives: int, sharing: Sharing, log_q_correction: bool = False) -> None:
        super().__init__()
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be 1 or more, got {num_negatives}")
        self.num_negatives = num_negatives
        self.sharing = sharing
        self.log_q_correction = log_q_correction
        self.register_buffer("nothing", torch.empty(0), persistent=False)

    def forward(self, key: Key, first_token: int, num_tokens: int, batch: BatchItems | None = None) -> Negatives:
        """Draws for ``num_tokens`` consecutive tokens, the first of which is number first_token of the global batch."""
        units = self.sharing.units(first_token, num_tokens, self.device)
        batch = batch or BatchItems()
        if not num_tokens and batch.pool is not None and not batch.pool.numel():
            batch = replace(batch, pool=batch.pool.new_ones(1))  # a batch's draw has a shape without tokens too
        ids, q = self.draw(key, units, self.num_negatives, batch)
        log_q = torch.log(q * self.num_negatives) if self.log_q_correction and q is not None else None
        return Negatives(ids, self.sharing, self.sharing.lead(first_token), log_q)

    @property
    def device(self) -> torch.device:
        """Where it draws: that of an empty buffer, which moves with the module."""
        return self.get_buffer("nothing").device

    @abstractmethod
    def draw(
        self, key: Key, units: torch.Tensor, draws: int, batch: BatchItems
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids ``[G, draws]`` and their probabilities ``[G, draws]`` (None: uniform over a fixed set)."""


@register_negative_sampler("local")
class LocalNegativesSampler(NegativesSampler):
    """Uniform over the catalogue 1..num_items, with replacement (published ``"local"``)."""

    def __init__(self, num_items: int, num_negatives: int, sharing: Sharing) -> None:
        super().__init__(num_negatives, sharing)
        if num_items < 1:
            raise ValueError("there are no items to draw negatives from")
        self.num_items = num_items

    def draw(self, key, units, draws, batch):
        return counter_integers(key, units, draws, self.num_items).add_(1), None


@register_negative_sampler("in-batch")
class InBatchNegativesSampler(NegativesSampler):
    """Uniform over the distinct items of the global batch (published ``"in-batch"``, deduplicated).

    With log_q_correction an id's probability is that of being in a pool of M distinct ids, over M. An item of share f
    of the training events is in a batch of n of them with probability ``1 - (1 - f)^n`` (Yi et al., RecSys 2019,
    estimate the same from the stream); n is the number that gives M ids on average.

    counts: ``[V]`` occurrences of item id i + 1 in the training data; the correction needs them.
    log_q_correction: the logarithm of this probability is subtracted from the scores of negatives.
    """

    uses_batch_pool = True
    log_absent: torch.Tensor

    def __init__(
        self,
        num_negatives: int,
        sharing: Sharing,
        log_q_correction: bool = False,
        counts: torch.Tensor | None = None,
    ) -> None:
        super().__init__(num_negatives, sharing, log_q_correction)
        if log_q_correction:
            if counts is None or not bool((counts > 0).any()):
                raise ValueError("in-batch negatives: log_q_correction needs counts of the training events")
            share = counts.double().clamp(min=0) / counts.clamp(min=0).sum()
            # ln(1 - f); an item that is all of the data is in every batch
            self.register_buffer("log_absent", torch.log1p(-share).clamp(min=-1e6), persistent=False)
            # The sum over items has no inverse in closed form: n for M is read off a curve.
            self.events = np.geomspace(1.0, 1e9, 256)
            self.expected = np.array([float(self._in_batch(n, self.log_absent).sum()) for n in self.events])

    def draw(self, key, units, draws, batch):
        if not units.numel():
            return units.new_empty(0, draws), units.new_empty(0, draws, dtype=torch.float32)
        pool = batch.pool
        if pool is None or pool.numel() == 0:
            raise UserError("in-batch negatives: the batch holds no items to draw from")
        chosen = counter_integers(key, units, draws, pool.numel())
        if not self.log_q_correction:
            return pool[chosen], None
        # The chance of each id of the pool [M] to be drawn, over batches that give as many ids as this one.
        events = float(np.exp(np.interp(pool.numel(), self.expected, np.log(self.events))))
        drawn = self._in_batch(events, self.log_absent[pool - 1]) / pool.numel()
        return pool[chosen], drawn.clamp(min=1e-30).float()[chosen]

    @staticmethod
    def _in_batch(events: float, log_absent: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(events * log_absent)


@register_negative_sampler("popularity")
class PopularityNegativesSampler(NegativesSampler):
    """Item i with probability proportional to count(i)^power, by the alias method (Walker 1977; Vose 1991).

    counts: ``[V]`` occurrences of item id i + 1 in the training data; unseen items are never drawn.
    power: exponent of the counts; 1 draws by frequency, 0 uniformly over the items that occur.
    log_q_correction: the logarithm of an item's probability is subtracted from the scores of negatives.
    """

    accept: torch.Tensor
    alias: torch.Tensor
    probability: torch.Tensor

    def __init__(
        self,
        counts: torch.Tensor,
        num_negatives: int,
        sharing: Sharing,
        power: float = 0.75,
        log_q_correction: bool = False,
    ) -> None:
        super().__init__(num_negatives, sharing, log_q_correction)
        if not bool((counts > 0).any()):
            raise ValueError("popularity negatives: no item occurs in the training data")
        # In logarithms, since a count to a large power overflows.
        logs = (power * counts.clamp(min=1).double().log()).masked_fill(counts <= 0, -math.inf)
        probability = torch.softmax(logs, 0)
        accept, alias = alias_table(probability)
        self.register_buffer("accept", accept, persistent=False)
        self.register_buffer("alias", alias, persistent=False)
        self.register_buffer("probability", probability.float(), persistent=False)

    def draw(self, key, units, draws, batch):
        cell = counter_integers(key, units, draws, self.alias.numel())
        # A key of its own: cell and acceptance must be independent.
        keep = counter_uniform(stream_key(key, 1), units, draws) < self.accept[cell]
        items = torch.where(keep, cell, self.alias[cell])
        return items + 1, self.probability[items]


LOCAL_AND_POPULAR = {"local": 0.5, "popularity": 0.5}


@register_negative_sampler("mixed")
class MixedNegativesSampler(NegativesSampler):
    """Fixed shares of the draws come from each of several samplers, in their order.

    shares: of each sampler, by its name; only their ratios count.
    """

    def __init__(
        self,
        samplers: Sequence[NegativesSampler],
        num_negatives: int,
        shares: dict[str, NonNegative] = LOCAL_AND_POPULAR,
    ) -> None:
        sizes = list(shares.values())
        if not samplers or len(samplers) != len(sizes) or not min(sizes) > 0:
            raise ValueError(f"mixed negatives: {len(samplers)} samplers with shares {sizes}: each needs one above 0")
        super().__init__(num_negatives, samplers[0].sharing)
        self.parts = list(samplers)
        self.samplers = torch.nn.ModuleList(samplers)  # registered, so that they move with this one
        stops = [round(num_negatives * part / sum(sizes)) for part in accumulate(sizes)]
        self.draws = [stop - start for start, stop in zip([0, *stops], stops)]
        if min(self.draws) < 1:
            raise ValueError(
                f"mixed negatives: {num_negatives} negatives in shares {sizes} are {self.draws} draws; every "
                "sampler needs at least 1"
            )
        self.uses_batch_pool = any(sampler.uses_batch_pool for sampler in samplers)

    def draw(self, key, units, draws, batch):
        parts = [
            sampler.draw(stream_key(key, index), units, count, batch)[0]
            for index, (sampler, count) in enumerate(zip(self.parts, self.draws))
        ]
        return torch.cat(parts, dim=1), None


@register_negative_sampler("multi-class")
class MultiClassNegativesSampler(NegativesSampler):
    """Uniform over the items of one class, chosen per unit by a selector.

    assignment: ``[C, V]`` bool, which items (id i + 1) belong to which class.
    selector: "random", any class, or "target", one of the classes of the token's target (any where it has none); a
    target's class cannot be shared by tokens.
    """

    members: torch.Tensor
    starts: torch.Tensor
    classes: torch.Tensor
    class_starts: torch.Tensor

    def __init__(
        self,
        assignment: torch.Tensor,
        num_negatives: int,
        sharing: Sharing,
        selector: ClassSelector = "random",
    ) -> None:
        super().__init__(num_negatives, sharing)
        if assignment.dim() != 2 or assignment.numel() == 0 or not bool(assignment.any(1).all()):
            raise ValueError("multi-class negatives: every class needs at least one item")
        self.by_target = selector == "target"
        if self.by_target and sharing.granularity != "position":
            raise ValueError(
                'multi-class negatives: class_selector "target" needs negatives_sharing "position", not '
                f"{sharing.granularity!r}"
            )
        # Both ways jagged: the items of each class, and the classes of each item.
        for name, starts, matrix in (("members", "starts", assignment), ("classes", "class_starts", assignment.T)):
            self.register_buffer(name, matrix.nonzero()[:, 1], persistent=False)
            self.register_buffer(starts, F.pad(matrix.sum(1).cumsum(0), (1, 0)), persistent=False)

    def draw(self, key, units, draws, batch):
        chosen = self._classes(key, units, batch.targets)
        sizes = (self.starts[chosen + 1] - self.starts[chosen])[:, None]
        # 32 random bits times the size: uniform over the class without a division.
        offsets = (counter_bits(key, units, draws) * sizes) >> 32
        return self.members[self.starts[chosen][:, None] + offsets] + 1, None

    def _classes(self, key: Key, units: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """``[G]`` int64."""
        choice = counter_uniform(stream_key(key, 1), units, 1)[:, 0]
        last = len(self.starts) - 2
        chosen = (choice * (last + 1)).long().clamp(max=last)
        if not self.by_target:
            return chosen
        assert targets is not None  # the trainer gives them
        item = (targets - 1).clamp(min=0)
        count = (self.class_starts[item + 1] - self.class_starts[item]) * (targets > 0)
        place = self.class_starts[item] + (choice * count).long().clamp(max=(count - 1).clamp(min=0))
        own = self.classes[place.clamp(max=self.classes.numel() - 1)]
        return torch.where(count > 0, own, chosen)


def alias_table(probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vose's alias table of ``probability [V]``: accept ``[V]`` float32 and alias ``[V]`` int64."""
    scaled = (probability * probability.numel()).tolist()
    accept, alias = [1.0] * len(scaled), list(range(len(scaled)))
    small = [i for i, p in enumerate(scaled) if p < 1.0]
    large = [i for i, p in enumerate(scaled) if p >= 1.0]
    while small and large:
        low, high = small.pop(), large[-1]
        accept[low], alias[low] = scaled[low], high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            small.append(large.pop())
    return torch.tensor(accept), torch.tensor(alias)
