"""Steps on batches that are filled up: the numbers of plain steps, without a look at any number on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generative_recommenders.data.splits import make_split
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.ops import dispatch, embedding
from generative_recommenders.training.captured_step import CapturedStep
from generative_recommenders.training.step import TrainingStep
from generative_recommenders.training.trainer import Trainer
from tiny_data import ragged_sequences, tiny_dataset
from tiny_models import settings

CHOICES = {
    "softmax": {},
    "HSTU": {"main_module": "HSTU"},
    "rated": {"input_preprocessor": "CombinedItemAndRating"},
    "block": {"negatives_sharing": "block", "negatives_block_size": 4},
    "popularity": {"sampling_strategy": "popularity", "log_q_correction": True},
    "catalogue": {"loss_module": "CE"},
    "several positives": {"num_positives": 2},
    "lazy": {"optimizer": "lazy_adamw"},
    "rowwise": {"optimizer": "rowwise_adagrad"},
    "warm-up": {"num_warmup_steps": 5, "max_grad_norm": 0.1},
}


BASE = {
    "local_batch_size": 4,
    "num_negatives": 5,
    "temperature": 0.2,
    "random_seed": 3,
    "sampling_strategy": "local",
}


def trainer(folder: Path, device: torch.device, **choices: object) -> Trainer:
    dataset = tiny_dataset(folder, ragged_sequences(13, 20, seed=1))
    chosen = settings(**{**BASE, **choices})
    return Trainer(chosen, dataset, make_split(dataset, "leave_one_out"), Collectives(device))


def distance(a: Trainer, b: Trainer) -> float:
    """The mean over all parameters; biases of keys, whose gradients are nothing but rounding, may lie further apart."""
    pairs = zip(a.model.parameters(), b.model.parameters())
    return float(torch.cat([(p - q).detach().abs().flatten() for p, q in pairs]).mean())


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_tokens_that_fill_up_change_no_number(choices: dict, tmp_path: Path) -> None:
    plain = trainer(tmp_path, torch.device("cpu"), **choices)
    filled = trainer(tmp_path, torch.device("cpu"), **choices)
    step = CapturedStep(filled.task, filled.step.optimizer, filled.collectives, rows=4)
    for number, batch in enumerate([*plain.loader.epoch(0), *plain.loader.epoch(1)]):
        expected = plain.step(batch, number)
        tokens = step.fill(batch, number)
        loss, targets, _ = step.padded_step(tokens)
        assert step.inputs is not None and tokens % step.inputs.granule == 0 and tokens >= batch.global_tokens
        assert float(targets) == float(expected.targets)
        torch.testing.assert_close(loss, expected.loss.detach())
    assert distance(filled, plain) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw", "rowwise_adagrad"])
def test_rows_of_an_accelerator_are_padded_and_change_no_number(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "DENSE_SHARE", 0)  # rows are gathered, however small the table
    choices = {"optimizer": optimizer, "max_grad_norm": 0.5}
    unique, padded = (trainer(tmp_path, torch.device("cpu"), **choices) for _ in range(2))
    for number, batch in enumerate([*unique.loader.epoch(0), *unique.loader.epoch(1)]):
        expected = unique.step(batch, number)
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "waits", lambda x: True)
            found = padded.step(batch, number)
        torch.testing.assert_close(found.loss, expected.loss)
    assert distance(padded, unique) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("gathers", [False, True], ids=["whole table", "gathered rows"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_graphs_give_the_numbers_of_plain_steps(
    choices: dict, gathers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "DENSE_SHARE", 0 if gathers else 1_000_000)
    device = torch.device("cuda")
    plain, captured = trainer(tmp_path, device, **choices), trainer(tmp_path, device, **choices)
    plain.step = TrainingStep(plain.task, plain.step.optimizer, plain.collectives)
    assert isinstance(captured.step, CapturedStep)
    for epoch in range(6):
        for batch in plain.loader.epoch(epoch):
            expected, found = plain.run_step(batch), captured.run_step(batch)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert distance(captured, plain) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "kernel by kernel"])
@pytest.mark.parametrize("encoder", ["SASRec", "HSTU", "TwoTower", "DiffTransformer"])
def test_a_step_does_not_wait_for_the_device(encoder: str, captured: bool, tmp_path: Path) -> None:
    made = trainer(tmp_path, torch.device("cuda"), main_module=encoder)
    if not captured:
        made.step = TrainingStep(made.task, made.step.optimizer, made.collectives)
    batch = next(iter(made.loader.epoch(0)))
    for _ in range(3):  # kernels are compiled, the step is captured
        made.run_step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
