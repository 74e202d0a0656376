"""Origin of a NaN that depends on the random draws of a step: dropout, negatives, masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.debug import NonFiniteError
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings

STEP = 3
SAMPLED = {"sampling_strategy": "local", "num_negatives": 4, "item_l2_norm": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("model.sequence.postprocessor", {"dropout_rate": 0.5, "loss_module": "CE"}),
    "dropout of the encoder": (
        "model.sequence.postprocessor",
        {"sasrec.ffn_dropout_rate": 0.5, "loss_module": "CE"},
    ),
    "negatives of a block": ("criterion.loss", {**SAMPLED, "negatives_sharing": "block"}),
    "negatives of a position": ("criterion.loss", {**SAMPLED, "negatives_sharing": "position"}),
    "masks": ("model.mask_embedding", {"objective": "masked", "mask_probability": 0.3, "loss_module": "CE"}),
}


def make_trainer(dataset: SequenceDataset, choices: dict[str, Any]) -> Trainer:
    """Its batches are those of a process that is not the first: their targets are numbered from 640 on."""
    trainer = Trainer(
        settings(local_batch_size=8, num_epochs=1, **choices), dataset, make_split(dataset), Collectives()
    )
    batches = trainer.loader.epoch

    def later(epoch: int, start: int = 0) -> Iterator[LoadedBatch]:
        return (dataclasses.replace(batch, first_row=8, first_token=640) for batch in batches(epoch, start))

    trainer.loader.epoch = later  # type: ignore[method-assign]
    return trainer


def tensors(inputs: tuple) -> list[torch.Tensor]:
    return [each.detach().clone() for each in inputs if isinstance(each, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_run_again_with_its_own_draws(ragged_dataset: SequenceDataset, case: str) -> None:
    name, choices = CASES[case]
    seen: list[list[torch.Tensor]] = []
    healthy, broken = (make_trainer(ragged_dataset, choices) for _ in range(2))
    module = healthy.task.get_submodule(name)
    module.register_forward_hook(lambda _, inputs, output: seen.append(tensors(inputs)))
    healthy.train(max_steps=STEP)
    fatal = seen[STEP - 1]
    assert sum(same(fatal, each) for each in seen) == 1

    def fail(_: torch.nn.Module, inputs: tuple, output: Any) -> Any:
        """NaN for the inputs of that one step, as they were drawn."""
        if not same(fatal, tensors(inputs)):
            return None
        if isinstance(output, torch.Tensor):
            return output * torch.nan
        return output._replace(sum=output.sum * torch.nan)

    broken.task.get_submodule(name).register_forward_hook(fail)
    with pytest.raises(NonFiniteError, match=rf"nan at step {STEP}: .* not finite is that of {name};"):
        broken.train()


def test_of_several_steps_the_first_is_named(ragged_dataset: SequenceDataset) -> None:
    """An accelerator is asked for its losses every few steps alone."""
    trainer = make_trainer(ragged_dataset, {"loss_module": "CE"})
    batches = [batch for batch, _ in zip(trainer.loader.epoch(0), range(4))]
    results = [trainer.run_step(batch) for batch in batches]
    for place in (1, 3):
        results[place] = dataclasses.replace(results[place], loss=torch.tensor(torch.nan))
    with pytest.raises(NonFiniteError, match="nan at step 2: the outputs of all modules are finite, so"):
        trainer.account([*zip(batches, results)])
