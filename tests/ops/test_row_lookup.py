"""Rows that a step reads: found, and found again, as by sorting and searching."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.ops import embedding


@pytest.mark.parametrize("num_rows", [5, 60, 5000])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_ids_each_once_and_their_places(num_rows: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    first = torch.randint(0, num_rows, (count,), generator=generator)
    second = torch.randint(0, num_rows, (count, 3), generator=generator)
    held = embedding.sorted_unique(torch.cat([first, second.flatten()]), num_rows - 1)
    assert held.tolist() == sorted({*first.tolist(), *second.flatten().tolist()})
    for rows in (first, second):
        places = embedding.places_of(held, rows)
        assert torch.equal(places, embedding.places_of_reference(held, rows))
        assert places.dtype == torch.int64 and torch.equal(held[places], rows)
