"""An item table sharded over 2 and 3 processes gives the losses, weights, ranks, lists and checkpoints of a whole
one."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from generative_recommenders.checkpoint.broadcast import checkpoint_from_main
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.distributed.signals import StopRequested
from generative_recommenders.distributed.torchrec_table import TorchRecTable
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.product_ranks import product_ranks, product_ranks_reference
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.retrieval.product_search import search_products, search_shards
from generative_recommenders.retrieval.recommender import Recommender
from generative_recommenders.training.trainer import Trainer
from programs import quick_start

GLOBAL_BATCH, STEPS, LATER, TABLE = 12, 5, 2, "model.items.table"
"""LATER: steps of a run that continues from a checkpoint."""
COMMON = {
    "train_fn.dataset_name": "tiny", "train_fn.max_sequence_length": 12, "train_fn.item_embedding_dim": 8,
    "train_fn.dropout_rate": 0.0, "sasrec_encoder.ffn_dropout_rate": 0.0, "sasrec_encoder.ffn_hidden_dim": 8,
    "hstu_encoder.dqk": 4, "hstu_encoder.dv": 4, "train_fn.num_negatives": 6, "train_fn.learning_rate": 1e-2,
    "train_fn.eval_batch_size": 15, "train_fn.list_metrics_k": 4, "train_fn.sampling_strategy": "local",
}  # fmt: skip
ROWWISE, LAZY = {"train_fn.optimizer": "rowwise_adagrad"}, {"train_fn.optimizer": "lazy_adamw"}
CASES: dict[str, dict[str, Any]] = {
    "a position's negatives, Adagrad": ROWWISE,
    "a block's negatives, clipped": {
        **LAZY, "train_fn.negatives_sharing": "block", "train_fn.negatives_block_size": 16,
        "train_fn.max_grad_norm": 0.3, "train_fn.item_l2_norm": True,
    },
    "HSTU, in-batch, dense AdamW": {"train_fn.main_module": "HSTU", "train_fn.sampling_strategy": "in-batch"},
    "masked": {**LAZY, "train_fn.objective": "masked", "train_fn.loss_module": "CE"},
    "catalogue, normalised": {
        **ROWWISE, "train_fn.loss_module": "CE", "train_fn.label_smoothing": 0.1, "train_fn.item_l2_norm": True,
    },
    "catalogue, several positives": {**LAZY, "train_fn.loss_module": "LogOutCE", "train_fn.num_positives": 3},
    "catalogue, binary": {**ROWWISE, "train_fn.loss_module": "BCE", "train_fn.learning_rate": 1e-3},
    "frozen table": {**LAZY, "train_fn.freeze": ("items.table",)},
}  # fmt: skip
NO_DECAY = {**ROWWISE, "train_fn.weight_decay": 0.0}
OF_TORCHREC: dict[str, dict[str, Any]] = {
    "TorchRec": NO_DECAY,
    "TorchRec, a block's negatives, normalised": {
        **NO_DECAY, "train_fn.negatives_sharing": "block", "train_fn.item_l2_norm": True,
        "train_fn.num_warmup_steps": 3, "rowwise_adagrad.item_learning_rate": 0.05,
    },
    "TorchRec, HSTU, in-batch": {
        **NO_DECAY, "train_fn.main_module": "HSTU", "train_fn.sampling_strategy": "in-batch",
    },
}  # fmt: skip
"""Cases whose table TorchRec keeps; where it is installed, which takes an environment of its own."""
if find_spec("torchrec"):
    CASES |= OF_TORCHREC
WORLDS = (2, 3)
OF_TWO = ("a position's negatives, Adagrad", "a block's negatives, clipped", "catalogue, several positives")
"""Three processes, one of which has an inner shard, go through all cases; two through these, and in slow tests through
all."""


def settings_of(case: str, world: int, table: str) -> RunSettings:
    kept = "torchrec" if case in OF_TORCHREC and table == "sharded" else table
    sizes = {"train_fn.local_batch_size": GLOBAL_BATCH // world, "train_fn.item_table": kept}
    return RunSettings().bind(COMMON | CASES[case] | sizes)


def trainer_of(dataset: SequenceDataset, case: str, table: str) -> Trainer:
    group = process_collectives("cpu")
    return Trainer(settings_of(case, group.world_size, table), dataset, make_split(dataset), group)


def losses_of_steps(trainer: Trainer, count: int) -> list[float]:
    losses: list[float] = []
    while len(losses) < count:
        for batch in trainer.loader.epoch(trainer.progress.epoch, trainer.progress.step_in_epoch):
            losses.append(float(trainer.run_step(batch).loss))
            if len(losses) == count:
                return losses
        trainer.progress.epoch, trainer.progress.step_in_epoch = trainer.progress.epoch + 1, 0
    return losses


def measured(trainer: Trainer) -> dict[str, Any]:
    test = trainer.evaluation.test(trainer.model)
    partial = trainer.evaluation.validation(trainer.model, max_batches=3)
    return {"ranks": test.ranks, "metrics": test.all_metrics(), "partial": partial.metrics()}


def of_case(dataset: SequenceDataset, case: str, table: str, folder: Path, compared: bool) -> dict[str, Any]:
    """Losses of steps, then a checkpoint; where another run that reads it is compared, what this one measures and how
    it continues."""
    trainer = trainer_of(dataset, case, table)
    losses = losses_of_steps(trainer, STEPS)
    store = CheckpointStore(
        folder,
        read_only=not trainer.collectives.is_main,
        joins_rows=trainer.collectives.world_size == 1,
    )
    trainer.save(store)
    trainer.collectives.barrier()
    if not compared:
        return {"losses": losses}
    return {"losses": losses, "measured": measured(trainer), "later": losses_of_steps(trainer, LATER)}


def reloaded(dataset: SequenceDataset, case: str, table: str, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(dataset, case, table)
    collectives = trainer.collectives
    store = CheckpointStore(folder, read_only=True, joins_rows=collectives.world_size == 1)
    checkpoint = checkpoint_from_main(collectives, store.load_newest)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    return {"measured": measured(trainer), "later": losses_of_steps(trainer, LATER)}


def top_lists(items: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor, k: int) -> Any:
    shard = RowShard(1 + len(items), process_collectives("cpu"))
    own = items[shard.before : shard.stop - 1]
    return search_shards(queries, own, k, shard, seen)


def ranks_of(items: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    """By products in the cache, and by blocks of scores; every item is a target of every query."""
    shard = RowShard(1 + len(items), process_collectives("cpu"))
    own = items[shard.before : shard.stop - 1]
    targets, pairs = every_pair(items, queries, seen)
    return [rank(pairs[0], own, targets, pairs[1], shard) for rank in (product_ranks, product_ranks_reference)]


def every_pair(items: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor) -> Any:
    targets = torch.arange(len(items) + 2).repeat(len(queries))  # with two ids that are no items
    rows = torch.arange(len(queries)).repeat_interleave(len(items) + 2)
    return targets, (queries[rows], SeenItems.padded(seen[rows], len(items)))


def stopped(trainer: Trainer) -> bool:
    """Whether an evaluation ends on this process, too, when another one is asked to stop."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return trainer.collectives.rank == 1 and len(asked) > 1

    try:
        trainer.evaluation.test(trainer.model, stop)
    except StopRequested:
        return True
    return False


def diverged(trainer: Trainer) -> str:
    """What is raised on this process where a row of another one is not finite."""
    if trainer.collectives.rank == 1:
        trainer.model.items.table.data.fill_(torch.nan)
    batch = next(iter(trainer.loader.epoch(0)))
    try:
        trainer.account([(batch, trainer.run_step(batch))])
    except UserError as error:
        return f"{error.exit_code} {error}"
    return ""


def search_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items with equal scores on both sides of every shard's edge."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(-2, 3, (41, 3), generator=generator).float()
    queries = torch.randint(-2, 3, (9, 3), generator=generator).float()
    return items, queries, torch.randint(0, 42, (9, 6), generator=generator)


def infinite_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`search_input` with items in two shards whose scores are infinite, or no numbers."""
    items, queries, seen = search_input()
    items[3], items[35] = torch.tensor([-torch.inf, 1.0, 1.0]), torch.tensor([1.0, 1.0, torch.inf])
    return items, queries, seen


def member(rank: int, world: int, cases: Sequence[str], folder: str, results: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{results}/rendezvous-{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    dataset, found = SequenceDataset.open(folder), {}
    for case in cases:
        own = Path(results) / f"{case} of {world}"
        found[case] = of_case(dataset, case, "sharded", own, case in OF_TWO or world == WORLDS[0])
        found[case]["of one"] = reloaded(dataset, case, "sharded", Path(results) / f"{case} of 1")
        if world == WORLDS[-1] and (Path(results) / f"{case} of 2").exists():
            found[case]["of two"] = reloaded(dataset, case, "sharded", Path(results) / f"{case} of 2")
        if case in OF_TWO:  # whatever the case, a whole table is read from the joined files
            found[case]["replicated"] = reloaded(dataset, case, "replicated", own)
    found["stopped"] = stopped(trainer_of(dataset, next(iter(CASES)), "sharded"))
    found["diverged"] = diverged(trainer_of(dataset, next(iter(CASES)), "sharded"))
    found["ranks"] = ranks_of(*search_input())
    found["ranks beside infinite scores"] = ranks_of(*infinite_input())
    found["lists"] = [top_lists(*search_input(), k) for k in (1, 5, 30, 50)]
    torch.save(found, f"{results}/{world}-{rank}.pt")
    dist.destroy_process_group()


class Measured:
    """What one process finds with a whole table, by case, and what each of several does with a shard."""

    def __init__(self, dataset: SequenceDataset, folder: Path, of_two: Sequence[str]) -> None:
        self.dataset, self.folder, self.of_two = dataset, folder, of_two

    @functools.cache  # noqa: B019, there is one for all tests
    def alone(self, case: str) -> dict[str, Any]:
        return of_case(self.dataset, case, "replicated", self.folder / f"{case} of 1", True)

    @functools.cache  # noqa: B019
    def several(self, world: int) -> list[dict[str, Any]]:
        cases = list(CASES) if world == WORLDS[-1] else self.of_two
        for case in cases:
            self.alone(case)
        if world == WORLDS[-1]:
            self.several(WORLDS[0])
        arguments = world, cases, str(self.dataset.folder), str(self.folder)
        members = [quick_start().Process(target=member, args=(rank, *arguments)) for rank in range(world)]
        for each in members:
            each.start()
        for each in members:
            each.join(timeout=600)
        assert [each.exitcode for each in members] == [0] * world
        return [torch.load(self.folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def results(
    ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Measured:
    of_two = list(CASES) if request.config.getoption("--run_slow") else OF_TWO
    return Measured(ragged_dataset, tmp_path_factory.mktemp("sharded"), of_two)


EVERY = pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=[pytest.mark.slow] if world == 2 and case not in OF_TWO else [])
        for world in WORLDS
        for case in CASES
    ],
)
WORLD = pytest.mark.parametrize("world", WORLDS)


@EVERY
def test_losses_are_those_of_a_whole_table(results: Measured, world: int, case: str) -> None:
    alone, all_of = results.alone(case), [each[case] for each in results.several(world)]
    assert all(each["losses"] == all_of[0]["losses"] for each in all_of)
    assert all_of[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-5)
    assert len(set(alone["losses"])) == STEPS


@EVERY
def test_weights_and_optimizer_state_after_steps(results: Measured, world: int, case: str) -> None:
    """Every row's gradients went where it lies: the whole table, joined from the shards' files, is that of one
    process."""
    results.several(world)
    stores = [CheckpointStore(results.folder / f"{case} of {count}", read_only=True) for count in (1, world)]
    alone, joined = (store.load(store.paths()[0]) for store in stores)
    assert len(list(joined.path.glob("rows-*.safetensors"))) == world
    assert alone.tensors.keys() == joined.tensors.keys()
    for name, value in alone.tensors.items():
        torch.testing.assert_close(joined.tensors[name], value, rtol=2e-3, atol=2e-4, msg=name)


@EVERY
def test_ranks_and_lists_of_the_same_weights(results: Measured, world: int, case: str) -> None:
    alone, all_of = results.alone(case)["measured"], [each[case] for each in results.several(world)]
    for each in all_of:
        same = each["of one"]["measured"]
        assert torch.equal(same["ranks"], alone["ranks"])
        assert same["metrics"] == alone["metrics"] and same["partial"] == alone["partial"]
    assert "diversity@4" in alone["metrics"]


@EVERY
def test_checkpoints_resume_with_any_number_of_processes(results: Measured, world: int, case: str) -> None:
    for each in (every[case] for every in results.several(world)):
        assert each["of one"]["later"] == pytest.approx(results.alone(case)["later"], rel=1e-3, abs=1e-4)
        if "replicated" in each:
            assert each["replicated"]["later"] == pytest.approx(each["later"], rel=1e-4, abs=1e-5)
            assert torch.equal(each["replicated"]["measured"]["ranks"], each["measured"]["ranks"])
        if "of two" in each:
            two = results.several(WORLDS[0])[0][case]
            assert each["of two"]["later"] == pytest.approx(two["later"], rel=1e-3, abs=1e-4)
            assert torch.equal(each["of two"]["measured"]["ranks"], two["measured"]["ranks"])


@WORLD
def test_top_lists_are_merged_with_their_ties(results: Measured, world: int) -> None:
    items, queries, seen = search_input()
    for each in results.several(world):
        for (values, ids), k in zip(each["lists"], (1, 5, 30, 50)):
            expected = search_products(queries, items, k, seen)
            assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])


@WORLD
def test_ranks_are_counted_over_shards_with_their_ties(results: Measured, world: int) -> None:
    for name, (items, queries, seen) in {
        "ranks": search_input(),
        "ranks beside infinite scores": infinite_input(),
    }.items():
        targets, (rows, seen_items) = every_pair(items, queries, seen)
        expected = exact_ranks(rows @ items.T, targets, seen_items)
        for each in results.several(world):
            assert all(torch.equal(ranks, expected) for ranks in each[name])


@WORLD
def test_an_evaluation_stops_on_all_processes(results: Measured, world: int) -> None:
    assert all(each["stopped"] for each in results.several(world))


@WORLD
def test_rows_that_are_not_finite_end_all_processes_in_one_line(results: Measured, world: int) -> None:
    for each in results.several(world):
        assert re.fullmatch("3 the parameter model.items.table is not finite after step 1: .*", each["diverged"])


@WORLD
def test_a_shard_answers_unsharded(results: Measured, world: int) -> None:
    """The unsharded model of a sharded run's checkpoint scores as its table says."""
    results.several(world)
    case = next(iter(CASES))
    store = CheckpointStore(results.folder / f"{case} of {world}")
    item_ids = results.dataset.original_item_ids().combine_chunks()
    checkpoint = store.load(store.paths()[0])
    store.attach(item_ids, settings_of(case, 1, "sharded").to_json(), "")
    path = store.save((9, 9), checkpoint.tensors, checkpoint.state)
    model = Recommender.of_checkpoint(store.load(path), torch.device("cpu")).model
    states = torch.randn(2, 8)
    scores = model.score(Queries(states, None), model.catalogue())
    temperature = model.similarity.temperature
    torch.testing.assert_close(scores, states @ checkpoint.tensors[TABLE][1:].T / temperature)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_fn.interaction_module_type": "MoL"}, "MoL"),
        ({"train_fn.main_module": "TwoTower", "train_fn.negatives_sharing": "block"}, "item_tower"),
        ({"train_fn.loss_module": "ScalableCrossEntropyLoss"}, "ScalableCrossEntropyLoss"),
        ({"train_fn.objective": "replaced", "train_fn.loss_module": "CE"}, "replaced"),
        ({"train_fn.initialize_from": "elsewhere"}, "initialize_from"),
        ({"train_fn.item_table": "torchrec"}, "weight_decay = 0"),
        (
            {"train_fn.item_table": "torchrec", **NO_DECAY, "train_fn.max_grad_norm": 1.0},
            "max_grad_norm = None",
        ),
        ({"train_fn.item_table": "torchrec", **NO_DECAY, "train_fn.loss_module": "CE"}, "sampled loss"),
    ],
)
def test_what_needs_the_whole_table_is_refused(
    ragged_dataset: SequenceDataset, changes: dict[str, Any], named: str
) -> None:
    settings = RunSettings().bind(COMMON | {"train_fn.item_table": "sharded"} | changes)
    with pytest.raises(UserError, match=named) as caught:
        Trainer(settings, ragged_dataset, make_split(ragged_dataset), process_collectives("cpu"))
    assert "item_table" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("torchrec") is not None, reason="TorchRec is installed")
def test_torchrec_that_is_missing_reports_one_line_error() -> None:
    with pytest.raises(UserError, match="needs TorchRec in an environment of its own .*torchrec") as caught:
        TorchRecTable(11, 8, Collectives())
    assert "\n" not in str(caught.value)


def test_a_width_that_fbgemm_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match="item_embedding_dim that 4 divides, not 6"):
        TorchRecTable(11, 6, Collectives())
