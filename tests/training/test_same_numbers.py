"""Two processes with half the batch each give the losses of one, and at equal weights exactly its metrics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from worker_processes import quick_start

from generative_recommenders.data.sequence_dataset import SequenceDataset
from generative_recommenders.data.splits import make_split
from generative_recommenders.training.distributed import process_collectives
from generative_recommenders.training.settings import RunSettings, SasrecSettings, TrainSettings
from generative_recommenders.training.train import Trainer

GLOBAL_BATCH, STEPS = 8, 50
COMMON = TrainSettings(
    dataset_name="tiny", max_sequence_length=12, item_embedding_dim=8, dropout_rate=0.0, num_negatives=6,
    num_warmup_steps=10, learning_rate=3e-3, eval_batch_size=5, list_metrics_k=4,
)  # fmt: skip
CASES = {
    "full cross-entropy": {"loss_module": "CE", "sampling_strategy": "none"},
    "block": {"sampling_strategy": "local", "negatives_sharing": "block", "negatives_block_size": 16},
    "in-batch": {"sampling_strategy": "in-batch", "item_l2_norm": True},
}


def settings_of(case: str, world_size: int) -> RunSettings:
    train = dataclasses.replace(COMMON, local_batch_size=GLOBAL_BATCH // world_size, **CASES[case])
    return RunSettings(train=train, sasrec=SasrecSettings(ffn_dropout_rate=0.0, ffn_hidden_dim=8))


def losses_and_trainer(dataset: SequenceDataset, case: str) -> tuple[list[float], Trainer]:
    """The losses of the first steps, by this process's share of the batches."""
    group = process_collectives("cpu")
    trainer = Trainer(settings_of(case, group.world_size), dataset, make_split(dataset), group)
    losses: list[float] = []
    while len(losses) < STEPS:
        batches = trainer.loader.epoch(trainer.progress.epoch)
        losses += [
            float(trainer.run_step(batch).loss) for batch, _ in zip(batches, range(STEPS - len(losses)))
        ]
        trainer.progress.epoch += 1
    return losses, trainer


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    model = trainer.model
    return [
        trainer.evaluation.validation(model).all_metrics(),
        trainer.evaluation.validation(model, max_batches=3).metrics(),
        trainer.evaluation.test(model).all_metrics(),
    ]


def member(rank: int, folder: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=2)
    found = {}
    for number, case in enumerate(CASES):
        losses, trainer = losses_and_trainer(SequenceDataset.open(folder), case)
        own = metrics(trainer)
        trainer.model.load_state_dict(torch.load(f"{results}/weights-{number}.pt"))
        found[case] = {"losses": losses, "own metrics": own, "metrics": metrics(trainer)}
    Path(f"{results}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(
    ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, list[dict]]:
    """What one process found, and what each of two did, by case."""
    folder = tmp_path_factory.mktemp("same")
    alone = {}
    for number, case in enumerate(CASES):
        losses, trainer = losses_and_trainer(ragged_dataset, case)
        torch.save(trainer.model.state_dict(), folder / f"weights-{number}.pt")
        alone[case] = {"losses": losses, "metrics": metrics(trainer)}
    arguments = str(ragged_dataset.folder), str(folder)
    members = [quick_start().Process(target=member, args=(rank, *arguments)) for rank in range(2)]
    for each in members:
        each.start()
    for each in members:
        each.join(timeout=120)
    assert [each.exitcode for each in members] == [0, 0]
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(measured: tuple[dict, list[dict]], case: str) -> None:
    alone, both = measured
    assert both[0][case]["losses"] == both[1][case]["losses"]
    assert both[0][case]["losses"] == pytest.approx(alone[case]["losses"], rel=1e-4, abs=1e-5)
    assert len(set(alone[case]["losses"])) == STEPS
    assert alone[case]["losses"][-1] < alone[case]["losses"][0]  # the weights did move


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_exactly_those_of_one_process(measured: tuple[dict, list[dict]], case: str) -> None:
    alone, both = measured
    assert both[0][case]["metrics"] == both[1][case]["metrics"] == alone[case]["metrics"]
    assert both[0][case]["own metrics"] == both[1][case]["own metrics"]
    for name in ("hr@10", "liked_hr@10", "recall@4", "diversity@4"):
        assert alone[case]["metrics"][0][name] > 0
