"""Who the positives compete with: negatives from the catalogue, from the batch, by popularity, or mixtures.

Draws are counter-based (see `counter_random`): a sampler is given a key for the step and the global numbers of the positions or
blocks that share a draw. Padding (id 0) is never drawn; collisions with positives are masked later, in `scoring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .counter_random import counter_bits, counter_integers, counter_uniform, stream_key

SHARINGS = ("position", "block", "batch")


@dataclass(frozen=True)
class Sharing:
    """How many positions share one draw: each its own, blocks of consecutive ones, or the whole batch."""

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
        return self.tokens(values[:, None].expand(-1, self.sharing.block_size, -1), num_tokens)

    def spans(self, num_tokens: int) -> list[slice] | None:
        """The tokens that each row of ids belongs to, or None where every token has a row of its own."""
        if self.sharing.granularity == "position":
            return None
        if self.sharing.granularity == "batch":
            return [slice(0, num_tokens)]
        size = self.sharing.block_size
        starts = range(-self.lead, num_tokens, size)
        return [slice(max(start, 0), min(start + size, num_tokens)) for start in starts]

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` values of tokens as ``[G, block_size, D]``, 0 beyond the tokens of this process."""
        behind = self.ids.shape[0] * self.sharing.block_size - self.lead - x.shape[0]
        return F.pad(x, (0, 0, self.lead, behind)).unflatten(0, (-1, self.sharing.block_size))

    def tokens(self, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """``[G, block_size, D]`` as ``[T, D]``: the inverse of `blocks`."""
        return blocks.flatten(0, 1)[self.lead : self.lead + num_tokens]


class NegativesSampler(torch.nn.Module, ABC):
    """Base. num_negatives: R drawn for each unit of sharing. log_q_correction: give `Negatives.log_q`."""

    uses_batch_pool = False

    def __init__(self, num_negatives: int, sharing: Sharing, log_q_correction: bool = False) -> None:
        super().__init__()
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be 1 or more, got {num_negatives}")
        self.num_negatives = num_negatives
        self.sharing = sharing
        self.log_q_correction = log_q_correction

    def forward(
        self, key: int, first_token: int, num_tokens: int, pool: torch.Tensor | None = None
    ) -> Negatives:
        """Draws for ``num_tokens`` consecutive tokens, the first of which is number first_token of the global batch.

        pool: ``[M]`` int64 sorted unique ids of the global batch, for samplers that use it.
        """
        device = self.device if pool is None else pool.device
        units = self.sharing.units(first_token, num_tokens, device)
        ids, q = self.draw(key, units, self.num_negatives, pool)
        log_q = torch.log(q * self.num_negatives) if self.log_q_correction and q is not None else None
        return Negatives(ids, self.sharing, self.sharing.lead(first_token), log_q)

    @property
    def device(self) -> torch.device:
        return next(self.buffers(), torch.empty(0)).device

    @abstractmethod
    def draw(
        self, key: int, units: torch.Tensor, draws: int, pool: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids ``[G, draws]`` and their probabilities ``[G, draws]`` (None: uniform over a fixed set)."""


class LocalNegativesSampler(NegativesSampler):
    """Uniform over the catalogue 1..num_items, with replacement (published ``"local"``)."""

    def __init__(self, num_items: int, num_negatives: int, sharing: Sharing) -> None:
        super().__init__(num_negatives, sharing)
        if num_items < 1:
            raise ValueError("there are no items to draw negatives from")
        self.num_items = num_items
        self.register_buffer("_device", torch.empty(0), persistent=False)

    def draw(self, key, units, draws, pool):
        return counter_integers(key, units, draws, self.num_items).add_(1), None


class InBatchNegativesSampler(NegativesSampler):
    """Uniform over the distinct items of the global batch (published ``"in-batch"``, deduplicated).

    With log_q_correction an id's probability is its share of the batch's pool.
    """

    uses_batch_pool = True

    def draw(self, key, units, draws, pool):
        if pool is None or pool.numel() == 0:
            raise ValueError("in-batch negatives: the batch holds no items to draw from")
        ids = pool[counter_integers(key, units, draws, pool.numel())]
        return ids, torch.full_like(ids, 1.0 / pool.numel(), dtype=torch.float32)


class PopularityNegativesSampler(NegativesSampler):
    """Item i with probability proportional to count(i)^power, by the alias method (Walker 1977; Vose 1991).

    counts: ``[V]`` occurrences of item id i + 1 in the training data; unseen items are never drawn.
    """

    accept: torch.Tensor
    alias: torch.Tensor
    probability: torch.Tensor

    def __init__(
        self,
        counts: torch.Tensor,
        power: float,
        num_negatives: int,
        sharing: Sharing,
        log_q_correction: bool = False,
    ) -> None:
        super().__init__(num_negatives, sharing, log_q_correction)
        weights = counts.double().clamp(min=0) ** power * (counts > 0)
        if float(weights.sum()) <= 0:
            raise ValueError("popularity negatives: no item occurs in the training data")
        probability = weights / weights.sum()
        accept, alias = alias_table(probability)
        self.register_buffer("accept", accept, persistent=False)
        self.register_buffer("alias", alias, persistent=False)
        self.register_buffer("probability", probability.float(), persistent=False)

    def draw(self, key, units, draws, pool):
        cell = counter_integers(key, units, draws, self.alias.numel())
        keep = counter_uniform(stream_key(key, 1), units, draws) < self.accept[cell]
        items = torch.where(keep, cell, self.alias[cell])
        return items + 1, self.probability[items]


class MixedNegativesSampler(NegativesSampler):
    """Fixed shares of the draws come from each of several samplers, in their order."""

    def __init__(
        self, samplers: Sequence[NegativesSampler], shares: Sequence[float], num_negatives: int
    ) -> None:
        if not samplers or len(samplers) != len(shares) or min(shares) <= 0:
            raise ValueError(f"mixed negatives: {len(samplers)} samplers with shares {list(shares)}")
        super().__init__(num_negatives, samplers[0].sharing)
        self.parts = list(samplers)
        self.samplers = torch.nn.ModuleList(samplers)  # registered, so that they move with this one
        total, stops = sum(shares), []
        for index in range(len(shares)):
            stops.append(round(num_negatives * sum(shares[: index + 1]) / total))
        self.draws = [stop - start for start, stop in zip([0, *stops], stops)]
        self.uses_batch_pool = any(sampler.uses_batch_pool for sampler in samplers)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def draw(self, key, units, draws, pool):
        parts = [
            sampler.draw(stream_key(key, index), units, count, pool)[0]
            for index, (sampler, count) in enumerate(zip(self.parts, self.draws))
            if count > 0
        ]
        return torch.cat(parts, dim=1), None


class MultiClassNegativesSampler(NegativesSampler):
    """Uniform over the items of one class, chosen per unit by a selector.

    assignment: ``[C, V]`` bool, which items (id i + 1) belong to which class. Each unit's class is drawn with
    probability ``class_weights [C]`` (uniform when None).
    """

    members: torch.Tensor
    starts: torch.Tensor
    cumulative: torch.Tensor

    def __init__(
        self,
        assignment: torch.Tensor,
        num_negatives: int,
        sharing: Sharing,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__(num_negatives, sharing)
        if assignment.dim() != 2 or assignment.numel() == 0 or not bool(assignment.any(1).all()):
            raise ValueError("multi-class negatives: every class needs at least one item")
        sizes = assignment.sum(1)
        weights = torch.ones(len(sizes)) if class_weights is None else class_weights.float()
        self.register_buffer("members", assignment.nonzero()[:, 1] + 1, persistent=False)
        self.register_buffer("starts", torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), persistent=False)
        self.register_buffer("cumulative", (weights / weights.sum()).cumsum(0), persistent=False)

    def draw(self, key, units, draws, pool):
        choice = counter_uniform(stream_key(key, 1), units, 1)[:, 0]
        chosen = torch.searchsorted(self.cumulative, choice, right=True).clamp(
            max=self.cumulative.numel() - 1
        )
        sizes = (self.starts[chosen + 1] - self.starts[chosen])[:, None]
        offsets = (counter_bits(key, units, draws) * sizes) >> 32
        return self.members[self.starts[chosen][:, None] + offsets], None


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
