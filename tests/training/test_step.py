"""Training steps: gathered rows against the whole table, and two processes against one with the doubled batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from generative_recommenders.config.registry import OPTIMIZERS
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.input_preprocessors import (
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.items import (
    CategoricalEmbeddingModule,
    ItemEmbedding,
    LocalEmbeddingModule,
)
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import L2NormEmbeddingPostprocessor
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.objectives.causal import CausalLastObjective, CausalObjective
from generative_recommenders.objectives.criterion import CatalogueCriterion, Criterion, SampledCriterion
from generative_recommenders.objectives.losses.catalogue import CE
from generative_recommenders.objectives.losses.sampled import SampledSoftmaxLoss
from generative_recommenders.objectives.negative_samplers import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    NegativesSampler,
    Sharing,
)
from generative_recommenders.objectives.task import TrainingTask
from generative_recommenders.ops import embedding
from generative_recommenders.training.optimizers import Optimizer
from generative_recommenders.training.step import TrainingStep
from programs import quick_start

LENGTH, DIM, GLOBAL_BATCH, STEPS = 10, 8, 8, 20
ALWAYS_ROWS, NEVER_ROWS = 0, 10**9


@dataclass(frozen=True)
class Case:
    """negatives: "block" and "position" (local), "in-batch", or "catalogue" for full cross-entropy."""

    negatives: str
    optimizer: str = "adamw"
    dense_share: int = NEVER_ROWS
    categories: bool = False
    max_grad_norm: float | None = None
    last_only: bool = False


def sampler_of(case: Case, num_items: int) -> NegativesSampler | None:
    if case.negatives == "catalogue":
        return None
    if case.negatives == "in-batch":
        return InBatchNegativesSampler(6, Sharing())
    return LocalNegativesSampler(num_items, 6, Sharing(case.negatives, 16))


def criterion_of(case: Case) -> Criterion:
    if case.negatives == "catalogue":
        return CatalogueCriterion(CE())
    return SampledCriterion(SampledSoftmaxLoss())


def items_of(case: Case, num_items: int) -> ItemEmbedding:
    if case.categories:
        return CategoricalEmbeddingModule(torch.arange(num_items) // 3, DIM, item_l2_norm=True)
    return LocalEmbeddingModule(num_items, DIM, item_l2_norm=True)


def train(dataset: SequenceDataset, case: Case, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All weights after some steps, and the losses of the steps; by this process's share of the batches."""
    torch.manual_seed(0)
    group = process_collectives("cpu")
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(LENGTH, DIM, 0.0)
    sequence = SequenceEncoder(preprocessor, SASRec(DIM, ffn_dropout_rate=0.0), L2NormEmbeddingPostprocessor())
    model = SequenceRecommender(items_of(case, dataset.num_items), sequence, DotProductSimilarity(0.1))
    dense = [parameter for name, parameter in model.named_parameters() if name != "items.table"]
    optimizer = Optimizer(dense, model.items.table, OPTIMIZERS[case.optimizer].make(3e-3, 0.01), 5, case.max_grad_norm)
    sampler = sampler_of(case, dataset.num_items)
    task = TrainingTask(
        model,
        (CausalLastObjective if case.last_only else CausalObjective)(),
        criterion_of(case),
        sampler,
        9,
        group,
    )
    step = TrainingStep(task, optimizer, group)
    loader = SequenceLoader(
        dataset, make_split(dataset).train_stops, LENGTH, GLOBAL_BATCH // group.world_size, 5,
        rank=group.rank, world_size=group.world_size,
    )  # fmt: skip
    losses = []
    batches = [batch for epoch in range(-(-steps // len(loader))) for batch in loader.epoch(epoch)]
    for number, batch in enumerate(batches[:steps]):
        losses.append(step(batch, number).loss)
    return {**model.state_dict(), "losses": torch.stack(losses)}


def with_rows(monkeypatch: pytest.MonkeyPatch, dataset: SequenceDataset, case: Case, share: int) -> dict:
    monkeypatch.setattr(embedding, "DENSE_SHARE", share)
    return train(dataset, case, steps=3)


@pytest.mark.parametrize("negatives", ["block", "position", "in-batch"])
@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw", "rowwise_adagrad"])
@pytest.mark.parametrize("categories", [False, True])
def test_gathered_rows_equal_the_whole_table(monkeypatch, ragged_dataset, negatives, optimizer, categories) -> None:
    case = Case(negatives, optimizer, categories=categories, max_grad_norm=1.0)
    looked_up = []
    original = TrainingTask.rows_read

    def rows_read(self, *arguments):
        looked_up.append(original(self, *arguments)[1] is not None)
        return original(self, *arguments)

    monkeypatch.setattr(TrainingTask, "rows_read", rows_read)
    rows = with_rows(monkeypatch, ragged_dataset, case, ALWAYS_ROWS)
    whole = with_rows(monkeypatch, ragged_dataset, case, NEVER_ROWS)
    assert looked_up == [True] * 3 + [False] * 3
    torch.testing.assert_close(rows, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("negatives", ["block", "catalogue"])
def test_training_lowers_the_loss(ragged_dataset: SequenceDataset, negatives: str) -> None:
    losses = train(ragged_dataset, Case(negatives), steps=80)["losses"]
    assert losses[-8:].mean() < 0.9 * losses[:8].mean()


def test_the_same_seed_gives_the_same_weights(ragged_dataset: SequenceDataset) -> None:
    one, other = (train(ragged_dataset, Case("block"), steps=3) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


CASES = [
    Case("block"),
    Case("block", "lazy_adamw", ALWAYS_ROWS),
    Case("position", "rowwise_adagrad", ALWAYS_ROWS, max_grad_norm=0.5),
    Case("in-batch", last_only=True),
    Case("catalogue"),
]


def process(rank: int, folder: str, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    dataset = SequenceDataset.open(folder)
    for number, case in enumerate(CASES):
        embedding.DENSE_SHARE = case.dense_share
        torch.save(train(dataset, case), f"{results}/{number}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes had after the steps of every case."""
    folder = tmp_path_factory.mktemp("processes")
    context = quick_start()
    arguments = str(ragged_dataset.folder), str(folder / "rendezvous"), str(folder)
    members = [context.Process(target=process, args=(rank, *arguments)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout=120)
    assert [member.exitcode for member in members] == [0, 0]
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number].negatives))
def test_two_processes_equal_one_with_the_doubled_batch(
    monkeypatch, ragged_dataset: SequenceDataset, two_processes: Path, number: int
) -> None:
    monkeypatch.setattr(embedding, "DENSE_SHARE", CASES[number].dense_share)
    first, second = (torch.load(two_processes / f"{number}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = train(ragged_dataset, CASES[number])
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-4, atol=1e-5)
    for name, expected in alone.items():
        mine, weight = first[name], expected
        if name.endswith("in_proj.bias"):  # no output depends on the keys' bias: its gradient is rounding alone
            weight, mine = (torch.cat([x[:DIM], x[2 * DIM :]]) for x in (weight, mine))
        torch.testing.assert_close(mine, weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
