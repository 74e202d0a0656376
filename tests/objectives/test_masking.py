"""Masking schemes: hidden positions, targets, attention masks, and determinism."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny_models
from generative_recommenders.build.parts import build_task
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.inputs import ModelInputs
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.model import MaskEmbedding
from generative_recommenders.objectives.causal import CausalLastObjective, CausalObjective
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.masked import (
    MaskedItemObjective,
    MaskedObjective,
    PermutedObjective,
)
from generative_recommenders.objectives.replaced import (
    ReplacedDetectionCriterion,
    ReplacedObjective,
    sample_from_catalogue,
)
from generative_recommenders.ops.counter_random import CounterDraws, stream_key
from generative_recommenders.types import SequentialFeatures

HIDING: dict[str, MaskedObjective] = {
    "mlm": MaskedItemObjective(),
    "mlm_never": MaskedItemObjective(0.0),
    "mlm_always": MaskedItemObjective(1.0),
    "plm": PermutedObjective(),
    "plm_dense": PermutedObjective(1.0, max_span_length=3),
    "plm_all": PermutedObjective(permute_all=True),
}
lengths_drawn = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def histories(lengths: list[int], width: int = 12) -> tuple[Tensor, Tensor]:
    counts = torch.tensor(lengths)
    item_ids = torch.arange(1, len(lengths) * width + 1).reshape(len(lengths), width)
    return item_ids * (torch.arange(width) < counts[:, None]), counts


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(rows: int) -> CounterDraws:
    return CounterDraws(stream_key(0), torch.arange(rows))


def training(objective: MaskedObjective, item_ids: Tensor, counts: Tensor, seed: int) -> TrainingExample:
    columns = {"item_ids": item_ids, "lengths": counts, "user_ids": counts}
    return objective.example(columns, seeded(seed))


def rectangle(inputs: ModelInputs, values: Tensor) -> Tensor:
    """Values of tokens as ``[B, N]``, 0 past a row's length."""
    padded = values.new_zeros(inputs.features.past_ids.shape)
    padded[inputs.layout.row_of, inputs.layout.positions] = values
    return padded


def hidden_positions(inputs: ModelInputs) -> Tensor:
    return rectangle(inputs, inputs.replaced)


def sees(inputs: ModelInputs) -> Tensor:
    """``[B, N, N]`` bool: position i sees j."""
    mask = inputs.layout.attention_mask
    key, query = rectangle(inputs, mask.key), rectangle(inputs, mask.query)
    return key[:, None, :] <= query[:, :, None]


@pytest.mark.parametrize("name", HIDING)
@settings(max_examples=25, deadline=None)
@given(lengths=lengths_drawn, seed=st.integers(0, 999))
def test_hidden_positions(name, lengths, seed):
    item_ids, counts = histories(lengths)
    before = item_ids.clone(), counts.clone()
    example = training(HIDING[name], item_ids, counts, seed)
    assert torch.equal(item_ids, before[0]) and torch.equal(counts, before[1])
    replaced = hidden_positions(example)
    assert torch.equal(replaced, hidden_positions(training(HIDING[name], item_ids, counts, seed)))
    hidden, many = replaced.sum(1), counts >= 2
    assert (hidden[many] >= 1).all() and (hidden < counts)[many].all() and not hidden[~many].any()
    assert torch.equal(example.targets, item_ids[replaced]) and bool((example.weights == 1).all())
    assert torch.equal(example.read, example.replaced.nonzero()[:, 0])
    assert torch.equal(example.features.past_ids != 0, item_ids != 0)
    assert torch.equal(example.features.past_lengths, counts)


@pytest.mark.parametrize("name", HIDING)
def test_draws_differ_between_rows_and_seeds(name):
    item_ids, counts = histories([12] * 60)
    replaced, others = (hidden_positions(training(HIDING[name], item_ids, counts, seed)) for seed in (0, 1))
    assert len(replaced.unique(dim=0)) > 5
    assert not torch.equal(replaced, others)


@settings(max_examples=25, deadline=None)
@given(lengths_drawn, st.booleans())
def test_causal_targets_are_the_next_items(lengths, last_only):
    item_ids, counts = histories(lengths)
    columns = {"item_ids": item_ids, "lengths": counts, "user_ids": counts}
    example = (CausalLastObjective if last_only else CausalObjective)().example(columns, torch.Generator())
    assert example.layout.attention_mask is None and example.replaced is None
    past, targets = [], []
    for row, length in enumerate(lengths):
        events = item_ids[row, :length].tolist()
        past += events[:-1]
        targets += events[1:][-1:] if last_only else events[1:]
    assert (example.past_ids.tolist(), example.targets.tolist()) == (past, targets)
    assert example.features.past_lengths.tolist() == [max(length - 1, 0) for length in lengths]


@pytest.mark.parametrize("name", HIDING)
def test_a_query_asks_at_a_slot_after_the_last_item(name):
    item_ids, counts = histories([0, 1, 5, 12])
    query = HIDING[name].query(SequentialFeatures(counts, item_ids, {}))
    input_ids, replaced = query.features.past_ids, hidden_positions(query)
    assert input_ids.shape == (4, 13)
    assert torch.equal(query.features.past_lengths, counts + 1)
    assert replaced.sum(1).tolist() == [1, 1, 1, 1]
    assert replaced.gather(1, counts[:, None]).all()
    assert torch.equal(query.read, query.replaced.nonzero()[:, 0])
    for row, length in enumerate([0, 1, 5, 12]):
        assert torch.equal(input_ids[row, :length], item_ids[row, :length])
        assert (input_ids[row] != 0).sum() == length + 1
        assert sees(query)[row, length, :length].all()


def test_masked_items_see_both_sides():
    item_ids, counts = histories([3, 12])
    assert sees(training(MaskedItemObjective(), item_ids, counts, 0)).all()


@pytest.mark.parametrize("name", ["plm", "plm_dense", "plm_all"])
def test_permuted_attention(name):
    item_ids, counts = histories([2, 6, 12, 12] * 10)
    example = training(HIDING[name], item_ids, counts, 2)
    hidden, open_ = hidden_positions(example), sees(example)
    visible = ~hidden
    assert open_[visible[:, None, :].expand_as(open_)].all()
    assert not open_[hidden[:, None, :] & visible[:, :, None]].any()
    both = hidden[:, None, :] & hidden[:, :, None]
    diagonal = torch.eye(12, dtype=torch.bool)
    assert not open_[both & diagonal].any()
    assert (open_ ^ open_.transpose(1, 2))[both & ~diagonal].all()
    # A total order: within a row, the counts of hidden positions seen are 0, 1, 2, ...
    seen = (open_ & both).sum(2)
    for row in range(len(counts)):
        assert sorted(seen[row, hidden[row]].tolist()) == list(range(int(hidden[row].sum())))


def test_a_query_of_permutations_keeps_the_slot_from_the_items():
    item_ids, counts = histories([4])
    query = PermutedObjective().query(SequentialFeatures(counts, item_ids, {}))
    assert not sees(query)[0, :, 4].any()


def test_permuted_spans_and_shares():
    item_ids, counts = histories([120] * 300, width=120)
    replaced = hidden_positions(training(PermutedObjective(1 / 6, 5), item_ids, counts, 0))
    # One span in every context of 6 times its length, the last context possibly cut.
    assert abs(replaced.float().mean() - 1 / 6) < 0.01
    edges = torch.nn.functional.pad(replaced.int(), (1, 1)).diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    assert set(runs.tolist()) >= {1, 2, 3, 4, 5} and runs.max() <= 10


def test_permute_all_shows_a_random_single_item():
    item_ids, counts = histories([12] * 300)
    replaced = hidden_positions(training(PermutedObjective(permute_all=True), item_ids, counts, 0))
    shown = (~replaced).nonzero()[:, 1]
    assert len(shown) == 300 and set(shown.tolist()) == set(range(12))


def test_masked_share():
    item_ids, counts = histories([100] * 300, width=100)
    replaced = hidden_positions(training(MaskedItemObjective(0.2), item_ids, counts, 0))
    assert abs(replaced.float().mean() - (0.2 + 0.8 / 100)) < 0.01


def test_mask_embedding_replaces_and_learns():
    module = MaskEmbedding(3)
    embeddings = torch.randn(2, 4, 3, requires_grad=True)
    replaced = torch.tensor([[True, False, False, True], [False] * 4])
    out = module(embeddings, replaced)
    assert torch.equal(out[replaced], module.weight.expand(2, 3)) and torch.equal(out[~replaced], embeddings[~replaced])
    out.sum().backward()
    assert module.weight.grad.tolist() == [2.0] * 3 and not embeddings.grad[replaced].any()
    assert torch.equal(module(embeddings.flatten(0, 1), replaced.flatten()), out.flatten(0, 1))


def test_samples_follow_the_softmax_whatever_the_blocks():
    hidden, weight = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.0, 2.0], [1.0, 0.0], [2.0, -1.0]]),
    )
    expected = (hidden @ weight.T).softmax(1)
    for block in (1, 2, 99):
        ids = sample_from_catalogue(hidden.repeat(8000, 1), weight, counted(16000), block).reshape(-1, 2)
        for row in range(2):
            shares = torch.bincount(ids[:, row], minlength=4)[1:] / 8000
            assert torch.allclose(shares, expected[row], atol=0.02)


def test_a_draw_of_zero_does_not_win_over_a_likely_item():
    """All others together have a chance of 1e-11, and the noise of a draw of 0, one of 2^24, would be infinite."""
    rows, weight = torch.tensor([8, 59]), torch.zeros(1_000_000, 1)  # the two of the first 60 that have such a draw
    draws = CounterDraws(stream_key(0), rows)
    assert torch.cat([draws.uniform(65536) for _ in range(15)], dim=1).amin(1).tolist() == [0, 0]
    weight[7] = 40.0
    drawn = sample_from_catalogue(torch.ones(2, 1), weight, CounterDraws(stream_key(0), rows))
    assert drawn.tolist() == [8, 8]


def test_the_discriminator_reads_events_as_they_were():
    """Its inputs but the items are those of a history in which nothing is hidden."""
    columns = tiny_models.ten_users()
    objective = ReplacedObjective(embedding_dim=4, mask_probability=0.5)
    example = objective.example(columns, seeded(3))
    hidden = example.layout.to_rectangle(example.replaced)
    assert hidden.any() and not torch.equal(example.features.past_events["ratings"], columns["ratings"])
    assert torch.equal(example.shown_events["ratings"], columns["ratings"])
    assert torch.equal(example.shown_events["timestamps"], columns["timestamps"])


@pytest.mark.parametrize("from_batch", [False, True])
def test_fakes_are_drawn_from_the_batch_or_the_catalogue(from_batch):
    chosen = tiny_models.settings(
        loss_module="CE", objective="replaced", fakes_from="batch" if from_batch else "catalogue"
    )
    task = build_task(chosen, tiny_models.catalogue(num_items=40))
    criterion = task.criterion
    assert isinstance(criterion, ReplacedDetectionCriterion)
    targets = torch.tensor([3, 9, 9, 4]).repeat(50)
    users = torch.ones_like(targets)
    example = task.prepare(tiny_models.loaded(tiny_models.ten_users()), 0).example
    example = dataclasses.replace(example, targets=targets, weights=users.float(), users=users)
    states = torch.randn(200, 4, generator=seeded(1), requires_grad=True)
    rows = ItemRows(torch.randn(41, 4, generator=seeded(2)))
    fakes = criterion.fakes(states, rows, task.draw(example, 0, 0), task.model.similarity)
    assert not fakes.requires_grad and (fakes >= 1).all() and (fakes <= 40).all()
    assert (set(fakes.tolist()) == {3, 4, 9}) == from_batch


def test_bad_options_are_refused():
    for make in (
        lambda: MaskedItemObjective(1.2),
        lambda: PermutedObjective(0.0),
        lambda: PermutedObjective(max_span_length=0),
    ):
        with pytest.raises(UserError):
            make()


def test_half_precision_samples_keep_their_shares():
    logits = torch.tensor([3.0, 3.0, 3.0, 4.0], dtype=torch.bfloat16)
    ids = sample_from_catalogue(torch.ones(20000, 1, dtype=torch.bfloat16), logits[:, None], counted(20000), 3)
    assert torch.allclose(torch.bincount(ids)[1:] / 20000, logits.float().softmax(0), atol=0.02)
