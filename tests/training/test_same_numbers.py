"""Processes with a part of the batch each give the losses of one, and at equal weights exactly its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.training.trainer import Trainer
from programs import quick_start

GLOBAL_BATCH, STEPS = 8, 50
COMMON = {
    "dataset_name": "tiny", "max_sequence_length": 12, "item_embedding_dim": 8, "dropout_rate": 0.0, "num_negatives": 6,
    "num_warmup_steps": 10, "learning_rate": 3e-3, "eval_batch_size": 5, "list_metrics_k": 4,
}  # fmt: skip
SIZES = {
    "hstu_encoder": {"dqk": 4, "dv": 4},
    "sasrec_encoder": {"ffn_dropout_rate": 0.0, "ffn_hidden_dim": 8},
    "create_mol_interaction_module": {
        "query_dot_product_groups": 2, "item_dot_product_groups": 2, "dot_product_dimension": 4,
        "query_hidden_dim": 8, "gating_query_hidden_dim": 8, "gating_item_hidden_dim": 8, "gating_qi_hidden_dim": 8,
        "uid_embedding_hash_sizes": (7,), "uid_dropout_rate": 0.0,
    },
}  # fmt: skip
LOCAL = {"sampling_strategy": "local"}
CASES = {
    "full cross-entropy": {"loss_module": "CE"},
    "block": {"sampling_strategy": "local", "negatives_sharing": "block", "negatives_block_size": 16},
    "in-batch": {"sampling_strategy": "in-batch", "item_l2_norm": True},
    "position": {"sampling_strategy": "local"},
    "hstu": {"sampling_strategy": "local", "main_module": "HSTU"},
    "clipped": {
        "sampling_strategy": "popularity",
        "negatives_sharing": "batch",
        "optimizer": "lazy_adamw",
        "max_grad_norm": 0.3,
    },
    "masked": {"objective": "masked", "loss_module": "CE"},
    "permuted, sampled": {"objective": "permuted", **LOCAL, "negatives_sharing": "block"},
    "replaced": {"objective": "replaced", "loss_module": "CE"},
    "replaced, sampled": {"objective": "replaced", **LOCAL},
    "mixture": {
        **LOCAL,
        "interaction_module_type": "MoL",
        "top_k_method": "MoLBruteForceTopK",
        "user_embedding_norm": "layer_norm",
        "temperature": 1.0,
        "loss_weights": {"mi_loss": 0.1, "uid_embedding_l2_norm": 0.1},
    },
}
WORLDS = {2: list(CASES), 4: ["position", "clipped"]}
RESUMED, DONE = "full cross-entropy", 3
"""A run of one process that stops within an epoch, after so many steps, and goes on as two."""


def settings_of(case: str, world_size: int) -> RunSettings:
    train = {**COMMON, "local_batch_size": GLOBAL_BATCH // world_size, **CASES[case]}
    owners = {"train_fn": train, **SIZES}
    return RunSettings().bind(
        {f"{o}.{name}": value for o, given in owners.items() for name, value in given.items()}
    )


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


def rest_of_the_epoch(dataset: SequenceDataset, checkpoints: str) -> dict[str, list]:
    """Users and losses of the steps behind a checkpoint."""
    group = process_collectives("cpu")
    trainer = Trainer(settings_of(RESUMED, group.world_size), dataset, make_split(dataset), group)
    newest = CheckpointStore(checkpoints, read_only=True).load_newest()
    assert newest is not None
    trainer.restore(newest)
    batches = list(trainer.loader.epoch(0, trainer.progress.step_in_epoch))
    users = [user for batch in batches for user in batch.columns["user_ids"].tolist()]
    return {"users": users, "losses": [float(trainer.run_step(batch).loss) for batch in batches]}


def member(rank: int, world: int, folder: str, results: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{results}/rendezvous-{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    found, dataset = {}, SequenceDataset.open(folder)
    for case in WORLDS[world]:
        losses, trainer = losses_and_trainer(dataset, case)
        own = metrics(trainer)
        trainer.model.load_state_dict(torch.load(f"{results}/{case}.pt"))
        found[case] = {"losses": losses, "own metrics": own, "metrics": metrics(trainer)}
    if world == 2:
        found["resumed"] = rest_of_the_epoch(dataset, f"{results}/checkpoints")
    Path(f"{results}/{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def stop_within_the_epoch(dataset: SequenceDataset, checkpoints: Path) -> None:
    trainer = Trainer(settings_of(RESUMED, 1), dataset, make_split(dataset), process_collectives("cpu"))
    trainer.train(CheckpointStore(checkpoints), stop=lambda: trainer.progress.step == DONE)


@pytest.fixture(scope="module")
def measured(
    ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, dict[int, list[dict]]]:
    """What one process found, and what each of several did, by their number; by case."""
    folder = tmp_path_factory.mktemp("same")
    alone = {}
    for case in CASES:
        losses, trainer = losses_and_trainer(ragged_dataset, case)
        torch.save(trainer.model.state_dict(), folder / f"{case}.pt")
        alone[case] = {"losses": losses, "metrics": metrics(trainer)}
    stop_within_the_epoch(ragged_dataset, folder / "checkpoints")
    found = {}
    for world in WORLDS:
        arguments = world, str(ragged_dataset.folder), str(folder)
        members = [quick_start().Process(target=member, args=(rank, *arguments)) for rank in range(world)]
        for each in members:
            each.start()
        for each in members:
            each.join(timeout=120)
        assert [each.exitcode for each in members] == [0] * world
        found[world] = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return alone, found


BY_WORLD = [(world, case) for world, cases in WORLDS.items() for case in cases]


@pytest.mark.parametrize(("world", "case"), BY_WORLD)
def test_losses_are_those_of_one_process(measured: tuple[dict, dict], world: int, case: str) -> None:
    alone, all_of = measured[0][case], [each[case] for each in measured[1][world]]
    assert all(each["losses"] == all_of[0]["losses"] for each in all_of)
    assert all_of[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-5)
    assert len(set(alone["losses"])) == STEPS
    if "objective" not in CASES[case]:  # what is hidden differs from step to step, and so does the loss
        assert sum(alone["losses"][-10:]) < sum(alone["losses"][:10])  # the weights did move


@pytest.mark.parametrize(("world", "case"), BY_WORLD)
def test_metrics_are_exactly_those_of_one_process(measured: tuple[dict, dict], world: int, case: str) -> None:
    alone, all_of = measured[0][case], [each[case] for each in measured[1][world]]
    assert all(each["metrics"] == alone["metrics"] for each in all_of)
    assert all(each["own metrics"] == all_of[0]["own metrics"] for each in all_of)
    for name in ("hr@10", "high_rated_hr@10", "recall@4", "diversity@4"):
        assert alone["metrics"][0][name] > 0


def test_two_processes_go_on_within_an_epoch_of_one(
    measured: tuple[dict, dict], ragged_dataset: SequenceDataset
) -> None:
    both = [each["resumed"] for each in measured[1][2]]
    stops = make_split(ragged_dataset).train_stops
    loader = SequenceLoader(ragged_dataset, stops, COMMON["max_sequence_length"], GLOBAL_BATCH, 42)
    behind = [user for batch in loader.epoch(0, DONE) for user in batch.columns["user_ids"].tolist()]
    assert sorted(both[0]["users"] + both[1]["users"]) == sorted(behind)
    expected = measured[0][RESUMED]["losses"][DONE : len(loader)]
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
