"""Negatives among the last items of the catalogue as a sampler plug-in.

python main.py --plugin=examples/plugins/newest.py --gin_bindings='train_fn.sampling_strategy = "newest"'
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from generative_recommenders import register_negative_sampler
from generative_recommenders.objectives.negative_samplers import NegativesSampler, Sharing
from generative_recommenders.ops.counter_random import counter_integers


@register_negative_sampler("newest", gin_name="newest_sampler")
class NewestNegativesSampler(NegativesSampler):
    """Uniform over the last items of the catalogue, with replacement.

    newest: how many items.
    """

    def __init__(
        self, num_items: int, num_negatives: int, sharing: Sharing, newest: Annotated[int, Ge(1)] = 100
    ) -> None:
        super().__init__(num_negatives, sharing)
        self.newest = min(newest, num_items)
        self.before = num_items - self.newest

    def draw(self, key, units, draws, batch):
        """ids ``[G, draws]``, the same for the same key and units; None: no correction by probability."""
        return counter_integers(key, units, draws, self.newest).add_(1 + self.before), None
