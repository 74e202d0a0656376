"""Estimate of the activations that a step keeps for its backward pass."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.run.model_summary import kept_activations
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings

HSTU = {"main_module": "HSTU", "sampling_strategy": "local", "num_negatives": 4}
MOL = {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"}
WIDER = {"item_embedding_dim": 16, "hstu.dqk": 8, "hstu.dv": 8}


def estimate(dataset: SequenceDataset, **choices: object) -> float:
    chosen = settings(**{**HSTU, **choices})
    trainer = Trainer(chosen, dataset, make_split(dataset, "leave_one_out"), Collectives(torch.device("cpu")))
    return kept_activations(trainer)


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        ({"hstu.num_blocks": 8}, 2.5),
        ({"hstu.num_heads": 4}, 1.1),
        (WIDER, 1.5),
        ({"max_sequence_length": 14}, 1.9),
        ({"local_batch_size": 256}, 1.9),
        ({"num_negatives": 64}, 1.1),
        (MOL, 1.5),
        ({**MOL, "mol.query_dot_product_groups": 4}, 1.8),
    ],
    ids=str,
)
def test_it_grows_with_what_a_step_computes(
    ragged_dataset: SequenceDataset, change: dict[str, object], at_least: float
) -> None:
    assert estimate(ragged_dataset, **change) > at_least * estimate(ragged_dataset)
