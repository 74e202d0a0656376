"""List metrics of the evaluator: from the same scores as its ranks, against plain sets, by any number of processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import make_split, training_counts
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation import list_metrics
from generative_recommenders.evaluation.evaluator import EvaluationResult, Evaluator
from generative_recommenders.evaluation.list_metrics import TopLists, diversity
from generative_recommenders.evaluation.seen_filters import HistoryFilter, NoFilter, SeenItems, WindowFilter

ITEMS, WINDOW = 30, 6
FILTERS = {"history": HistoryFilter(), "window": WindowFilter(), "none": NoFilter()}


def padded(ids: torch.Tensor) -> SeenItems:
    return SeenItems.padded(ids, ITEMS)


def score(batch) -> torch.Tensor:
    return ((batch["user_ids"][:, None] * 31 + torch.arange(1, ITEMS + 1) * 17) % 13).float()


def evaluate(dataset: SequenceDataset, seen_filter: str, k: int, batch_size: int = 16) -> EvaluationResult:
    split = make_split(dataset)
    loader = EvaluationLoader(dataset, split.test_targets, WINDOW, batch_size)
    unseen = torch.from_numpy(split.unseen_test_targets)
    counts = torch.from_numpy(training_counts(dataset.items, dataset.offsets, split.train_stops, ITEMS))
    lists = TopLists(k, ITEMS, torch.from_numpy(loader.users) + 1, counts)
    return Evaluator(loader, ITEMS, FILTERS[seen_filter], Collectives(), unseen)(score, lists)


def plain_lists(dataset: SequenceDataset, seen_filter: str, k: int) -> list[tuple[list[int], int, set[int]]]:
    """Each test user's list, target (0 for a miss by rule) and history, by sorting."""
    split, users = make_split(dataset), []
    for user in np.flatnonzero(split.test_targets >= 0).tolist():
        events = dataset.items[dataset.offsets[user] :].tolist()
        history, target = events[: split.test_targets[user]], events[split.test_targets[user]]
        seen = {"history": set(history), "window": set(history[-WINDOW:]), "none": set()}[seen_filter]
        if split.unseen_test_targets[user] or target in seen:
            target = 0
        scores = score({"user_ids": torch.tensor([user + 1])})[0].tolist()
        candidates = [item for item in range(1, ITEMS + 1) if item not in seen]
        best = sorted(candidates, key=lambda item: (-scores[item - 1], item))[:k]
        users.append((best, target, set(history)))
    return users


@pytest.mark.parametrize("seen_filter", FILTERS)
@pytest.mark.parametrize("k", [1, 10, 40])
def test_equals_plain_sets(ragged_dataset: SequenceDataset, seen_filter: str, k: int) -> None:
    users, actual = (
        plain_lists(ragged_dataset, seen_filter, k),
        evaluate(ragged_dataset, seen_filter, k).lists,
    )
    split = make_split(ragged_dataset)
    train = [ragged_dataset.items[a : a + stop] for a, stop in zip(ragged_dataset.offsets, split.train_stops)]
    counts = np.bincount(np.concatenate(train), minlength=ITEMS + 1)[1:]
    listed = [item for best, _, _ in users for item in best]
    pairs = [(set(a), set(b)) for (a, _, _), (b, _, _) in itertools.combinations(users, 2)]
    expected = {
        f"recall@{k}": np.mean([target in best for best, target, _ in users]),
        f"precision@{k}": np.mean([(target in best) / k for best, target, _ in users]),
        f"map@{k}": np.mean([1 / (best.index(t) + 1) if t in best else 0 for best, t, _ in users]),
        f"novelty@{k}": np.mean([len(set(best) - history) / k for best, _, history in users]),
        f"coverage@{k}": len(set(listed)) / ITEMS,
        f"popularity_bias@{k}": np.mean(counts[np.array(listed) - 1]) / counts.mean(),
        f"diversity@{k}": np.mean([1 - len(a & b) / len(a | b) for a, b in pairs if a | b]),
    }
    assert {name: actual[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("seen_filter", FILTERS)
def test_agrees_with_the_exact_ranks(ragged_dataset: SequenceDataset, seen_filter: str) -> None:
    result = evaluate(ragged_dataset, seen_filter, 10)
    ranks = result.metrics()
    assert 0 < ranks["hr@10"] < 1
    assert (result.lists["recall@10"], result.lists["hr@10"]) == pytest.approx((ranks["hr@10"],) * 2)
    assert result.lists["ndcg@10"] == pytest.approx(ranks["ndcg@10"])


def test_batches_change_no_digit_and_ranks_stay(ragged_dataset: SequenceDataset) -> None:
    one, other = (evaluate(ragged_dataset, "history", 5, size) for size in (3, 1000))
    assert one.lists == other.lists
    loader = EvaluationLoader(ragged_dataset, make_split(ragged_dataset).test_targets, WINDOW, 16)
    alone = Evaluator(loader, ITEMS, HistoryFilter(), Collectives())(score)
    assert alone.lists == {}
    assert torch.equal(alone.histogram.counts, one.histogram.counts)


class Recorded(Collectives):
    """A second process, whose users were collected before, answers every call."""

    def __init__(self, other: TopLists) -> None:
        super().__init__()
        metrics = other.metrics
        sums = metrics.sums, metrics.users, metrics.recommended, other.compared
        self.sums = iter([each.clone() for each in sums])

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(next(self.sums))


def test_two_processes_equal_one() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, users = torch.rand(9, ITEMS, generator=generator), torch.arange(1, 10)
    targets = torch.randint(1, ITEMS + 1, (9,), generator=generator)
    whole, mine, other = (TopLists(4, ITEMS, users, torch.arange(ITEMS)) for _ in range(3))
    for lists, rows in ((whole, slice(None)), (mine, slice(0, 9, 2)), (other, slice(1, 9, 2))):
        lists.add(scores[rows], users[rows], targets[rows], SeenItems.none(), padded(targets[rows, None]))
    assert mine.compute(Recorded(other)) == whole.compute(Collectives())


def plain_metrics(best: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """Of one user, by sets and loops."""
    hits = [item in relevant for item in best]
    share = [sum(hits[: rank + 1]) / (rank + 1) for rank in range(len(best))]
    possible = max(1, min(len(relevant), k))
    return {
        f"recall@{k}": sum(hits) / max(1, len(relevant)),
        f"precision@{k}": sum(hits) / k,
        f"ndcg@{k}": sum(hit / np.log2(rank + 2) for rank, hit in enumerate(hits))
        / sum(1 / np.log2(rank + 2) for rank in range(possible)),
        f"map@{k}": sum(part for part, hit in zip(share, hits) if hit) / possible,
        f"mrr@{k}": 1 / (hits.index(True) + 1) if any(hits) else 0.0,
        f"hr@{k}": float(any(hits)),
    }


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("levels", [3, 1000])
def test_lists_are_those_of_a_sort(k: int, levels: int) -> None:
    """Few levels of scores: ties everywhere. k = 40: more than the catalogue. Some users have no target."""
    generator = torch.Generator().manual_seed(k + levels)
    users = torch.arange(50)
    scores = torch.randint(0, levels, (50, ITEMS), generator=generator).float()
    targets = torch.randint(0, ITEMS + 1, (50,), generator=generator)
    targets[::7] = 0
    removed = torch.randint(0, ITEMS + 1, (50, 4), generator=generator)
    lists = TopLists(k, ITEMS, users)
    for some in users.split(20):
        lists.add(scores[some], some, targets[some], padded(removed[some]), padded(removed[some]))
    expected = []
    for user in range(50):
        candidates = sorted(set(range(1, ITEMS + 1)) - set(removed[user].tolist()))
        best = sorted(candidates, key=lambda item: (-float(scores[user, item - 1]), item))[:k]
        expected.append(plain_metrics(best, {int(targets[user])} - {0}, k))
    actual = lists.compute(Collectives())
    for name in expected[0]:
        assert actual[name] == pytest.approx(np.mean([each[name] for each in expected])), name


def test_no_targets_at_all() -> None:
    lists, none = TopLists(3, ITEMS, torch.tensor([1, 2])), torch.zeros(2, dtype=torch.int64)
    lists.add(torch.rand(2, ITEMS), torch.tensor([1, 2]), none, SeenItems.none(), SeenItems.none())
    lists.add(torch.rand(0, ITEMS), none[:0], none[:0], SeenItems.none(), SeenItems.none())
    metrics = lists.compute(Collectives())
    assert (metrics["recall@3"], metrics["ndcg@3"], metrics["novelty@3"]) == (0, 0, 1)


def test_a_process_without_users() -> None:
    users = torch.tensor([1, 2])
    empty, other = TopLists(3, ITEMS, users), TopLists(3, ITEMS, users)
    other.add(torch.rand(2, ITEMS), users, torch.tensor([4, 5]), SeenItems.none(), padded(torch.zeros(2, 0).long()))
    assert empty.compute(Recorded(other))["coverage@3"] > 0
    assert TopLists(3, ITEMS, users[:0]).compute(Collectives())["recall@3"] == 0


def test_scores_that_are_no_number_are_no_candidates() -> None:
    scores, user = torch.tensor([[torch.nan, 1.0, -torch.inf, 2.0]]), torch.tensor([7])
    lists = TopLists(3, 4, user)
    lists.add(scores, user, torch.tensor([1]), padded(torch.tensor([[4, 0]])), padded(torch.tensor([[4]])))
    assert lists.compared.tolist() == [[2, 0, 0]]


@pytest.mark.parametrize("processes", [1, 2])
def test_diversity_of_many_users_compares_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(list_metrics, "MAX_DIVERSITY_LISTS", 300)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2000, ITEMS, generator=generator).topk(5).indices + 1
    users = torch.arange(1, 2 * len(drawn), 2)
    collectors = [TopLists(5, ITEMS, users) for _ in range(processes)]
    for number, rows in enumerate(torch.randperm(2000, generator=generator).split(128)):
        given = drawn[rows], users[rows], drawn[rows, 0], SeenItems.none()
        collectors[number % processes].add_lists(*given)
    found = collectors[0].compute(Recorded(collectors[1]) if processes == 2 else Collectives())["diversity@5"]
    assert found == diversity(drawn[torch.arange(300) * 2000 // 300])
    assert found == pytest.approx(diversity(drawn), abs=0.01)
    monkeypatch.undo()
    every = TopLists(5, ITEMS, users)
    every.add_lists(drawn, users, drawn[:, 0], SeenItems.none())
    assert every.compute(Collectives())["diversity@5"] == diversity(drawn)
