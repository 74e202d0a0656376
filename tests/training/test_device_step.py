"""Training steps on the meta device, whose tensors have no values: a step that reads one, as a GPU would have to be
waited for, fails here, and so does one that mixes devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from generative_recommenders.config.registry import ENCODERS, LOSSES
from generative_recommenders.data.splits import make_split
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.ops import dispatch, embedding
from generative_recommenders.ops.attention import kernels
from generative_recommenders.training.captured_step import CapturedStep, StepInputs
from generative_recommenders.training.trainer import Trainer
from tiny_data import ragged_sequences, tiny_dataset
from tiny_models import settings

PACKAGE = "generative_recommenders."  # and no plug-in of another test
META = torch.device("meta")
BASE = {"local_batch_size": 4, "num_negatives": 5, "sampling_strategy": "local", "negatives_sharing": "block"}
CASES: dict[str, dict[str, object]] = {
    **{part.name: {"main_module": part.name} for part in ENCODERS.parts() if part.make.__module__.startswith(PACKAGE)},
    **{part.name: {"loss_module": part.name} for part in LOSSES.parts() if part.make.__module__.startswith(PACKAGE)},
    **{f"negatives of each {sharing}": {"negatives_sharing": sharing} for sharing in ("position", "batch")},
    "several positives": {"num_positives": 2},
    "popularity": {"sampling_strategy": "popularity", "log_q_correction": True},
    "lazy": {"optimizer": "lazy_adamw"},
    "rowwise": {"optimizer": "rowwise_adagrad"},
    "clipped": {"num_warmup_steps": 5, "max_grad_norm": 0.1},
    "rated": {"input_preprocessor": "CombinedItemAndRating"},
    "MoL": {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The meta device taken for a GPU; names of the kernels, none of which is started."""
    names: list[str] = []

    def launch(kernel, *args, **options):
        names.append(kernel.fn.__name__)
        assert {x.device for x in args if isinstance(x, torch.Tensor)} == {META}

    monkeypatch.setattr(type(kernels.forward), "__getitem__", lambda kernel, grid: partial(launch, kernel))
    monkeypatch.setattr(dispatch, "takes_kernels", lambda x: dispatch.fast())
    monkeypatch.setattr(dispatch, "since_ampere", lambda x: True)
    monkeypatch.setattr(dispatch, "takes_fbgemm", lambda x: False)
    # torch has no autocast for this device, which leaves float32
    monkeypatch.setattr(dispatch, "autocast", lambda at, dtype: nullcontext())
    monkeypatch.setattr(dispatch, "computed_dtype", lambda x: x.dtype)
    yield names


@pytest.mark.parametrize("gathers", [False, True], ids=["whole table", "gathered rows"])
@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_a_step_reads_no_value_of_the_device(
    choices: dict[str, object], gathers: bool, tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "DENSE_SHARE", 0 if gathers else 1_000_000)
    dataset = tiny_dataset(tmp_path, ragged_sequences(13, 20, seed=1))
    trainer = Trainer(settings(**{**BASE, **choices}), dataset, make_split(dataset, "leave_one_out"), Collectives(META))
    assert trainer.task.fixed_shapes
    step = CapturedStep(trainer.task, trainer.step.optimizer, trainer.collectives, rows=4)
    batch = next(trainer.loader.epoch(0))
    columns = {name: torch.zeros_like(x, device=META) for name, x in batch.columns.items()}
    step.inputs = mock.Mock(
        spec=StepInputs,
        columns=columns,
        key=torch.zeros((), dtype=torch.int64, device=META),
        rate=torch.zeros((), device=META),
    )
    # torch's fused optimizers take no meta tensors
    monkeypatch.setattr(step.optimizer.dense, "step", lambda: None)
    loss, targets, _ = step.padded_step(tokens=32)
    assert {"forward", "backward_queries", "backward_keys"} <= {*launched}
    assert loss.device == targets.device == META
    assert all(p.grad is not None and p.grad.device == META for p in trainer.model.sequence.parameters())
