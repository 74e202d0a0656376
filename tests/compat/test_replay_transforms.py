"""RePlay's transforms and filter: golden numbers, documented examples, and what we do differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.data import FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo
from generative_recommenders.compat.replay.nn.lightning.postprocessor import SeenItemsFilter
from generative_recommenders.compat.replay.nn.transform import (
    CopyTransform,
    EqualityMaskTransform,
    GroupTransform,
    MultiClassNegativeSamplingTransform,
    NextTokenTransform,
    RenameTransform,
    SelectTransform,
    SequenceRollTransform,
    TokenMaskTransform,
    TrimTransform,
    UniformNegativeSamplingTransform,
    UnsqueezeTransform,
)
from generative_recommenders.compat.replay.nn.transform.template import (
    make_default_sasrec_transforms,
    make_default_twotower_transforms,
)
from generative_recommenders.errors import UserError
from golden_parity import read_golden
from replay_scenes import item_schema


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_golden("replay_transforms")


def batch_of(tensors: dict[str, Tensor], side: str, case: str, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """The stored batch of one case, groups rebuilt, without the columns that are options and not input."""
    batch: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith(f"{side}/{case}/"):
            group, _, name = key.split("/")[2].rpartition(".")
            if name not in leave:
                (batch.setdefault(group, {}) if group else batch)[name] = value
    return batch


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(actual[name], value)
        else:
            assert actual[name].dtype == value.dtype
            assert torch.equal(actual[name], value), name


def fixed_transforms(tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, nn.Module]:
    queries, padding = ["user_id", "query_features"], meta["config"]["V"]
    seq_len = tensors["output/trim/item_id"].shape[1]
    value = int(meta["notes"]["equality_mask_and/or/xor"].split("==")[1].strip(" )"))
    return {
        "copy": CopyTransform({"item_id": "seen_ids"}),
        "group": GroupTransform({"feature_tensors": ["item_id", "cat", "absent"]}),
        "rename": RenameTransform({"item_id_mask": "padding_mask"}),
        "unsqueeze": UnsqueezeTransform("positive_labels", dim=-1),
        "next_token_shift1": NextTokenTransform("item_id", shift=1, query_features=queries),
        "next_token_shift2": NextTokenTransform("item_id", shift=2, query_features=queries),
        "trim": TrimTransform(seq_len, ["item_id", "item_id_mask"]),
        "select": SelectTransform(["user_id", ("feature_tensors", "item_id")]),
        "roll_minus1": SequenceRollTransform("item_id", roll=-1, padding_value=padding),
        "roll_plus1": SequenceRollTransform("item_id", roll=1, padding_value=padding),
        **{f"equality_mask_{mode}": EqualityMaskTransform("cat", value, mode) for mode in ("and", "or", "xor")},
    }


def test_fixed_transforms_match_golden(golden):
    tensors, meta = golden
    for case, transform in fixed_transforms(tensors, meta).items():
        before = batch_of(tensors, "input", case)
        assert before, case
        assert_same(transform(before), batch_of(tensors, "output", case))


def token_mask_cases(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({key.split("/")[1] for key in tensors if key.startswith("input/token_mask")})


def stored_draws(monkeypatch: pytest.MonkeyPatch, draws: Tensor) -> None:
    """Makes the transform use the reference's stored uniform draws (any, where none are stored)."""
    monkeypatch.setattr(
        "generative_recommenders.compat.replay.nn.transform.uniform",
        lambda shape, device, generator: draws.expand(*shape) if len(draws) else torch.full(shape, 0.5),
    )


def mask_prob(case: str) -> float:
    return 0.0 if "all_kept" in case else 1.5 if "all_masked" in case else 0.15


def test_token_mask_matches_golden_with_the_shared_option(golden, monkeypatch):
    tensors, _ = golden
    cases = token_mask_cases(tensors)
    assert len(cases) >= 5
    for case in cases:
        stored_draws(monkeypatch, tensors[f"input/{case}/rand"])
        transform = TokenMaskTransform("item_id_mask", mask_prob=mask_prob(case), shared_mask=True)
        after = transform(batch_of(tensors, "input", case, leave=("rand",)))
        assert_same(after, batch_of(tensors, "output", case))


def test_token_mask_default_matches_golden_rows_except_kept_padding(golden, monkeypatch):
    tensors, _ = golden
    for case in token_mask_cases(tensors):
        real = tensors[f"input/{case}/item_id_mask"]
        if real.dim() > 1:
            continue
        stored_draws(monkeypatch, tensors[f"input/{case}/rand"])
        after = TokenMaskTransform("item_id_mask", mask_prob=mask_prob(case))({"item_id_mask": real})
        assert torch.equal(after["token_mask"], tensors[f"output/{case}/token_mask"] & real), case


def test_token_mask_draws_are_per_user_and_never_hide_padding():
    real = torch.arange(8) >= torch.tensor([[0], [3], [6], [7], [8]] * 40)
    masks = TokenMaskTransform("m", generator=torch.Generator().manual_seed(3))({"m": real})["token_mask"]
    assert not (masks & ~real).any()
    many = real.sum(1) >= 2
    assert (masks.sum(1) >= 1)[many].all() and (masks.sum(1) < real.sum(1))[many].all()
    full = masks[real.all(1)]
    assert len(full.unique(dim=0)) > 5
    shared = TokenMaskTransform("m", generator=torch.Generator().manual_seed(3), shared_mask=True)
    rows = shared({"m": real})["token_mask"][:-5][real.all(1)[:-5]]
    assert len(rows.unique(dim=0)) == 1


def test_negative_samplings_match_golden(golden):
    tensors, meta = golden
    config = meta["config"]
    for case in ("uniform_negatives", "uniform_negatives_weighted"):
        before = batch_of(tensors, "input", case, leave=("sample_distribution",))
        transform = UniformNegativeSamplingTransform(
            config["V"],
            config["K"],
            sample_distribution=tensors.get(f"input/{case}/sample_distribution"),
            generator=torch.Generator().manual_seed(config["seed"]),
        )
        assert_same(transform(before), batch_of(tensors, "output", case))
    expected = batch_of(tensors, "output", "multi_class_negatives")
    transform = MultiClassNegativeSamplingTransform(
        expected["negative_labels"].shape[1],
        tensors["input/multi_class_negatives/sample_mask"],
        generator=torch.Generator().manual_seed(config["seed"]),
    )
    before = batch_of(tensors, "input", "multi_class_negatives", leave=("sample_mask",))
    assert_same(transform(before), expected)


def test_seen_items_filter_matches_golden():
    tensors, meta = read_golden("replay_seen_items_filter")
    batch = {"seen_ids": tensors["input/seen_ids"]}
    seen_filter = SeenItemsFilter(meta["config"]["V"])
    cases = [(None, "logits", "all"), ("candidates", "candidate_logits", "candidates")]
    for candidates, logits, output in [*cases, ("row_candidates", "candidate_logits", "row_candidates")]:
        seen_filter.candidates = None if candidates is None else tensors[f"input/{candidates}"]
        scores = tensors[f"input/{logits}"]
        before = scores.clone()
        for filtered in (seen_filter.on_prediction(batch, scores), seen_filter.on_validation(batch, scores)):
            assert torch.equal(filtered, tensors[f"output/{output}"])
        assert torch.equal(scores, before)


def example(transform: nn.Module, before: dict[str, Any], after: dict[str, Any]) -> None:
    copied = {name: value.clone() for name, value in before.items()}
    assert_same(transform(before), after)
    assert_same(before, copied)


def test_documented_examples_of_columns():
    mask = torch.BoolTensor([False, True, True])
    example(
        CopyTransform({"item_id_mask": "padding_id"}),
        {"item_id_mask": mask},
        {"item_id_mask": mask, "padding_id": mask},
    )
    items = {"item_id": torch.LongTensor([[30, 22, 1]]), "item_feature": torch.LongTensor([[1, 11, 11]])}
    example(GroupTransform({"feature_tensors": ["item_id", "item_feature"]}), items, {"feature_tensors": items})
    example(RenameTransform({"item_id_mask": "padding_id"}), {"item_id_mask": mask}, {"padding_id": mask})
    example(UnsqueezeTransform("padding_id", dim=0), {"padding_id": mask}, {"padding_id": mask[None]})
    grouped = {"feature_1": torch.tensor([1]), "feature_2": torch.tensor([2])}
    group = {"feature_3": torch.tensor([3]), "feature_4": torch.tensor([4])}
    selected = SelectTransform(["feature_1", ("feature_2",), ("feature_group", "feature_3")])(
        {**grouped, "feature_group": group}
    )
    assert_same(selected, {**grouped, "feature_group": {"feature_3": torch.tensor([3])}})
    valid = torch.BoolTensor([[0, 1, 1, 1, 1]])
    events = torch.LongTensor([0, 3, 2, 1, 2])
    example(
        EqualityMaskTransform(feature_name="events_type", equality_value=2, mode="and"),
        {"target_padding_mask": valid, "events_type": events},
        {"target_padding_mask": torch.BoolTensor([[0, 0, 1, 0, 1]]), "events_type": events},
    )


def test_documented_examples_of_sequences():
    user, items = torch.LongTensor([111]), torch.LongTensor([[5, 4, 0, 7, 4]])
    example(
        NextTokenTransform(label_field="item_id", shift=1, query_features="user_id"),
        {
            "user_id": user,
            "item_id": torch.LongTensor([[5, 0, 7, 4]]),
            "item_id_mask": torch.BoolTensor([[0, 1, 1, 1]]),
        },
        {
            "user_id": user,
            "item_id": torch.LongTensor([[5, 0, 7]]),
            "item_id_mask": torch.BoolTensor([[0, 1, 1]]),
            "positive_labels": torch.LongTensor([[0, 7, 4]]),
            "positive_labels_mask": torch.BoolTensor([[1, 1, 1]]),
        },
    )
    example(
        TrimTransform(seq_len=3, feature_names="item_id"),
        {"user_id": user, "item_id": items, "seen_ids": items},
        {"user_id": user, "item_id": torch.LongTensor([[0, 7, 4]]), "seen_ids": items},
    )
    example(
        SequenceRollTransform("item_id", roll=-1, padding_value=10),
        {"item_id": torch.LongTensor([[2, 3, 1]])},
        {"item_id": torch.LongTensor([[3, 1, 10]])},
    )


def test_documented_examples_of_draws():
    torch.manual_seed(0)
    real = torch.BoolTensor([0, 1, 1])
    example(
        TokenMaskTransform("padding_id"),
        {"padding_id": real},
        {"padding_id": real, "token_mask": torch.BoolTensor([0, 1, 0])},
    )
    torch.manual_seed(0)
    items = torch.LongTensor([[1, 0, 4]])
    example(
        UniformNegativeSamplingTransform(cardinality=4, num_negative_samples=2),
        {"item_id": items},
        {"item_id": items, "negative_labels": torch.tensor([2, 1])},
    )
    torch.manual_seed(0)
    sample_mask = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]])
    selector = torch.tensor([0, 2, 1, 1, 0])
    example(
        MultiClassNegativeSamplingTransform(num_negative_samples=2, sample_mask=sample_mask),
        {"negative_selector": selector},
        {
            "negative_selector": selector,
            "negative_labels": torch.tensor([[2, 0], [5, 1], [3, 4], [3, 4], [2, 0]]),
        },
    )


def test_documented_example_of_the_filter():
    logits = torch.tensor([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
    seen_items = torch.tensor([[1, 0, 3], [1, 2, 1]])
    inf = float("inf")
    expected = torch.tensor([[-inf, -inf, 0.3], [-0.1, -inf, -inf]])
    assert torch.equal(SeenItemsFilter(3).on_prediction({"seen_ids": seen_items}, logits), expected)
    named = SeenItemsFilter(item_count=3, seen_items_column="history")
    assert torch.equal(named.on_validation({"history": seen_items}, logits), expected)


@pytest.mark.parametrize("make", [make_default_sasrec_transforms, make_default_twotower_transforms])
def test_default_sets(make):
    price = TensorFeatureInfo("price", FeatureType.NUMERICAL, is_seq=True)
    schema = item_schema(9, price)
    sets = make(schema, query_column="user")
    assert set(sets) == {"train", "validate", "test", "predict"}
    assert sets["validation"] is sets["validate"]
    batch = {
        "user": torch.tensor([[7], [8]]),
        "item_id": torch.tensor([[3, 1, 2], [0, 1, 2]]),
        "item_id_mask": torch.tensor([[False, True, True], [True, True, True]]),
        "price": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "seen_ids": torch.tensor([5, 6]),
    }
    after = nn.Sequential(*sets["train"])(batch)
    assert set(after) == {
        "user", "seen_ids", "padding_mask", "target_padding_mask", "positive_labels", "feature_tensors"
    }  # fmt: skip
    assert torch.equal(after["user"], batch["user"])
    assert torch.equal(after["positive_labels"], batch["item_id"][:, 1:, None])
    assert torch.equal(after["target_padding_mask"], batch["item_id_mask"][:, 1:, None])
    assert torch.equal(after["padding_mask"], batch["item_id_mask"][:, :-1])
    assert_same(after["feature_tensors"], {name: batch[name][:, :-1] for name in schema.names})
    for stage in ("validate", "test", "predict"):
        kept = nn.Sequential(*sets[stage])(batch)
        assert_same(kept["feature_tensors"], {name: batch[name] for name in schema.names})
        assert set(kept) == {"user", "seen_ids", "padding_mask", "feature_tensors"}


@pytest.mark.parametrize("names", [["a"], None])
def test_next_token_names_a_column_that_is_no_tensor(names):
    batch = {"item_id": torch.tensor([[1, 2]]), "item_id_mask": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(UserError, match="NextTokenTransform: 'names' must be a tensor"):
        NextTokenTransform("item_id")({**batch, "names": names})
    with pytest.raises(UserError, match="NextTokenTransform: 'names' must be a tensor"):
        NextTokenTransform("item_id")({**batch, "group": {"names": names}})
    with pytest.raises(UserError, match="'names' must be a tensor"):
        NextTokenTransform("names")({**batch, "names": names})


@pytest.mark.parametrize("seen_ids", [torch.tensor([0, 1]), torch.tensor([[0]]), torch.zeros(2, 1, 1), [[0], [1]]])
def test_seen_ids_of_another_shape_are_refused(seen_ids):
    with pytest.raises(UserError, match="SeenItemsFilter: 'seen_ids'"):
        SeenItemsFilter(3).on_prediction({"seen_ids": seen_ids}, torch.zeros(2, 3))


def test_columns_move_as_told():
    a, b = torch.tensor([[1, 2, 3]], dtype=torch.float).requires_grad_(), torch.tensor([[4, 5, 6]])
    batch: dict[str, Any] = {"a": a, "b": b}
    copied = CopyTransform({"a": "c"})(batch)
    assert torch.equal(copied["c"], a) and not copied["c"].requires_grad
    assert copied["c"].data_ptr() != a.data_ptr() and copied["a"] is a
    assert list(RenameTransform({"a": "x"})(batch)) == ["x", "b"]
    swapped = RenameTransform({"a": "b", "b": "a"})(batch)
    assert swapped["a"] is b and swapped["b"] is a
    grouped = GroupTransform({"g": ["a"], "h": ["a", "b"]})(batch)
    assert grouped == {"g": {"a": a}, "h": {"a": a, "b": b}}
    assert SelectTransform([("h", "b"), ("h", "a")])(grouped) == {"h": {"b": b, "a": a}}
    assert SelectTransform(["h", ("h", "a")])(grouped) == {"h": {"a": a, "b": b}}
    assert UnsqueezeTransform("b", 1)(batch)["b"].shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("roll", "expected"),
    [(-1, [2, 3, 9]), (1, [9, 1, 2]), (0, [1, 2, 3]), (-3, [9, 9, 9]), (5, [9, 9, 9])],
)
def test_sequence_roll(roll, expected):
    rolled = SequenceRollTransform("x", roll, padding_value=9)({"x": torch.tensor([[1, 2, 3]])})
    assert rolled["x"].tolist() == [expected]


def test_uniform_negatives_are_distinct_real_items():
    transform = UniformNegativeSamplingTransform(20, 20, generator=torch.Generator().manual_seed(0))
    assert transform({})["negative_labels"].sort().values.tolist() == list(range(20))
    weights = torch.zeros(20)
    weights[[2, 5, 11]] = torch.tensor([1.0, 1.0, 8.0])
    generator = torch.Generator().manual_seed(0)
    weighted = UniformNegativeSamplingTransform(20, 1, sample_distribution=weights, generator=generator)
    draws = torch.cat([weighted({})["negative_labels"] for _ in range(2000)])
    assert set(draws.tolist()) == {2, 5, 11}
    assert abs((draws == 11).float().mean() - 0.8) < 0.04
    repeated = [
        UniformNegativeSamplingTransform(99, 5, generator=torch.Generator().manual_seed(7))({}) for _ in range(2)
    ]
    assert torch.equal(repeated[0]["negative_labels"], repeated[1]["negative_labels"])


def test_multi_class_negatives_come_from_the_rows_class():
    classes = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    selector = torch.tensor([1, 0, 0, 1])
    transform = MultiClassNegativeSamplingTransform(2, classes, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        drawn = transform({"negative_selector": selector})["negative_labels"]
        assert drawn.shape == (4, 2)
        assert ((drawn >= 3) == selector.bool()[:, None]).all() and (drawn >= 0).all() and (drawn < 6).all()
        assert (drawn[:, 0] != drawn[:, 1]).all()
        assert torch.equal(drawn[0], drawn[3]) and torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    "transform",
    [
        CopyTransform({"g": "h"}),
        UnsqueezeTransform("g", 0),
        SequenceRollTransform("g"),
        EqualityMaskTransform("g", 1, mask_name="m"),
        TokenMaskTransform("g"),
    ],
)
def test_a_group_where_a_tensor_is_needed(transform):
    batch = {"g": {"a": torch.ones(1, 2)}, "m": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(UserError, match="'g' must be a tensor, not a group of columns"):
        transform(batch)
    with pytest.raises(UserError, match="'g' must be a tensor, not a list"):
        transform({**batch, "g": ["a"]})


def test_faults_of_columns_and_weights_are_one_clear_line():
    ids = {"item_ids": torch.tensor([[1, 2]]), "lengths": torch.tensor([2])}
    for transform, words in [
        (
            CopyTransform({"x": "y"}),
            "CopyTransform: the batch has no column 'x'; it has item_ids, lengths",
        ),
        (RenameTransform({"x": "y"}), "no column 'x'"),
        (RenameTransform({"item_ids": "lengths"}), "would overwrite"),
        (GroupTransform({"lengths": ["item_ids"]}), "already a column"),
        (SelectTransform([("item_ids",), "x"]), "no column 'x'"),
        (SelectTransform([("item_ids", "x")]), "SelectTransform: 'item_ids' is no group of columns"),
        (
            MultiClassNegativeSamplingTransform(1, torch.ones(2, 3), negative_selector_name="lengths"),
            "between 0 and 1",
        ),
        (MultiClassNegativeSamplingTransform(1, torch.ones(2, 3)), "no column 'negative_selector'"),
        (NextTokenTransform("item_ids"), "item_ids_mask"),
        (NextTokenTransform("item_ids", shift=2, mask_postfix=""), "with L at least 3"),
        (TrimTransform(3, "item_ids"), "with L at least 3"),
        (TokenMaskTransform("absent"), "no column 'absent'"),
    ]:
        with pytest.raises(UserError, match=words):
            transform(ids)
    with pytest.raises(UserError, match="2 scores a row for 3 items"):
        SeenItemsFilter(3).on_prediction({"seen_ids": torch.tensor([[0]])}, torch.zeros(1, 2))
    for make, words in [
        (lambda: NextTokenTransform("x", shift=0), "at least 1"),
        (lambda: TrimTransform(0, "x"), "must be positive"),
        (lambda: EqualityMaskTransform("x", 1, "nand"), "known: and, or, xor"),  # type: ignore[arg-type]
        (lambda: SelectTransform([("a", "b", "c")]), "pair"),
        (lambda: UniformNegativeSamplingTransform(3, 4), "pool of 3"),
        (lambda: UniformNegativeSamplingTransform(3, 0), "at least 1"),
        (lambda: UniformNegativeSamplingTransform(3, 1, sample_distribution=torch.ones(4)), "one per item"),
        (
            lambda: UniformNegativeSamplingTransform(2, 1, sample_distribution=torch.tensor([-1.0, 2.0])),
            "not negative",
        ),
        (lambda: MultiClassNegativeSamplingTransform(2, torch.tensor([[1, 1], [1, 0]])), "pool of 1"),
        (lambda: MultiClassNegativeSamplingTransform(1, torch.ones(3)), "classes, items"),
        (lambda: MultiClassNegativeSamplingTransform(1, torch.ones(0, 3)), "no classes"),
        (
            lambda: UniformNegativeSamplingTransform(3, 2, sample_distribution=torch.tensor([0.0, 1.0, 0.0])),
            "pool of 1",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            make()


@pytest.mark.parametrize(
    "transform", [TrimTransform(2, "user"), SequenceRollTransform("user"), NextTokenTransform("user")]
)
def test_a_column_without_sequences_is_refused(transform):
    batch = {"user": torch.arange(3), "user_mask": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(UserError, match=r"'user' \(3,\) must be \[B, L\]"):
        transform(batch)
