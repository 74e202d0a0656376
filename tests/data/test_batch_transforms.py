"""Batch transforms: what each does, and that none of them changes the caller's batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from generative_recommenders.compat.replay.negative_transforms import (
    MultiClassNegativeSampling,
    UniformNegativeSampling,
)
from generative_recommenders.data.batch_transforms import (
    Copy,
    EqualityMask,
    Group,
    LastTarget,
    NextToken,
    Rename,
    Select,
    SequenceRoll,
    TokenMask,
    Trim,
    Unsqueeze,
    default_sasrec_transforms,
    default_two_tower_transforms,
)
from generative_recommenders.errors import UserError

ragged = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def histories(lengths: list[int], width: int, seed: int = 0) -> dict[str, Tensor]:
    """A loader's batch: random ids, ratings and increasing times, zeros behind each row's length."""
    generator = torch.Generator().manual_seed(seed)
    shape, counts = (len(lengths), width), torch.tensor(lengths)
    real = torch.arange(width) < counts[:, None]
    return {
        "user_ids": torch.arange(len(lengths)) + 100,
        "lengths": counts,
        "item_ids": torch.randint(1, 50, shape, generator=generator) * real,
        "ratings": torch.randint(1, 6, shape, generator=generator) * real,
        "timestamps": (torch.randint(1, 9, shape, generator=generator).cumsum(1) + 1000) * real,
    }


def every_transform() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    return [
        Copy({"item_ids": "seen_ids"}),
        Rename({"item_ids": "ids"}),
        Group({"events": ["item_ids", "ratings"]}),
        Unsqueeze("item_ids", -1),
        Select(["lengths", "item_ids"]),
        EqualityMask("ratings", 3, "and", mask_name="liked"),
        SequenceRoll("item_ids", -1),
        SequenceRoll("item_ids", 2, padding_value=7),
        Trim(3),
        NextToken(),
        TokenMask(generator=generator),
        UniformNegativeSampling(50, 4, generator=generator),
        MultiClassNegativeSampling(2, torch.ones(8, 50), selector="user_class", generator=generator),
        default_sasrec_transforms(4)["train"],
        default_two_tower_transforms(4)["test"],
    ]


@pytest.mark.parametrize("transform", every_transform(), ids=lambda module: type(module).__name__)
def test_the_callers_batch_is_left_alone(transform):
    batch = histories([0, 1, 4, 6], 6)
    batch |= {"liked": batch["ratings"] > 0, "user_class": torch.tensor([0, 7, 3, 3]), "other": torch.ones(4)}
    before = {name: value.clone() for name, value in batch.items()}
    after = transform(batch)
    assert after is not batch and list(batch) == list(before)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    if not isinstance(transform, Select):
        assert torch.equal(after["other"], before["other"])


@settings(max_examples=30, deadline=None)
@given(ragged, st.integers(1, 3))
def test_next_token_against_lists(lengths, shift):
    batch = histories(lengths, 9)
    after = NextToken(shift)(batch)
    assert after["past_ids"].shape == after["target_ids"].shape == (len(lengths), 9 - shift)
    assert "item_ids" not in after and "lengths" not in after
    for row, length in enumerate(lengths):
        past = max(length - shift, 0)
        assert after["past_lengths"][row] == past
        for column, stem in (("item_ids", "ids"), ("ratings", "ratings"), ("timestamps", "timestamps")):
            events = batch[column][row, :length].tolist()
            assert after[f"past_{stem}"][row].tolist() == events[:past] + [0] * (9 - shift - past)
            expected = events[shift:] if past else []
            assert after[f"target_{stem}"][row, : len(expected)].tolist() == expected
            assert not after[f"target_{stem}"][row, len(expected) :].any()


def test_next_token_takes_columns_with_more_dimensions():
    batch = {"lengths": torch.tensor([2]), "tags": torch.tensor([[[1, 2], [3, 4], [0, 0]]])}
    after = NextToken(columns={"tags": "tags"})(batch)
    assert after["past_tags"].tolist() == [[[1, 2], [0, 0]]]
    assert after["target_tags"].tolist() == [[[3, 4], [0, 0]]]


def test_default_training_set():
    batch = histories([0, 1, 3, 5], 5)
    after = default_sasrec_transforms()["train"](batch)
    events = {f"{side}_{stem}" for side in ("past", "target") for stem in ("ids", "ratings", "timestamps")}
    assert set(after) == {"user_ids", "past_lengths", "next_timestamps"} | events
    assert after["past_lengths"].tolist() == [0, 0, 2, 4]
    assert after["past_ids"].shape == (4, 4)
    times = batch["timestamps"]
    assert after["next_timestamps"].tolist() == [0, 0, int(times[2, 2]), int(times[3, 4])]
    assert ((after["target_ids"] != 0).sum(1) == after["past_lengths"]).all()
    assert ((after["past_ids"] != 0).sum(1) == after["past_lengths"]).all()


def test_default_sets_without_ratings_and_times():
    batch = {name: value for name, value in histories([2, 3], 3).items() if name in ("lengths", "item_ids")}
    after = default_sasrec_transforms()["train"](batch)
    assert set(after) == {"past_lengths", "past_ids", "target_ids"}


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
@pytest.mark.parametrize("make", [default_sasrec_transforms, default_two_tower_transforms])
def test_default_evaluation_sets(make, stage):
    batch = histories([1, 4], 4) | {
        "target_ids": torch.tensor([5, 6]),
        "next_timestamps": torch.tensor([7, 8]),
    }
    after = make()[stage](batch)
    renamed = {"lengths": "past_lengths", "item_ids": "past_ids", "ratings": "past_ratings"}
    renamed["timestamps"] = "past_timestamps"
    assert set(after) == {renamed.get(name, name) for name in batch}
    assert all(after[renamed.get(name, name)] is batch[name] for name in batch)


def test_default_sets_cut_and_take_further_columns():
    batch = histories([2, 6], 6) | {"kinds": torch.arange(12).reshape(2, 6)}
    sets = default_sasrec_transforms(max_sequence_length=3, extra_columns={"kinds": "kinds"})
    train, test = sets["train"](batch), sets["test"](batch)
    assert train["past_ids"].tolist()[1] == batch["item_ids"][1, 2:5].tolist()
    assert train["target_ids"].tolist()[1] == batch["item_ids"][1, 3:].tolist()
    assert train["past_kinds"].tolist() == [[0, 0, 0], [8, 9, 10]]
    assert test["past_ids"].tolist()[1] == batch["item_ids"][1, 3:].tolist()
    assert test["past_lengths"].tolist() == [2, 3] and test["past_kinds"].shape == (2, 3)


@settings(max_examples=30, deadline=None)
@given(ragged, st.integers(1, 10))
def test_trim_keeps_the_newest_events(lengths, seq_len):
    batch = histories(lengths, 9)
    after = Trim(seq_len)(batch)
    width = min(9, seq_len)
    for row, length in enumerate(lengths):
        newest = batch["item_ids"][row, :length].tolist()[-width:]
        assert after["item_ids"][row].tolist() == newest + [0] * (width - len(newest))
        assert after["lengths"][row] == len(newest)


@settings(max_examples=40, deadline=None)
@given(ragged, st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_token_mask_hides_some_and_never_all(lengths, probability, shared, seed):
    batch = histories(lengths, 9)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return TokenMask(probability=probability, generator=generator, shared_mask=shared)(batch)["masked"]

    masked, real = draw(), batch["item_ids"] != 0
    assert torch.equal(masked, draw())
    assert not (masked & ~real).any()
    counts, many = masked.sum(1), batch["lengths"] >= 2
    assert (counts[many] >= 1).all() and (counts < batch["lengths"])[many].all()
    assert not counts[~many].any()


def test_token_mask_probability_rows_and_default_generator():
    batch = {"item_ids": torch.ones(400, 50, dtype=torch.long)}
    masked = TokenMask(probability=0.3, generator=torch.Generator().manual_seed(0))(batch)["masked"]
    assert abs(masked.float().mean() - 0.3) < 0.02
    assert len(masked.unique(dim=0)) == 400
    shared = TokenMask(probability=0.3, shared_mask=True)(batch)["masked"]
    assert len(shared.unique(dim=0)) == 1
    torch.manual_seed(4)
    first = TokenMask()(batch)["masked"]
    torch.manual_seed(4)
    assert torch.equal(first, TokenMask()(batch)["masked"])
    assert TokenMask("m")({"m": torch.tensor([False, True, True])})["masked"].sum() == 1


def test_columns_move_as_told():
    a, b = torch.tensor([[1, 2, 3]], dtype=torch.float).requires_grad_(), torch.tensor([[4, 5, 6]])
    batch: dict[str, Any] = {"a": a, "b": b}
    copied = Copy({"a": "c"})(batch)
    assert torch.equal(copied["c"], a) and not copied["c"].requires_grad
    assert copied["c"].data_ptr() != a.data_ptr() and copied["a"] is a
    assert list(Rename({"a": "x"})(batch)) == ["x", "b"]
    swapped = Rename({"a": "b", "b": "a"})(batch)
    assert swapped["a"] is b and swapped["b"] is a
    grouped = Group({"g": ["a"], "h": ["a", "b"]})(batch)
    assert grouped == {"g": {"a": a}, "h": {"a": a, "b": b}}
    assert Select([("h", "b"), ("h", "a")])(grouped) == {"h": {"b": b, "a": a}}
    assert Unsqueeze("b", 1)(batch)["b"].shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("roll", "expected"),
    [(-1, [2, 3, 9]), (1, [9, 1, 2]), (0, [1, 2, 3]), (-3, [9, 9, 9]), (5, [9, 9, 9])],
)
def test_sequence_roll(roll, expected):
    rolled = SequenceRoll("x", roll, padding_value=9)({"x": torch.tensor([[1, 2, 3]])})
    assert rolled["x"].tolist() == [expected]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("and", [False, True, False]), ("or", [True, True, True]), ("xor", [True, False, True])],
)
def test_equality_mask(mode, expected):
    batch = {"target_padding_mask": torch.tensor([True, True, False]), "kind": torch.tensor([0, 2, 2])}
    assert EqualityMask("kind", 2, mode)(batch)["target_padding_mask"].tolist() == expected


def test_last_target_skips_absent_columns_and_empty_rows():
    assert LastTarget()({"past_lengths": torch.tensor([1])}).keys() == {"past_lengths"}
    batch = {"past_lengths": torch.tensor([0, 2]), "target_timestamps": torch.tensor([[5, 6], [7, 8]])}
    assert LastTarget()(batch)["next_timestamps"].tolist() == [0, 8]


def test_uniform_negatives_are_distinct_real_items():
    transform = UniformNegativeSampling(20, 20, generator=torch.Generator().manual_seed(0))
    assert transform({})["negative_ids"].sort().values.tolist() == list(range(1, 21))
    weights = torch.zeros(20)
    weights[[2, 5, 11]] = torch.tensor([1.0, 1.0, 8.0])
    generator = torch.Generator().manual_seed(0)
    weighted = UniformNegativeSampling(20, 1, weights, generator)
    draws = torch.cat([weighted({})["negative_ids"] for _ in range(2000)])
    assert set(draws.tolist()) == {3, 6, 12}
    assert abs((draws == 12).float().mean() - 0.8) < 0.04
    repeated = [
        UniformNegativeSampling(99, 5, generator=torch.Generator().manual_seed(7))({}) for _ in range(2)
    ]
    assert torch.equal(repeated[0]["negative_ids"], repeated[1]["negative_ids"])


def test_multi_class_negatives_come_from_the_rows_class():
    classes = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    selector = torch.tensor([1, 0, 0, 1])
    transform = MultiClassNegativeSampling(2, classes, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        drawn = transform({"negative_selector": selector})["negative_ids"]
        assert drawn.shape == (4, 2)
        assert ((drawn > 3) == selector.bool()[:, None]).all() and (drawn >= 1).all() and (drawn <= 6).all()
        assert (drawn[:, 0] != drawn[:, 1]).all()
        assert torch.equal(drawn[0], drawn[3]) and torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    "transform",
    [
        Copy({"g": "h"}),
        Unsqueeze("g", 0),
        SequenceRoll("g"),
        EqualityMask("g", 1, mask_name="m"),
        TokenMask("g"),
    ],
)
def test_a_group_where_a_tensor_is_needed(transform):
    batch = {"g": {"a": torch.ones(1, 2)}, "m": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(UserError, match="'g' must be a tensor, not a group of columns"):
        transform(batch)
    with pytest.raises(UserError, match="'g' must be a tensor, not a list"):
        transform({**batch, "g": ["a"]})


def test_user_faults_are_one_clear_line():
    ids = {"item_ids": torch.tensor([[1, 2]]), "lengths": torch.tensor([2])}
    for transform, words in [
        (Copy({"x": "y"}), "Copy: the batch has no column 'x'; its columns: item_ids, lengths"),
        (Rename({"x": "y"}), "no column 'x'"),
        (Rename({"item_ids": "lengths"}), "would overwrite"),
        (Group({"g": ["x"]}), "no column 'x'"),
        (Group({"lengths": ["item_ids"]}), "already a column"),
        (Select([("item_ids",), "x"]), "no column 'x'"),
        (NextToken(shift=2), "needs more than shift=2"),
        (NextToken(lengths="n"), "no column 'n'"),
        (MultiClassNegativeSampling(1, torch.ones(2, 3), selector="lengths"), "between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=words):
            transform(ids)
    for make, words in [
        (lambda: NextToken(shift=0), "at least 1"),
        (lambda: Trim(0), "at least 1"),
        (lambda: TokenMask(probability=1.5), "between 0 and 1"),
        (lambda: EqualityMask("x", 1, "nand"), "known: and, or, xor"),  # type: ignore[arg-type]
        (lambda: Select([("a", "b", "c")]), "pair"),
        (lambda: UniformNegativeSampling(3, 4), "pool of 3"),
        (lambda: UniformNegativeSampling(3, 0), "at least 1"),
        (lambda: UniformNegativeSampling(3, 1, torch.ones(4)), "one per item"),
        (lambda: UniformNegativeSampling(2, 1, torch.tensor([-1.0, 2.0])), "not negative"),
        (lambda: MultiClassNegativeSampling(2, torch.tensor([[1, 1], [1, 0]])), "pool of 1"),
        (lambda: MultiClassNegativeSampling(1, torch.ones(3)), "classes, items"),
    ]:
        with pytest.raises(UserError, match=words):
            make()
