"""Replaced-item detection: a masked model, and a discriminator of the items it sampled (ELECTRA, arXiv 2003.10555)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.config.fields import NonNegative, Probability
from generative_recommenders.config.registry import register_objective
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import hidden_events, token_events
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.model import SequenceEncoder
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.objectives.criterion import Criterion, PreparedBatch, Sums, product_operands
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.masked import MaskedItemObjective
from generative_recommenders.ops.counter_random import CounterDraws

_FAKES, _DETECTION = 2, 3 << 32
"""Purposes of draws: of fakes, see `PreparedBatch.target_draws`, and of the discriminator's dropout masks."""


class ReplacedDetectionCriterion(Criterion):
    """``L_MLM + weight · BCE(discriminator)`` (ELECTRA, section 2).

    The generator is the model under a masked objective, with its own loss ``base``. An item sampled from its softmax
    replaces every hidden one, and the discriminator predicts for each token whether it was replaced. Both share the
    item table. Only the generator is used after training.

    discriminator: its encoder. width: of its states. tied: it is the generator's own, whose weights are registered
    there.
    from_batch: fakes come from the global batch's hidden items instead of the catalogue, which must then be held whole.
    """

    def __init__(
        self,
        base: Criterion,
        discriminator: SequenceEncoder,
        width: int,
        weight: float,
        tied: bool = False,
        from_batch: bool = True,
    ) -> None:
        super().__init__()
        self.base = base
        self.needs_negatives, self.sums_over_tokens = base.needs_negatives, base.sums_over_tokens
        self.needs_target_pool = from_batch
        self.discriminator = None if tied else discriminator
        self._encoder = (discriminator,)  # in a tuple: registered above, or in the model
        self.head = torch.nn.Linear(width, 1)
        self.weight = weight

    def forward(self, states, items, batch, similarity):
        total, weight, sums = self.base(states, items, batch, similarity)
        fakes = self.fakes(states, items, batch, similarity)
        return total, weight, {**sums, "replaced_detection": self.detection(fakes, items, batch)}

    def auxiliary(self, sums: Sums, similarity: Similarity) -> dict[str, Tensor]:
        cross_entropy, tokens = sums["replaced_detection"].unbind()
        own = self.weight * cross_entropy / tokens.clamp(min=1)
        return {**self.base.auxiliary(sums, similarity), "replaced_detection": own}

    @torch.no_grad()
    def fakes(self, states: Tensor, items: ItemRows, batch: PreparedBatch, similarity: Similarity) -> Tensor:
        """``[M]`` ids sampled from the generator's softmax at the hidden positions."""
        scored = items.normalized()
        query, weight = product_operands(similarity, states, scored.weight)
        if not len(query):
            return batch.example.targets
        scored = replace(scored, weight=weight)
        draws = batch.target_draws(_FAKES)
        if batch.target_pool is None:
            return sample_from_catalogue(query, scored.catalogue(), draws)
        return batch.target_pool[sample_from_catalogue(query, scored.lookup(batch.target_pool), draws) - 1]

    def detection(self, fakes: Tensor, items: ItemRows, batch: PreparedBatch) -> Tensor:
        """``[2]``: binary cross-entropy over all tokens, and their number; a fake that is the true item counts as
        original."""
        example = batch.example
        assert example.read is not None  # masked objectives say what they read
        corrupted = example.past_ids.index_copy(0, example.read, fakes)
        features = example.features
        assert example.shown_events is not None
        events = token_events(example.shown_events, features.past_lengths, example.layout)
        (encoder,) = self._encoder
        with batch.token_rows(_DETECTION):
            logits = self.head(encoder(items.lookup(corrupted), example.layout, events))[:, 0]
        replaced = (corrupted != example.past_ids).float()
        total = F.binary_cross_entropy_with_logits(logits, replaced, reduction="sum")
        return torch.stack([total, total.new_tensor(float(len(logits)))])


@register_objective("replaced", gin_name="replaced_objective")
class ReplacedObjective(MaskedItemObjective):
    """A masked model, and a discriminator that detects the items it sampled (ELECTRA, arXiv 2003.10555).

    See `ReplacedDetectionCriterion`.

    mask_probability: share of a history that is hidden, beside the one position that always is.
    fakes_from: where the replacements are drawn from, the hidden items of the batch or the whole catalogue.
    tie_discriminator: the discriminator is the model's own encoder.
    discriminator_weight: weight of the discriminator's loss beside the model's.
    """

    needs_item_table = True

    def __init__(
        self,
        embedding_dim: int,
        mask_probability: Probability = 0.15,
        fakes_from: Literal["batch", "catalogue"] = "batch",
        tie_discriminator: bool = False,
        discriminator_weight: NonNegative = 50.0,
    ) -> None:
        super().__init__(mask_probability)
        self.embedding_dim, self.from_batch = embedding_dim, fakes_from == "batch"
        self.tied, self.weight = tie_discriminator, discriminator_weight

    def example(self, columns: Mapping[str, Tensor], draws: Draws = None) -> TrainingExample:
        example = super().example(columns, draws)
        # Events emptied as for the model would tell the discriminator which items were hidden.
        nowhere = torch.zeros_like(columns["item_ids"], dtype=torch.bool)
        return replace(example, shown_events=hidden_events(columns, nowhere, columns["lengths"]))

    def criterion(self, base: Criterion, encoder: Callable[[bool], SequenceEncoder]) -> Criterion:
        """The loss with the discriminator's beside it; UserError where the fakes' items are not all in a step."""
        if not self.from_batch and base.needs_negatives:
            raise UserError(
                'fakes_from "catalogue" needs the whole item table in a step: choose CE, not a loss of sampled '
                "negatives"
            )
        return ReplacedDetectionCriterion(
            base, encoder(self.tied), self.embedding_dim, self.weight, self.tied, self.from_batch
        )


@torch.no_grad()
def sample_from_catalogue(hidden: Tensor, item_weight: Tensor, draws: CounterDraws, block_size: int = 65536) -> Tensor:
    """One item id (1..V) per row, distributed as softmax(hidden . item); four ``[P, block_size]`` are held.

    hidden: ``[P, D]``; item_weight: ``[V, D]``, row i is item id i + 1. The maximum of logits plus Gumbel
    noise is kept while walking over blocks of the catalogue.
    """
    # Gumbel-max: the largest of logits plus noise is a draw of the softmax, and a maximum goes block by block.
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    items = torch.ones(len(hidden), dtype=torch.long, device=hidden.device)
    for start in range(0, len(item_weight), block_size):
        logits = hidden @ item_weight[start : start + block_size].T
        # Standard Gumbel noise: -ln of an exponential draw, which is above 0.
        exponential = -torch.log1p(-draws.uniform(logits.shape[1]))
        # A draw of 0 stands for those below 2^-24: a far smaller one would win over every logit.
        noise = -exponential.clamp(min=2.0**-25).log().to(logits.device)
        score, index = (logits + noise).max(-1)
        items = torch.where(score > best, index + start + 1, items)
        best = torch.maximum(best, score)
    return items
