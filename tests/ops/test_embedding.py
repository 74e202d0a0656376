"""Row lookups against plain torch, values and gradients; rows that a step reads, found as by sorting and searching."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops import dispatch, embedding
from generative_recommenders.ops.embedding import lookup_rows, lookup_rows_reference, sorted_unique


def test_gradient_adds_repeated_rows() -> None:
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for rows in (torch.tensor([[1, 3], [1, 1]]), torch.zeros(0, dtype=torch.int64), torch.tensor(2)):
        assert torch.autograd.gradcheck(lambda w, rows=rows: lookup_rows(w, rows), weight)


@pytest.mark.parametrize("sorted_from", [1, 10**9])
@pytest.mark.parametrize("num_rows", [5, 40_000])
def test_equals_the_reference(sorted_from: int, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that nothing looks up have a gradient of 0, the last one among them."""
    monkeypatch.setattr(embedding, "SORTED_FROM", sorted_from)
    weight = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(num_rows - 1, (7, num_rows // 5 + 4))
    assert_same(lookup_rows(weight, rows), lookup_rows_reference(weight, rows), [weight])


def test_references_are_taken_on_request() -> None:
    weight, rows = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 2])
    with dispatch.references():
        assert lookup_rows(weight, rows).grad_fn.name() == lookup_rows_reference(weight, rows).grad_fn.name()
    assert lookup_rows(weight, rows).grad_fn.name() != lookup_rows_reference(weight, rows).grad_fn.name()


@pytest.mark.parametrize("num_rows", [5, 60, 5000])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_ids_each_once_and_their_places(num_rows: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    first = torch.randint(0, num_rows, (count,), generator=generator)
    second = torch.randint(0, num_rows, (count, 3), generator=generator)
    held = sorted_unique(torch.cat([first, second.flatten()]), num_rows - 1)
    assert held.tolist() == sorted({*first.tolist(), *second.flatten().tolist()})
    for rows in (first, second):
        places = embedding.places_of(held, rows)
        assert torch.equal(places, embedding.places_of_reference(held, rows))
        assert places.dtype == torch.int64 and torch.equal(held[places], rows)


@pytest.mark.parametrize("ids", [[], [4], [3, 3], [9, 1, 4, 1, 9, 9, 2]])
def test_unique_ids_of_an_accelerator_keep_their_number(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "waits", lambda x: True)
    found = sorted_unique(torch.tensor([ids], dtype=torch.int64))
    distinct = sorted(set(ids))
    assert found.tolist() == distinct + distinct[-1:] * (len(ids) - len(distinct))


def test_the_range_of_ids_is_looked_at_where_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[4, 0], [9, 2]])
    assert embedding.range_of(ids) == (0, 9)
    assert embedding.range_of(ids[:0]) is None
    monkeypatch.setattr(dispatch, "waits", lambda x: True)
    assert embedding.range_of(ids) is None


def test_few_rows_of_a_table_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of it; all of it for an optimizer of single rows on a CPU, whatever is read for a tower there."""
    table = torch.zeros(100, 2)

    def most(**how: bool) -> int:
        given = {"updates_rows": False, "tower": False, **how}
        return max(n for n in range(1000) if embedding.gathering_pays(n, table, **given))

    assert (most(), most(updates_rows=True), most(tower=True)) == (25, 100, 999)
    monkeypatch.setattr(dispatch, "waits", lambda x: True)
    assert (most(), most(updates_rows=True), most(tower=True)) == (25, 25, 25)
