"""Ranks of shared scores with own exceptions against the ranks of all scores written out."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.evaluation.baselines import OwnScores, SharedScores
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_equals_the_ranks_of_all_scores(seed: int, items: int, levels: int, filtered: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shared = draw(0, levels, items).float()
    rows, columns = (torch.rand(9, items, generator=generator) < 0.3).nonzero(as_tuple=True)
    # Halves lie between the shared scores, whole numbers among them.
    own = OwnScores(rows, columns + 1, draw(0, 2 * levels, len(rows)).float() / 2)
    scores = shared.repeat(9, 1)
    scores[rows, columns] = own.values
    targets = draw(0, items + 2, 9)
    seen = SeenItems.padded(draw(0, items + 1, 9, 4), items) if filtered else None
    assert torch.equal(SharedScores(shared).ranks(targets, own, seen), exact_ranks(scores, targets, seen))
    alone = exact_ranks(shared.repeat(9, 1), targets, seen)
    assert torch.equal(SharedScores(shared).ranks(targets, None, seen), alone)
