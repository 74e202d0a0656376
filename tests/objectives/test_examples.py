"""Training examples of a batch: several positives a position, weights by rating, half stars."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.build.parts import build_task
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.causal import CausalLastObjective, CausalObjective
from generative_recommenders.objectives.masked import MaskColumns, MaskedObjective
from tiny_models import catalogue, settings

COLUMNS = {
    "user_ids": torch.tensor([1, 2, 3]),
    "lengths": torch.tensor([4, 1, 3]),
    "item_ids": torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 0]]),
    "ratings": torch.tensor([[1.0, 4.5, 3.0, 0.5], [5.0, 0, 0, 0], [2.0, -1.0, 2.5, 0]]),
}
GENERATOR = torch.Generator()


def test_the_next_items_are_the_positives() -> None:
    example = CausalObjective(num_positives=3).example(COLUMNS, GENERATOR)
    assert example.past_ids.tolist() == [1, 2, 3, 6, 7]
    assert example.targets.tolist() == [[2, 3, 4], [3, 4, 0], [4, 0, 0], [7, 8, 0], [8, 0, 0]]
    assert torch.equal(example.weights, (example.targets > 0).float())
    assert example.ratings.tolist() == [[4.5, 3, 0.5], [3, 0.5, 0], [0.5, 0, 0], [-1, 2.5, 0], [2.5, 0, 0]]


@pytest.mark.parametrize("objective", ["causal", "causal_last"])
def test_negatives_do_not_depend_on_the_number_of_processes(ragged_dataset: SequenceDataset, objective: str) -> None:
    """Also where sampling leaves rows without a target."""
    task = build_task(
        settings(objective=objective, sampling_strategy="local", num_negatives=6), catalogue(num_items=30)
    )
    stops = make_split(ragged_dataset).train_stops

    def negatives(rank: int, world_size: int) -> torch.Tensor:
        loader = SequenceLoader(ragged_dataset, stops, 7, 12 // world_size, 5, 0.1, rank, world_size)
        prepared = task.prepare(next(loader.epoch(0)), 0)
        assert prepared.negatives is not None
        return prepared.negatives.ids

    assert torch.equal(torch.cat([negatives(rank, 3) for rank in range(3)]), negatives(0, 1))


def test_more_positives_than_events() -> None:
    example = CausalObjective(num_positives=9).example(COLUMNS, GENERATOR)
    assert example.targets.shape == (5, 9)
    assert (example.targets > 0).sum(1).tolist() == [3, 2, 1, 2, 1]


def test_one_positive_is_a_vector_and_half_stars_stay() -> None:
    example = CausalObjective().example(COLUMNS, GENERATOR)
    assert example.targets.tolist() == [2, 3, 4, 7, 8]
    assert example.ratings.tolist() == [4.5, 3.0, 0.5, -1.0, 2.5]


@pytest.mark.parametrize("positives", [1, 2])
def test_weights_by_rating(positives: int) -> None:
    plain = CausalObjective(num_positives=positives).example(COLUMNS, GENERATOR)
    example = CausalObjective(positives, "rating").example(COLUMNS, GENERATOR)
    assert torch.equal(example.weights, plain.weights * plain.ratings.clamp(min=0))
    without = {name: values for name, values in COLUMNS.items() if name != "ratings"}
    with pytest.raises(UserError, match="no ratings"):
        CausalObjective(target_weights="rating").example(without, GENERATOR)


def test_the_last_position_alone() -> None:
    example = CausalLastObjective(2).example(COLUMNS, GENERATOR)
    assert example.targets.tolist() == [[4, 0], [8, 0]]


class Hides(MaskedObjective):
    """Given places are hidden."""

    def __init__(self, *places: tuple[int, int]) -> None:
        self.places = places

    def choose(self, real: torch.Tensor, draws: Draws = None) -> tuple[torch.Tensor, MaskColumns]:
        hidden = torch.zeros_like(real)
        for place in self.places:
            hidden[place] = True
        return hidden, (real.long() * 0, real.long() * 0)


def test_a_hidden_item_has_the_time_of_what_is_seen_before_it() -> None:
    times = torch.tensor([[10, 20, 30, 40], [50, 0, 0, 0], [60, 70, 80, 0]])
    columns = {**COLUMNS, "timestamps": times}
    hidden = Hides((0, 1), (0, 2), (2, 0))
    events = hidden.example(columns, GENERATOR).features.past_events
    assert events["timestamps"].tolist() == [[10, 10, 10, 40], [50, 0, 0, 0], [70, 70, 80, 0]]
    # the own time of a hidden item is its next time; elsewhere what the input says, 0 past the end
    following = events["next_timestamps"]
    assert following[0].tolist() == [10, 20, 30, 0]
    assert following[1, 0] == 0 and following[2].tolist()[:3] == [60, 80, 0]
    assert events["ratings"][0].tolist() == [1.0, 0.0, 0.0, 0.5]
