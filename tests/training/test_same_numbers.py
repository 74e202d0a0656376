"""Processes with a part of the batch each give the losses of one, and at equal weights exactly its metrics."""

from __future__ import annotations

import functools
import gc
import hashlib
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

GLOBAL_BATCH, STEPS = 12, 12
COMMON = {
    "dataset_name": "tiny", "max_sequence_length": 12, "item_embedding_dim": 8, "dropout_rate": 0.0, "num_negatives": 6,
    "num_warmup_steps": 4, "learning_rate": 5e-3, "eval_batch_size": 16, "list_metrics_k": 4,
}  # fmt: skip
SIZES = {
    "hstu_encoder": {"dqk": 4, "dv": 4},
    "fuxi_encoder": {"dqk": 4, "dv": 4},
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
    "fuxi": {"sampling_strategy": "local", "main_module": "FuXi"},
    "ligr": {"sampling_strategy": "local", "main_module": "LiGR", "ligr_encoder.dropout_rate": 0.0},
    "clipped": {
        "sampling_strategy": "popularity",
        "negatives_sharing": "batch",
        "optimizer": "lazy_adamw",
        "max_grad_norm": 0.3,
    },
    "frozen items": {**LOCAL, "freeze": ("items.table", "sequence.encoder.blocks.0"), "learning_rate": 1e-2},
    "frozen encoder": {**LOCAL, "freeze": ("sequence",), "optimizer": "lazy_adamw", "learning_rate": 1e-2},
    "last position": {"objective": "causal_last", "loss_module": "CE"},
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


def mol_rates(**rates: float) -> dict[str, float]:
    return {f"create_mol_interaction_module.{name}_dropout_rate": rate for name, rate in rates.items()}


DROPPED = {
    "position": {},
    "block, recomputed": {
        **CASES["block"], "main_module": "HSTU", "get_sequential_encoder.activation_checkpoint": True,
        "hstu_encoder.attn_dropout_rate": 0.2,
        "input_preprocessor": "CombinedItemAndRating",
    },
    "hstu": {"hstu_encoder.attn_dropout_rate": 0.2, "hstu_encoder.linear_dropout_rate": 0.3},
    "hstu, softmax": {
        **CASES["hstu"], "hstu_encoder.normalization": "softmax_rel_bias", "hstu_encoder.attn_dropout_rate": 0.2,
    },
    "fuxi": {"fuxi_encoder.attn_dropout_rate": 0.2, "fuxi_encoder.linear_dropout_rate": 0.3},
    "ligr": {"ligr_encoder.dropout_rate": 0.2},
    "masked": {"main_module": "Transformer"},
    "replaced": {},
    "mixture": {
        "learning_rate": 1e-3, **mol_rates(
            uid=0.5, softmax=0.2, query=0.1, item=0.1, gating_qi=0.1, gating_item=0.1
        ),
    },
    "mixture, shared": {
        **CASES["mixture"], "negatives_sharing": "block", "negatives_block_size": 16,
        **mol_rates(uid=0.5, softmax=0.2),
    },
}  # fmt: skip
"""With dropout, in deterministic runs: what is set beside the case of that name, or instead."""
CASES |= {
    f"{name}, dropout": {
        **CASES.get(name, {}), "dropout_rate": 0.2, "sasrec_encoder.ffn_dropout_rate": 0.3, "deterministic": True,
        **changes,
    }
    for name, changes in DROPPED.items()
}  # fmt: skip
OF_OTHERS = ("position", "fuxi", "ligr", "masked", "mixture")
"""Their paths are those of other cases, with dropout or of three processes: slow tests have them, too."""
QUICK = {
    2: [case for case in CASES if case not in OF_OTHERS],
    3: ["block", "permuted, sampled", "replaced", "mixture", "masked, dropout", "mixture, shared, dropout"],
    4: ["clipped"],
}
SLOW = {2: list(OF_OTHERS), 3: [case for case in CASES if case not in QUICK[3]], 4: ["position"]}
"""Cases by number of processes."""
RESUMED, DONE = "full cross-entropy", 3
"""A run of one process that stops within an epoch, after so many steps, and resumes as two."""


def settings_of(case: str, world_size: int) -> RunSettings:
    top = {name: value for name, value in CASES[case].items() if "." not in name}
    train = {**COMMON, "local_batch_size": GLOBAL_BATCH // world_size, **top}
    owners = {"train_fn": train, **SIZES}
    names = {f"{owner}.{name}": value for owner, given in owners.items() for name, value in given.items()}
    return RunSettings().bind(names | {name: value for name, value in CASES[case].items() if "." in name})


def losses_and_trainer(dataset: SequenceDataset, case: str) -> tuple[list[float], Trainer]:
    """The losses of the first steps, by this process's share of the batches."""
    group = process_collectives("cpu")
    trainer = Trainer(settings_of(case, group.world_size), dataset, make_split(dataset), group)
    losses: list[float] = []
    while len(losses) < STEPS:
        batches = trainer.loader.epoch(trainer.progress.epoch)
        losses += [float(trainer.run_step(batch).loss) for batch, _ in zip(batches, range(STEPS - len(losses)))]
        trainer.progress.epoch += 1
    return losses, trainer


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    model = trainer.model
    return [
        trainer.evaluation.validation(model).all_metrics(),
        trainer.evaluation.validation(model, max_batches=2).metrics(),
        trainer.evaluation.test(model).all_metrics(),
    ]


def weights_of(trainer: Trainer) -> str:
    """The same for equal bits."""
    digest = hashlib.sha256()
    for weight in trainer.model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def rest_of_the_epoch(dataset: SequenceDataset, checkpoints: str) -> dict[str, list]:
    """Users and losses of the steps after a checkpoint."""
    group = process_collectives("cpu")
    trainer = Trainer(settings_of(RESUMED, group.world_size), dataset, make_split(dataset), group)
    newest = CheckpointStore(checkpoints, read_only=True).load_newest()
    assert newest is not None
    trainer.restore(newest)
    batches = list(trainer.loader.epoch(0, trainer.progress.step_in_epoch))
    users = [user for batch in batches for user in batch.columns["user_ids"].tolist()]
    return {"users": users, "losses": [float(trainer.run_step(batch).loss) for batch in batches]}


def member(rank: int, world: int, cases: list[str], folder: str, results: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{results}/rendezvous-{world}-{len(cases)}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    found, dataset = {}, SequenceDataset.open(folder)
    for case in cases:
        losses, trainer = losses_and_trainer(dataset, case)
        own = weights_of(trainer)
        trainer.model.load_state_dict(torch.load(f"{results}/{case}.pt"))
        found[case] = {"losses": losses, "weights": own, "metrics": metrics(trainer)}
    if RESUMED in cases and world == 2:
        found["resumed"] = rest_of_the_epoch(dataset, f"{results}/checkpoints")
    Path(f"{results}/{world}-{rank}.json").write_text(json.dumps(found))
    del trainer  # the group must outlive DDP's reducer, see distributed/launch.py
    gc.collect()
    dist.destroy_process_group()


def stop_within_the_epoch(dataset: SequenceDataset, checkpoints: Path) -> None:
    trainer = Trainer(settings_of(RESUMED, 1), dataset, make_split(dataset), process_collectives("cpu"))
    trainer.train(CheckpointStore(checkpoints), stop=lambda: trainer.progress.step == DONE)


class Measured:
    """What one process finds, by case, and what each of several does."""

    def __init__(self, dataset: SequenceDataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        stop_within_the_epoch(dataset, folder / "checkpoints")

    @functools.cache  # noqa: B019, there is one for all tests
    def alone(self, case: str) -> dict:
        settings = settings_of(case, 1)
        untrained = Trainer(settings, self.dataset, make_split(self.dataset), process_collectives("cpu"))
        losses, trainer = losses_and_trainer(self.dataset, case)
        torch.save(trainer.model.state_dict(), self.folder / f"{case}.pt")
        moved = weights_of(untrained) != weights_of(trainer)
        return {"losses": losses, "metrics": metrics(trainer), "moved": moved}

    @functools.cache  # noqa: B019
    def several(self, world: int, slow: bool) -> list[dict]:
        cases = (SLOW if slow else QUICK)[world]
        for case in cases:
            self.alone(case)
        arguments = world, cases, str(self.dataset.folder), str(self.folder)
        members = [quick_start().Process(target=member, args=(rank, *arguments)) for rank in range(world)]
        for each in members:
            each.start()
        for each in members:
            each.join(timeout=600)
        assert [each.exitcode for each in members] == [0] * world
        return [json.loads((self.folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def measured(ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(ragged_dataset, tmp_path_factory.mktemp("same"))


BY_WORLD = [
    *((world, case, False) for world, cases in QUICK.items() for case in cases),
    *(pytest.param(world, case, True, marks=pytest.mark.slow) for world in SLOW for case in SLOW[world]),
]


@pytest.mark.parametrize(("world", "case", "slow"), BY_WORLD)
def test_losses_are_those_of_one_process(measured: Measured, world: int, case: str, slow: bool) -> None:
    alone, all_of = measured.alone(case), [each[case] for each in measured.several(world, slow)]
    assert all(each["losses"] == all_of[0]["losses"] for each in all_of)
    assert all(each["weights"] == all_of[0]["weights"] for each in all_of)
    assert all_of[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-5)
    assert len(set(alone["losses"])) == STEPS
    assert alone["moved"]
    # what is hidden or dropped differs from step to step, and so does the loss
    if "objective" not in CASES[case] and "dropout" not in case:
        assert sum(alone["losses"][-5:]) < sum(alone["losses"][:5])


@pytest.mark.parametrize(("world", "case", "slow"), BY_WORLD)
def test_metrics_are_exactly_those_of_one_process(measured: Measured, world: int, case: str, slow: bool) -> None:
    alone, all_of = measured.alone(case), [each[case] for each in measured.several(world, slow)]
    assert all(each["metrics"] == alone["metrics"] for each in all_of)
    for name in ("hr@10", "high_rated_hr@10", "recall@4", "diversity@4"):
        assert alone["metrics"][0][name] > 0


def test_two_processes_go_on_within_an_epoch_of_one(measured: Measured, ragged_dataset: SequenceDataset) -> None:
    both = [each["resumed"] for each in measured.several(2, False)]
    stops = make_split(ragged_dataset).train_stops
    loader = SequenceLoader(ragged_dataset, stops, COMMON["max_sequence_length"], GLOBAL_BATCH, 42)
    later = [user for batch in loader.epoch(0, DONE) for user in batch.columns["user_ids"].tolist()]
    assert sorted(both[0]["users"] + both[1]["users"]) == sorted(later)
    expected = measured.alone(RESUMED)["losses"][DONE : len(loader)]
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
