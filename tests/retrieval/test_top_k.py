"""Top-k search, exact and approximate, against a sort of all scores."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from generative_recommenders.build.factories import create_mol_interaction_module
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.retrieval import product_search, top_k
from generative_recommenders.retrieval.methods import make_top_k
from generative_recommenders.retrieval.mol_top_k import (
    MoLAvgTopK,
    MoLBruteForceTopK,
    MoLCombTopK,
    MoLNaiveTopK,
)
from generative_recommenders.retrieval.selection import largest
from generative_recommenders.retrieval.top_k import BruteForceTopK, MIPSBruteForceTopK

V = 40


def slow_top_k(scores: list[float], seen: list[int], k: int) -> list[int]:
    """Sort by score, then id; what is missing is 0."""
    left = [i for i in range(1, len(scores) + 1) if i not in seen]
    left.sort(key=lambda i: (-math.inf if math.isnan(scores[i - 1]) else scores[i - 1], -i), reverse=True)
    return (left[:k] + [0] * k)[:k]


def tied_case(seed: int = 0, n: int = 12):
    """Small integers as embeddings, so that many products are equal and exact."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (n, 3), generator=generator).float()
    items = torch.randint(-1, 2, (V, 3), generator=generator).float()
    seen = torch.randint(0, V + 1, (n, 9), generator=generator)
    return queries, items, seen


def mol_case(seed: int = 0, n: int = 6):
    torch.manual_seed(seed)
    similarity = (
        create_mol_interaction_module(
            5,
            6,
            query_dot_product_groups=2,
            item_dot_product_groups=3,
            dot_product_dimension=4,
            query_hidden_dim=8,
            gating_qi_hidden_dim=8,
        )
        .eval()
        .double()
    )
    queries, items = torch.randn(n, 5).double(), torch.randn(V, 6).double()
    return similarity, queries, items, torch.randint(0, V + 1, (n, 9))


@pytest.fixture(params=[2**23, 50, 1])
def small_blocks(request, monkeypatch):
    for module in (top_k, product_search):
        monkeypatch.setattr(module, "BLOCK_SCORES", request.param)
    for name in ("BLOCK_ROWS", "LANES"):
        monkeypatch.setattr(product_search, name, min(getattr(product_search, name), request.param))


@pytest.mark.parametrize("k", [1, 5, 20, 40, 60])
def test_largest_equals_a_sort(k):
    scores = torch.randint(0, 5, (30, V), generator=torch.Generator().manual_seed(k)).float()
    scores[3] = 1.0
    scores[4, ::2] = -torch.inf
    scores[5, 7] = float("nan")
    values, columns = largest(scores, k)
    expected = [slow_top_k(row, [], min(k, V)) for row in scores.tolist()]
    assert (columns + 1).tolist() == expected
    clean = scores.masked_fill(scores.isnan(), -torch.inf)
    assert torch.equal(values, clean.gather(1, columns))


@pytest.mark.parametrize("k", [1, 7, 38, 60])
def test_dot_product_search_equals_a_sort_with_ties_and_seen_items(small_blocks, k):
    queries, items, seen = tied_case(k)
    scores, ids = MIPSBruteForceTopK(DotProductSimilarity(), items)(queries, k, seen)
    all_scores = queries @ items.T
    assert ids.tolist() == [slow_top_k(s, x, k) for s, x in zip(all_scores.tolist(), seen.tolist())]
    found = ids > 0
    assert torch.equal(scores[found], all_scores.gather(1, (ids - 1).clamp(min=0))[found])
    assert (scores[~found] == -torch.inf).all()
    unfiltered = MIPSBruteForceTopK(DotProductSimilarity(), items)(queries, k)[1]
    assert unfiltered.tolist() == [slow_top_k(s, [], k) for s in all_scores.tolist()]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_queries_of_their_own_for_each_core_find_the_same(small_blocks, threads, monkeypatch):
    monkeypatch.setattr(product_search, "FEWEST_ROWS", 2)
    queries, items, seen = tied_case(5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = MIPSBruteForceTopK(DotProductSimilarity(), items)(queries, 5, seen)[1]
    finally:
        torch.set_num_threads(before)
    assert len(queries) >= 2 * threads
    assert ids.tolist() == [slow_top_k(s, x, 5) for s, x in zip((queries @ items.T).tolist(), seen.tolist())]


@pytest.mark.parametrize("k", [1, 7, 60])
def test_scores_rounded_to_bf16_are_ranked_as_rounded(small_blocks, k):
    _, _, seen = tied_case(k)
    generator = torch.Generator().manual_seed(k)
    queries, items = torch.randn(12, 3, generator=generator), torch.randn(V, 3, generator=generator)
    similarity = DotProductSimilarity(score_dtype=torch.bfloat16)
    expected = BruteForceTopK(similarity, items)(queries, k, seen)
    scores, ids = MIPSBruteForceTopK(similarity, items)(queries, k, seen)
    assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])
    assert torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("k", [3, 60])
def test_mol_search_equals_a_sort_of_all_scores(small_blocks, k):
    similarity, queries, items, seen = mol_case(k)
    scores, ids = MoLBruteForceTopK(similarity, items)(queries, k, seen)
    with torch.no_grad():
        all_scores = similarity.score(queries, items)[0]
    assert ids.tolist() == [slow_top_k(s, x, k) for s, x in zip(all_scores.tolist(), seen.tolist())]
    found = ids > 0
    expected = all_scores.gather(1, (ids - 1).clamp(min=0))
    torch.testing.assert_close(scores[found], expected[found])


@pytest.mark.parametrize("build", [
    lambda s, x: MoLNaiveTopK(s, x, V),
    lambda s, x: MoLAvgTopK(s, x, V),
    lambda s, x: MoLCombTopK(s, x, 1, V),
])  # fmt: skip
def test_approximate_search_with_all_items_as_candidates_is_exact(small_blocks, build):
    similarity, queries, items, seen = mol_case(1)
    exact = MoLBruteForceTopK(similarity, items)(queries, 10, seen)
    scores, ids = build(similarity, items)(queries, 10, seen)
    assert torch.equal(ids, exact[1])
    torch.testing.assert_close(scores, exact[0])


def test_candidates_are_the_best_of_each_pair_of_components_and_of_the_means():
    similarity, queries, items, seen = mol_case(2)
    query, _ = similarity.query_components(queries)
    parts = similarity.item_components(items).components
    comb = MoLCombTopK(similarity, items, avg_top_k=4, k_per_group=2)
    candidates = comb.candidates(query, seen)
    for row in range(len(queries)):
        expected = set()
        for q in query.components[row]:
            for m in range(parts.shape[1]):
                expected |= set(slow_top_k((parts[:, m] @ q).tolist(), seen[row].tolist(), 2))
        mean = (parts.mean(1) @ query.components[row].mean(0)).tolist()
        expected |= set(slow_top_k(mean, seen[row].tolist(), 4))
        assert set(candidates[row].tolist()) == expected


def test_approximate_results_are_distinct_unseen_and_scored_by_the_mixture():
    similarity, queries, items, seen = mol_case(3)
    scores, ids = MoLNaiveTopK(similarity, items, 2)(queries, 25, seen)
    with torch.no_grad():
        all_scores = similarity.score(queries, items)[0]
    for row in range(len(queries)):
        found = [i for i in ids[row].tolist() if i > 0]
        assert 2 <= len(found) <= 12
        assert len(set(found)) == len(found)
        assert not set(found) & set(seen[row].tolist())
        torch.testing.assert_close(scores[row, : len(found)], all_scores[row, torch.tensor(found) - 1])
        assert (scores[row].diff()[: len(found) - 1] <= 0).all()
        assert (ids[row, len(found) :] == 0).all()


def test_user_ids_reach_the_similarity():
    torch.manual_seed(0)
    similarity = create_mol_interaction_module(
        5,
        6,
        query_dot_product_groups=3,
        item_dot_product_groups=2,
        dot_product_dimension=4,
        uid_embedding_hash_sizes=(7,),
    ).eval()
    queries, items, users = torch.randn(3, 5), torch.randn(V, 6), torch.tensor([1, 4, 8])
    with torch.no_grad():
        expected = similarity.score(queries, items, users)[0].argmax(1) + 1
    for module in (MoLBruteForceTopK(similarity, items), MoLNaiveTopK(similarity, items, V)):
        assert torch.equal(module(queries, 1, user_ids=users)[1][:, 0], expected)


def test_no_queries():
    assert MIPSBruteForceTopK(DotProductSimilarity(), torch.randn(5, 3))(torch.zeros(0, 3), 2)[1].shape == (
        0,
        2,
    )
    similarity, _, items, _ = mol_case()
    assert MoLNaiveTopK(similarity, items, 2)(torch.zeros(0, 5).double(), 3)[1].shape == (0, 3)


def test_methods_by_name():
    similarity, _, items, _ = mol_case()
    assert isinstance(make_top_k("MIPSBruteForceTopK", DotProductSimilarity(), items), MIPSBruteForceTopK)
    assert isinstance(make_top_k("MoLBruteForceTopK", similarity, items), MoLBruteForceTopK)
    naive = make_top_k("MoLNaiveTopK7", similarity, items)
    assert isinstance(naive, MoLNaiveTopK)
    assert naive.k_per_group == 7
    average = make_top_k("MoLAvgTopK9", similarity, items)
    assert isinstance(average, MoLAvgTopK)
    assert average.avg_top_k == 9
    comb = make_top_k("MoLCombTopK5_20", similarity, items)
    assert isinstance(comb, MoLCombTopK)
    assert (comb.k_per_group, comb.avg_top_k) == (5, 20)


@pytest.mark.parametrize("method", ["MoLNaiveTopK", "MoLCombTopK5", "MoLAvgTopK5_5", "TopK", "MoLNaiveTopK0"])
def test_names_that_do_not_exist_are_refused(method):
    similarity, _, items, _ = mol_case()
    with pytest.raises(UserError, match="top_k_method|k_per_group"):
        make_top_k(method, similarity, items)


def test_methods_of_another_similarity_are_refused():
    similarity, _, items, _ = mol_case()
    with pytest.raises(UserError, match="does not fit"):
        make_top_k("MIPSBruteForceTopK", similarity, items)
    with pytest.raises(UserError, match="does not fit"):
        make_top_k("MoLAvgTopK5", DotProductSimilarity(), items)


@pytest.mark.parametrize("method", ["MoLBruteForceTopK", "MoLNaiveTopK3", "MoLAvgTopK7", "MoLCombTopK3_7"])
def test_modules_move_whole(method: str) -> None:
    similarity, queries, items, _ = mol_case()
    narrow = make_top_k(method, copy.deepcopy(similarity).float(), items.float()).double()
    scores, ids = narrow(queries, 4)
    assert scores.dtype == torch.float64 and (ids > 0).all()
    assert not narrow.state_dict().keys() - {f"similarity.{name}" for name in similarity.state_dict()}
