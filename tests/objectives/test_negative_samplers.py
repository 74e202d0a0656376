"""Negative samplers: what is drawn how often, which positions share a draw, and equality over processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.build.factories import get_negatives_sampler
from generative_recommenders.config.registry import NEGATIVE_SAMPLERS
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.negative_samplers import (
    BatchItems,
    InBatchNegativesSampler,
    LocalNegativesSampler,
    MixedNegativesSampler,
    MultiClassNegativesSampler,
    NegativesSampler,
    PopularityNegativesSampler,
    Sharing,
    alias_table,
)
from generative_recommenders.ops.counter_random import stream_key
from golden_parity import assert_near, load_golden
from tiny_models import contracted

KEY = stream_key(1, 2)
POOL = torch.tensor([2, 3, 5, 7, 11, 13])
COUNTS = torch.tensor([5, 0, 1, 20, 0, 74])
CLASSES = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
PER_POSITION = Sharing()


def in_shares(samplers: list[NegativesSampler], shares: list[float], draws: int) -> MixedNegativesSampler:
    return MixedNegativesSampler(samplers, draws, {str(place): each for place, each in enumerate(shares)})


def local(sharing: Sharing) -> NegativesSampler:
    return LocalNegativesSampler(6, 4, sharing)


def in_batch(sharing: Sharing) -> NegativesSampler:
    return InBatchNegativesSampler(4, sharing, log_q_correction=True, counts=torch.arange(1, 14))


def popularity(sharing: Sharing) -> NegativesSampler:
    return PopularityNegativesSampler(COUNTS, 4, sharing, 0.75, log_q_correction=True)


def multi_class(sharing: Sharing) -> NegativesSampler:
    return MultiClassNegativesSampler(CLASSES, 4, sharing)


def mixed(sharing: Sharing) -> NegativesSampler:
    return in_shares([local(sharing), popularity(sharing), in_batch(sharing)], [2, 1, 1], 4)


def newest(sharing: Sharing) -> NegativesSampler:
    return get_negatives_sampler("newest", 6, 4, sharing, newest=4)


BUILDERS = {
    "local": local, "in-batch": in_batch, "popularity": popularity, "mixed": mixed, "multi-class": multi_class,
    "newest": newest,
}  # fmt: skip
of_every_kind = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def test_every_sampler_is_tested() -> None:
    assert BUILDERS.keys() == {*contracted(NEGATIVE_SAMPLERS)}


def pool_of(sampler: NegativesSampler) -> BatchItems | None:
    return BatchItems(POOL) if sampler.uses_batch_pool else None


@of_every_kind
@pytest.mark.parametrize("granularity", ["position", "block", "batch"])
def test_ids_are_items(build, granularity: str) -> None:
    sampler = build(Sharing(granularity, 8))
    negatives = sampler(KEY, 3, 1000, pool_of(sampler))
    known = {*POOL.tolist(), *range(1, 7)}
    assert set(negatives.ids.unique().tolist()) <= known
    assert negatives.ids.shape == ({"position": 1000, "block": 126, "batch": 1}[granularity], 4)
    assert negatives.per_token(negatives.ids, 1000).shape == (1000, 4)


@of_every_kind
@pytest.mark.parametrize("granularity", ["position", "block", "batch"])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=4))
def test_a_batch_cut_over_processes_draws_the_same(build, granularity: str, cuts: list[int]) -> None:
    sampler = build(Sharing(granularity, 8))
    bounds = [0, *sorted(cuts), 50]
    parts, corrections = [], []
    for start, stop in itertools.pairwise(bounds):
        negatives = sampler(KEY, start, stop - start, pool_of(sampler))
        parts.append(negatives.per_token(negatives.ids, stop - start))
        if negatives.log_q is not None:
            corrections.append(negatives.per_token(negatives.log_q, stop - start))
    whole = sampler(KEY, 0, 50, pool_of(sampler))
    assert torch.equal(torch.cat(parts), whole.per_token(whole.ids, 50))
    if corrections:
        assert torch.equal(torch.cat(corrections), whole.per_token(whole.log_q, 50))


@of_every_kind
def test_keys_and_units_draw_anew(build) -> None:
    sampler = build(PER_POSITION)
    ids = sampler(KEY, 0, 200, pool_of(sampler)).ids
    assert torch.equal(ids, sampler(KEY, 0, 200, pool_of(sampler)).ids)
    assert not torch.equal(ids, sampler(KEY + 1, 0, 200, pool_of(sampler)).ids)
    assert len(ids.unique(dim=0)) > 20


def test_which_tokens_share_a_draw() -> None:
    blocks = local(Sharing("block", 8))(KEY, 5, 20)
    rows = blocks.per_token(blocks.ids, 20)
    assert blocks.lead == 5
    for first, stop in ((0, 3), (3, 11), (11, 19), (19, 20)):
        assert (rows[first:stop] == rows[first]).all()
    assert not torch.equal(rows[2], rows[3])
    batch = local(Sharing("batch"))(KEY, 5, 20)
    assert (batch.per_token(batch.ids, 20) == batch.ids).all()
    assert torch.equal(batch.ids, local(Sharing("batch"))(KEY, 0, 3).ids)


def assert_frequencies(ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Shares of the items 1..V within 5 standard deviations; what has probability 0 never occurs."""
    shares = torch.bincount(ids.flatten(), minlength=len(expected) + 1)[1:] / ids.numel()
    spread = (expected * (1 - expected) / ids.numel()).sqrt()
    assert ((shares - expected).abs() <= 5 * spread).all()


def test_local_is_uniform() -> None:
    assert_frequencies(local(PER_POSITION)(KEY, 0, 20_000).ids, torch.full((6,), 1 / 6))
    assert local(PER_POSITION)(KEY, 0, 3).log_q is None


def test_in_batch_is_uniform_over_the_pool() -> None:
    negatives = InBatchNegativesSampler(4, PER_POSITION)(KEY, 0, 20_000, BatchItems(POOL))
    expected = torch.zeros(13)
    expected[POOL - 1] = 1 / 6
    assert_frequencies(negatives.ids, expected)
    assert negatives.log_q is None


def test_in_batch_correction_is_how_often_an_id_is_drawn() -> None:
    """Over many batches of events drawn by popularity, the share of draws that are item i is q_i."""
    generator, counts = torch.Generator().manual_seed(0), torch.tensor([1, 2, 4, 8, 16, 32])
    sampler = InBatchNegativesSampler(4, PER_POSITION, log_q_correction=True, counts=counts)
    drawn, corrections = torch.zeros(6), torch.zeros(6)
    for batch in range(3000):
        pool = torch.multinomial(counts.float(), 8, replacement=True, generator=generator).unique() + 1
        negatives = sampler(stream_key(batch), 0, 4, BatchItems(pool))
        drawn += torch.bincount(negatives.ids.flatten() - 1, minlength=6)
        corrections.index_add_(0, negatives.ids.flatten() - 1, negatives.log_q.flatten())
    claimed = (corrections / drawn).exp() / 4
    torch.testing.assert_close(claimed, drawn / drawn.sum(), atol=0.02, rtol=0.15)
    assert claimed[5] > 3 * claimed[0]


def test_in_batch_correction_of_a_single_item_and_of_none() -> None:
    sampler = InBatchNegativesSampler(2, PER_POSITION, log_q_correction=True, counts=torch.tensor([9]))
    negatives = sampler(KEY, 0, 3, BatchItems(torch.tensor([1])))
    torch.testing.assert_close(negatives.log_q, torch.full((3, 2), 2.0).log())
    for nothing in (BatchItems(torch.zeros(0, dtype=torch.int64)), None):
        assert sampler(KEY, 0, 0, nothing).ids.shape == (0, 2)


def test_in_batch_pool_is_the_golden_one() -> None:
    """The step's pool: distinct ids, no padding; their normalised embeddings are what is scored."""
    golden = load_golden("meta_inbatch_dedup")
    ids = golden.inputs["ids"]
    pool = torch.unique(ids)
    pool = pool[pool > 0]
    assert torch.equal(pool, golden.outputs["dedup_ids"])
    table = golden.parameters["item_emb.weight"]
    normalised = torch.nn.functional.normalize(table[pool], dim=-1, eps=golden.config["l2_eps"])
    assert_near(normalised, golden.outputs["dedup_embeddings"])
    drawn = InBatchNegativesSampler(8, PER_POSITION)(KEY, 0, 200, BatchItems(pool)).ids
    assert set(drawn.unique().tolist()) == set(golden.outputs["dedup_ids"].tolist())


@pytest.mark.parametrize("pool", [None, torch.zeros(0, dtype=torch.int64)])
def test_in_batch_without_a_pool(pool: torch.Tensor | None) -> None:
    with pytest.raises(UserError, match="in-batch"):
        in_batch(PER_POSITION)(KEY, 0, 3, BatchItems(pool))


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_popularity_follows_the_counts(power: float) -> None:
    sampler = PopularityNegativesSampler(COUNTS, 4, PER_POSITION, power, log_q_correction=True)
    weights = COUNTS.double() ** power * (COUNTS > 0)
    expected = (weights / weights.sum()).float()
    negatives = sampler(KEY, 0, 50_000)
    assert_frequencies(negatives.ids, expected)
    torch.testing.assert_close(negatives.log_q, (4 * expected[negatives.ids - 1]).log())


@pytest.mark.parametrize("power", [-0.5, 150.0, 1e6])
def test_popularity_of_any_power_draws_no_unseen_item(power: float) -> None:
    sampler = PopularityNegativesSampler(COUNTS, 4, PER_POSITION, power, log_q_correction=True)
    negatives = sampler(KEY, 0, 5000)
    assert (COUNTS[negatives.ids - 1] > 0).all()
    assert negatives.log_q.isfinite().all()
    rarest, commonest = (negatives.ids == 3).float().mean(), (negatives.ids == 6).float().mean()
    assert rarest > commonest if power < 0 else commonest == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_alias_table_holds_the_probabilities(counts: list[int]) -> None:
    probability = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    accept, alias = alias_table(probability)
    size = len(counts)
    held = accept.double() / size
    held.index_add_(0, alias, (1 - accept.double()) / size)
    torch.testing.assert_close(held, probability, atol=1e-6, rtol=0)
    assert ((accept[probability == 0] == 0) & (probability[alias[probability == 0]] > 0)).all()


def test_mixed_shares() -> None:
    samplers = [LocalNegativesSampler(1, 1, PER_POSITION), InBatchNegativesSampler(1, PER_POSITION)]
    for num_negatives, shares, expected in ((10, [0.3, 0.7], 3), (3, [1, 1], 2), (7, [1, 9], 1)):
        ids = in_shares(samplers, shares, num_negatives)(KEY, 0, 50, BatchItems(POOL)).ids
        assert ids.shape == (50, num_negatives)
        assert (ids[:, :expected] == 1).all()
        assert (ids[:, expected:] != 1).all()


def test_parts_of_a_mixture_differ() -> None:
    sampler = in_shares([local(PER_POSITION), local(PER_POSITION)], [1, 1], 8)
    ids = sampler(KEY, 0, 100).ids
    assert not torch.equal(ids[:, :4], ids[:, 4:])


def test_classes_and_their_items_are_drawn_uniformly() -> None:
    ids = MultiClassNegativesSampler(CLASSES, 4, PER_POSITION)(KEY, 0, 20_000).ids
    first = (ids <= 2).all(1)
    assert (first | (ids >= 3).all(1)).all()
    assert abs(first.double().mean() - 0.5) < 5 * 0.5 / 20_000**0.5
    assert_frequencies(ids[first], torch.tensor([0.5, 0.5]))
    assert_frequencies(ids[~first] - 2, torch.full((4,), 0.25))


def test_the_class_of_the_target_is_chosen() -> None:
    """Item 3 is in both classes: either is chosen; item 7 is in none: any is."""
    classes = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]).bool()
    sampler = MultiClassNegativesSampler(classes, 4, PER_POSITION, selector="target")
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]).repeat(500)
    ids = sampler(KEY, 0, 4000, BatchItems(targets=targets)).ids
    assert (ids[(targets == 1) | (targets == 2)] <= 3).all()
    assert (ids[(targets >= 4) & (targets <= 6)] >= 3).all()
    for target in (0, 3, 7):
        rows = ids[targets == target]
        assert ((rows <= 3).all(1) | (rows >= 3).all(1)).all()
        assert abs((rows <= 2).any(1).float().mean() - 0.5) < 0.15


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sharing("row"), "unknown negatives_sharing 'row'; known: position, block, batch"),
        (lambda: Sharing("block", 0), "negatives_block_size"),
        (lambda: LocalNegativesSampler(5, 0, PER_POSITION), "num_negatives"),
        (lambda: LocalNegativesSampler(0, 5, PER_POSITION), "no items"),
        (lambda: PopularityNegativesSampler(torch.zeros(3), 2, PER_POSITION, 1.0), "no item occurs"),
        (lambda: PopularityNegativesSampler(COUNTS, 2, PER_POSITION, float("nan")), "power must be finite, got nan"),
        (lambda: InBatchNegativesSampler(2, PER_POSITION, log_q_correction=True), "needs counts"),
        (lambda: MultiClassNegativesSampler(CLASSES, 2, Sharing("block"), selector="target"), "position"),
        (lambda: in_shares([local(PER_POSITION)] * 2, [0.5, 0.5], 1), r"are \[0, 1\] draws"),
        (lambda: in_shares([local(PER_POSITION)], [float("nan")], 2), "shares must be finite"),
        (lambda: in_shares([], [], 2), "0 samplers"),
        (lambda: in_shares([local(PER_POSITION)], [0.0], 2), "1 samplers"),
        (lambda: MultiClassNegativesSampler(CLASSES & False, 2, PER_POSITION), "every class"),
        (lambda: MultiClassNegativesSampler(CLASSES[:0], 2, PER_POSITION), "every class"),
        (lambda: MultiClassNegativesSampler(CLASSES[0], 2, PER_POSITION), "every class"),
    ],
)
def test_errors(build, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        build()
