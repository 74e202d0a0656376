"""Conditions and tables of the final report."""

from __future__ import annotations

import dataclasses

import pytest

from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.run.summary import conditions
from tiny_models import settings

TOWER = {"main_module": "TwoTower", "item_tower.query_module": "HSTU"}


@pytest.mark.parametrize(
    ("choices", "times", "shown_time"),
    [
        ({"main_module": "SASRec"}, True, False),
        ({"main_module": "HSTU"}, True, True),
        ({"main_module": "HSTU"}, False, False),
        ({"main_module": "HSTU", "hstu.enable_relative_time_bias": False}, True, False),
        ({"main_module": "HSTU", "hstu.enable_relative_attention_bias": False}, True, False),
        (TOWER, True, True),
    ],
)
def test_next_time_is_shown_where_the_encoder_sees_times(
    ragged_dataset: SequenceDataset, choices: dict[str, object], times: bool, shown_time: bool
) -> None:
    data = ragged_dataset if times else dataclasses.replace(ragged_dataset, timestamps=None)
    shown = conditions(settings(**choices, next_time="hidden", seen_filter="window"), data)
    assert shown == "seen filter 'window'" + ", next_time 'hidden'" * shown_time
