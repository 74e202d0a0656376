"""Search by 8-bit integers gives the k best of all products, as a sort of them in double precision does."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest
import torch

from generative_recommenders.build.parts import Catalogue, build_model
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.integer_products import integer_products, integer_products_reference
from generative_recommenders.retrieval import quantized_search
from generative_recommenders.retrieval.quantized_search import QuantizedItems
from generative_recommenders.retrieval.recommender import Recommender


@pytest.fixture(autouse=True)
def any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables, whose candidates are a large share of them, are searched by bounds too."""
    monkeypatch.setattr(quantized_search, "MOST_CANDIDATES", 1.0)


def by_sort(
    queries: torch.Tensor, items: torch.Tensor, k: int, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (queries.double() @ items.double().T).float()
    for row, ids in enumerate(seen):
        scores[row, ids[(ids > 0) & (ids <= len(items))] - 1] = -torch.inf
    values, columns = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k] + 1


def case(kind: str, count: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(count, dim, generator=generator)
    queries = torch.randn(3, dim, generator=generator)
    if kind == "norms of every size":
        items *= 10 ** (6 * torch.rand(count, 1, generator=generator) - 3)
    elif kind == "many equal":
        items, queries = items.sign(), queries.sign()
    elif kind == "unit length and close":
        items = torch.nn.functional.normalize(items + 3, dim=1)
        queries = torch.nn.functional.normalize(queries + 3, dim=1) / 0.05
    elif kind == "tiny":
        items *= 1e-36
    seen = torch.randint(0, count + 5, (3, 40), generator=generator)
    return queries, items, seen


KINDS = ("normal", "norms of every size", "many equal", "unit length and close", "tiny")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "dim"), [(64 * 40, 64), (5000, 50), (7001, 8)])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "reference"])
def test_the_k_best_are_those_of_a_sort(kind: str, count: int, dim: int, plain: bool) -> None:
    for seed in range(5):
        queries, items, seen = case(kind, count, dim, seed)
        quantized = QuantizedItems(items)
        with dispatch.references() if plain else torch.no_grad():
            found = quantized.search(queries, 10, seen)
        assert found is not None
        values, ids = by_sort(queries, items, 10, seen)
        assert torch.equal(found[0], values) and torch.equal(found[1], ids)


def test_no_answer_where_bounds_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, items, _ = case("normal", 640, 16, 0)
    few = torch.arange(1, 636).expand(3, -1)  # all but 5 are seen
    assert QuantizedItems(items).search(queries, 10, few) is None
    assert QuantizedItems(items).search(queries, 11) is None  # more than there are lanes
    assert QuantizedItems(items).search(queries * 0, 3) is None
    assert QuantizedItems(items).search(queries * torch.inf, 3) is None
    spoilt = items.clone()
    spoilt[7, 3] = torch.nan
    assert QuantizedItems(spoilt).search(queries, 3) is None
    monkeypatch.setattr(quantized_search, "MOST_CANDIDATES", 1 / 32)
    assert QuantizedItems(torch.ones(6400, 16)).search(queries.abs(), 3) is None


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (1000, 240)])
def test_integer_products_are_exact(shape: tuple[int, int]) -> None:
    rows = torch.randint(-127, 128, shape, dtype=torch.int8)
    rows[0] = 127
    for vector in (rows[0], -rows[0], torch.randint(-127, 128, shape[1:], dtype=torch.int8)):
        found = integer_products(rows, vector)
        assert torch.equal(found, integer_products_reference(rows, vector))
        assert torch.equal(found.long(), (rows.long() * vector.long()).sum(1))


@pytest.mark.skipif(not dispatch.multiplies_integers(torch.ones(1)), reason="a CPU without AVX-512 VNNI")
def test_a_recommender_answers_the_same_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    settings, count = RunSettings(), 3000
    settings = settings.changed(items=settings.items.changed(item_embedding_dim=16))
    model = build_model(settings, Catalogue(count, False, False, torch.ones(count, dtype=torch.int64)))
    rec = Recommender(settings, model, pa.array([str(number) for number in range(count)]))
    histories = {1: [5, 6, 7], 2: [8]}
    expected = rec.recommend(histories, k=20)
    monkeypatch.setattr(quantized_search, "MANY_ITEMS", 1)
    calls = []
    search = QuantizedItems.search
    monkeypatch.setattr(QuantizedItems, "search", lambda *given: calls.append(search(*given)) or calls[-1])
    pd.testing.assert_frame_equal(rec.recommend(histories, k=20), expected, rtol=1e-5)
    assert len(calls) == 1 and calls[0] is not None
