"""The evaluator against a brute-force ranking, whatever the chunks, batches and number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from generative_recommenders.build.parts import build_model
from generative_recommenders.config.registry import SEEN_FILTERS
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation import evaluator as evaluator_module
from generative_recommenders.evaluation.evaluator import EvaluationResult, Evaluator
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation, catalogue_scores
from generative_recommenders.evaluation.seen_filters import HistoryFilter, NoFilter
from tiny_data import SECONDS_BETWEEN, tiny_dataset
from tiny_models import catalogue, contracted, settings

WINDOW, THRESHOLD = 6, 4.0
DAYS = 9 * SECONDS_BETWEEN / 86400
FILTERS = {
    name: SEEN_FILTERS[name].build({"days": DAYS} if name == "cooldown" else {}, {})
    for name in contracted(SEEN_FILTERS)
}


def scores_of(users: torch.Tensor, num_items: int) -> torch.Tensor:
    """Scores with many ties, a function of the user and the item alone."""
    items = torch.arange(1, num_items + 1)
    return ((users[:, None] * 31 + items * 17) % 13).float()


def score(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return scores_of(batch["user_ids"], 30)


def brute_force_ranks(dataset: SequenceDataset, split: Split, seen_filter: str) -> dict[int, int]:
    """Rank of every test user's target: sort all candidates by (score down, id up) and look where it is."""
    ranks = {}
    for user in np.flatnonzero(split.test_targets >= 0).tolist():
        history = dataset.items[dataset.offsets[user] :][: split.test_targets[user]].tolist()
        target = int(dataset.items[dataset.offsets[user] + split.test_targets[user]])
        seen = {
            "history": set(history), "window": set(history[-WINDOW:]), "none": set(),
            "cooldown": set(history[-8:]),  # an event is SECONDS_BETWEEN after the one before it
        }[seen_filter]  # fmt: skip
        missed = split.unseen_test_targets[user] or target in seen
        scores = scores_of(torch.tensor([user + 1]), dataset.num_items)[0].tolist()
        items = [i for i in range(1, dataset.num_items + 1) if i not in seen]
        order = sorted(items, key=lambda item: (-scores[item - 1], item))
        ranks[user] = dataset.num_items + 1 if missed else order.index(target) + 1
    return ranks


def evaluate(
    dataset: SequenceDataset, seen_filter: str, batch_size: int = 16, keep: bool = False, **options
) -> EvaluationResult:
    split = make_split(dataset)
    loader = EvaluationLoader(dataset, split.test_targets, WINDOW, batch_size, **options)
    unseen = torch.from_numpy(split.unseen_test_targets)
    evaluator = Evaluator(loader, dataset.num_items, FILTERS[seen_filter], Collectives(), unseen, THRESHOLD)
    if keep:
        evaluator.kept = [users.to(torch.device("cpu")) for users in evaluator.prepared()]
    return evaluator(score)


def metrics_of(ranks: list[int]) -> dict[str, float]:
    hits = {k: [rank <= k for rank in ranks] for k in (1, 10)}
    gains = [1 / math.log2(rank + 1) if rank <= 10 else 0.0 for rank in ranks]
    return {
        "hr@1": sum(hits[1]) / len(ranks),
        "hr@10": sum(hits[10]) / len(ranks),
        "ndcg@10": sum(gains) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
    }


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("seen_filter", FILTERS)
def test_equals_brute_force(ragged_dataset: SequenceDataset, seen_filter: str, keep: bool) -> None:
    split = make_split(ragged_dataset)
    ranks = brute_force_ranks(ragged_dataset, split, seen_filter)
    result = evaluate(ragged_dataset, seen_filter, keep=keep)
    counts = np.bincount([rank - 1 for rank in ranks.values()], minlength=31)
    assert result.histogram.counts[0].tolist() == counts.tolist()
    for name, value in metrics_of([*ranks.values()]).items():
        assert result.metrics()[name] == pytest.approx(value)
    at = ragged_dataset.offsets[:-1] + split.test_targets
    high_rated = [rank for user, rank in ranks.items() if ragged_dataset.ratings[at[user]] >= THRESHOLD]
    assert 0 < len(high_rated) < len(ranks)
    for name, value in metrics_of(high_rated).items():
        assert result.high_rated_metrics()[name] == pytest.approx(value)


def test_a_target_that_the_filter_takes_out_is_a_counted_miss(ragged_dataset: SequenceDataset) -> None:
    split = make_split(ragged_dataset)
    names = ("history", "window", "none")
    results = {each: evaluate(ragged_dataset, each) for each in names}
    repeated, in_window = 0, 0
    for user in np.flatnonzero(split.test_targets >= 0).tolist():
        events = ragged_dataset.items[ragged_dataset.offsets[user] :][: split.test_targets[user] + 1].tolist()
        repeated += events[-1] in events[:-1]
        in_window += events[-1] in events[-1 - WINDOW : -1]
    assert repeated > in_window > 0
    assert [results[each].removed_targets for each in names] == [repeated, in_window, 0]
    misses = [int(results[each].histogram.counts[0, 30]) for each in names]
    unseen = int(split.unseen_test_targets.sum())
    assert misses == [repeated + unseen, in_window + unseen, unseen]


@pytest.mark.parametrize("seen_filter", FILTERS)
def test_chunks_and_batches_change_nothing(monkeypatch, ragged_dataset, seen_filter: str) -> None:
    expected = evaluate(ragged_dataset, seen_filter).histogram.counts
    for batch_size, max_scores in ((1, 1 << 25), (7, 65), (1000, 1), (1000, 100)):
        monkeypatch.setattr(evaluator_module, "MAX_SCORES", max_scores)
        actual = evaluate(ragged_dataset, seen_filter, batch_size).histogram.counts
        assert torch.equal(actual, expected)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch, ragged_dataset: SequenceDataset) -> None:
    monkeypatch.setattr(evaluator_module, "MAX_SCORES", 5 * 30)
    sizes = []

    def counting(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(batch["user_ids"]))
        assert {len(values) for values in batch.values()} == {sizes[-1]}
        return score(batch)

    targets = make_split(ragged_dataset).test_targets
    loader = EvaluationLoader(ragged_dataset, targets, WINDOW, 32)
    Evaluator(loader, 30, HistoryFilter(), Collectives())(counting)
    assert max(sizes) == 5
    assert sum(sizes) == (targets >= 0).sum()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_add_up(ragged_dataset: SequenceDataset, world_size: int) -> None:
    parts = [
        evaluate(ragged_dataset, "history", 7, rank=rank, world_size=world_size).histogram.counts
        for rank in range(world_size)
    ]
    assert torch.equal(sum(parts), evaluate(ragged_dataset, "history").histogram.counts)


def test_ranks_are_summed_over_processes(ragged_dataset: SequenceDataset) -> None:
    class Second(Collectives):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            sent.append(tensor.clone())
            return tensor

    class First(Collectives):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.add_(sent.pop(0))

    sent: list[torch.Tensor] = []
    targets = make_split(ragged_dataset).test_targets
    loaders = [EvaluationLoader(ragged_dataset, targets, WINDOW, 16, rank, 2) for rank in range(2)]
    Evaluator(loaders[1], 30, HistoryFilter(), Second())(score)
    result = Evaluator(loaders[0], 30, HistoryFilter(), First())(score)
    alone = EvaluationLoader(ragged_dataset, targets, WINDOW, 16)
    expected = Evaluator(alone, 30, HistoryFilter(), Collectives())(score)
    assert torch.equal(result.ranks, expected.ranks)
    assert torch.equal(result.histogram.counts, expected.histogram.counts)
    assert result.removed_targets == expected.removed_targets


def test_partial_evaluation_draws_its_users_anew_by_the_seed(ragged_dataset: SequenceDataset) -> None:
    def users(draw: int, random_seed: int = 42) -> list[int]:
        chosen = settings(max_sequence_length=WINDOW, eval_batch_size=5, random_seed=random_seed)
        evaluation = ModelEvaluation(chosen, ragged_dataset, make_split(ragged_dataset), Collectives())
        model = build_model(chosen, catalogue(num_items=30, counts=torch.ones(30)))
        seen: list[int] = []
        score = evaluation.seen_filter.removed

        def removed(batch, histories):
            seen.extend(batch["user_ids"].tolist())
            return score(batch, histories)

        evaluation.seen_filter.removed = removed
        assert evaluation.validation(model, 3, draw=draw).targets == len(seen) == 15
        return seen

    first = users(0)
    assert first == sorted(first) == users(0)
    assert len({tuple(each) for each in (first, users(1), users(2), users(0, random_seed=7))}) == 4
    assert len({*first, *users(1), *users(2), *users(3)}) > 30


def test_unseen_targets_are_misses(ragged_dataset: SequenceDataset) -> None:
    loader = EvaluationLoader(ragged_dataset, make_split(ragged_dataset).test_targets, WINDOW, 16)
    everyone = torch.ones(ragged_dataset.num_users, dtype=torch.bool)
    result = Evaluator(loader, 30, HistoryFilter(), Collectives(), everyone)(score)
    assert result.histogram.counts[0, 30] == result.histogram.total()
    assert result.metrics()["hr@500"] == 0


def test_without_ratings_nothing_is_highly_rated(tmp_path) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2, 3], [3, 1, 2]], ratings=False)
    loader = EvaluationLoader(dataset, make_split(dataset).test_targets, WINDOW, 16)
    evaluator = Evaluator(loader, 3, NoFilter(), Collectives())
    assert evaluator(lambda batch: scores_of(batch["user_ids"], 3)).high_rated_metrics() == {}


def test_queries_of_no_users_are_as_wide_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(settings(), catalogue()).eval()

    def distances(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Half of -|q - w|^2 but for the query's own length, a product of one column more."""
        ones, lengths = states.new_ones(len(states), 1), weight.square().sum(1, keepdim=True)
        return torch.cat([states, ones], 1), torch.cat([weight, -lengths / 2], 1)

    monkeypatch.setattr(model.similarity, "operands", distances)
    score = catalogue_scores(model)
    # A shard is scored by the queries of all processes together, also of those that have no users left.
    assert score.queries({}).shape == (0, score.items.shape[1])
