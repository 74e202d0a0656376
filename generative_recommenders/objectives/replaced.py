"""The joint loss of replaced-item detection: a masked model, and a discriminator that finds what it made
up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.modeling.events import token_events
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.model import SequenceEncoder
from generative_recommenders.objectives.criterion import Criterion
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.replacement import sample_from_catalogue
from generative_recommenders.ops.normalization import l2_normalize


class ReplacedDetectionCriterion(Criterion):
    """``L_MLM + weight · BCE(discriminator)`` (ELECTRA, arXiv 2003.10555, section 2).

    The generator is the model under a masked objective; it keeps its loss ``base``. An item sampled from its
    softmax takes the place of every hidden one, and the discriminator says of each token whether it was
    replaced. Both share the item table. Only the generator is used afterwards.

    discriminator: its encoder. tied: it is the generator's own, whose weights are registered there.
    from_batch: fakes come from the batch's hidden items instead of the catalogue, which must then be held
    whole. temperature, item_l2_norm, eps: of the softmax, as in base.
    """

    def __init__(
        self,
        base: Criterion,
        discriminator: SequenceEncoder,
        width: int,
        weight: float,
        temperature: float,
        item_l2_norm: bool,
        eps: float,
        tied: bool = False,
        from_batch: bool = True,
    ) -> None:
        super().__init__()
        self.base, self.needs_negatives = base, base.needs_negatives
        self.discriminator = None if tied else discriminator
        self._encoder = (discriminator,)  # in a tuple: registered above, or in the model
        self.head = torch.nn.Linear(width, 1)
        self.weight, self.from_batch = weight, from_batch
        self.temperature, self.item_l2_norm, self.eps = temperature, item_l2_norm, eps

    def forward(self, states, items, example, negatives, similarity):
        total, weight, auxiliary = self.base(states, items, example, negatives, similarity)
        detection = self.detection(self.fakes(states, items, example.targets), items, example)
        return total, weight, {**auxiliary, "replaced_detection": self.weight * detection}

    @torch.no_grad()
    def fakes(self, states: torch.Tensor, items: ItemRows, targets: torch.Tensor) -> torch.Tensor:
        """``[M]`` ids sampled from the generator's softmax at the hidden positions."""
        last = items.weight.shape[0] if items.row_of_item is None else items.row_of_item.numel()
        if not len(targets):
            return targets
        candidates = targets.unique() if self.from_batch else torch.arange(1, last, device=targets.device)
        weight = items.lookup(candidates).float()
        if self.item_l2_norm:
            weight = l2_normalize(weight, self.eps)
        return candidates[sample_from_catalogue(states / self.temperature, weight) - 1]

    def detection(self, fakes: torch.Tensor, items: ItemRows, example: TrainingExample) -> torch.Tensor:
        """Mean binary cross-entropy over all tokens; a fake that happens to be the true item counts as
        original.
        """
        assert example.read is not None  # masked objectives say what they read
        corrupted = example.past_ids.index_copy(0, example.read, fakes)
        features = example.features
        events = token_events(features.past_events, features.past_lengths, example.layout)
        (encoder,) = self._encoder
        logits = self.head(encoder(items.lookup(corrupted), example.layout, events))[:, 0]
        replaced = (corrupted != example.past_ids).float()
        total = F.binary_cross_entropy_with_logits(logits, replaced, reduction="sum")
        return total / max(1, len(logits))
