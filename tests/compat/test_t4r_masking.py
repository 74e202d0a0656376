"""Transformers4Rec's masking classes: golden numbers, statistics of the draws, and what we do differently."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from generative_recommenders.compat.transformers4rec.masking import (
    CausalLanguageModeling,
    MaskedLanguageModeling,
    MaskingInfo,
    MaskSequence,
    PermutationLanguageModeling,
    ReplacementLanguageModeling,
)
from generative_recommenders.errors import UserError
from golden_parity import read_golden

CLASSES: dict[str, type[MaskSequence]] = {
    "clm": CausalLanguageModeling,
    "mlm": MaskedLanguageModeling,
    "plm": PermutationLanguageModeling,
    "rtd": ReplacementLanguageModeling,
}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_golden("t4r_masking")


def cases(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({key.split("/")[1] for key in tensors if key.startswith("output/")})


def build(case: str, tensors: dict[str, Tensor]) -> tuple[MaskSequence, dict[str, bool]]:
    """The module and mode that a golden case was computed with, from its name (``clm_train_last``)."""
    name, mode, *rest = case.split("_")
    options: dict[str, Any] = {"eval_on_last_item_seq_only": rest != ["all"]}
    if mode == "train":
        options["train_on_last_item_seq_only"] = rest == ["last"]
    embedding = tensors["param/masked_item_embedding"]
    module = CLASSES[name](len(embedding), **options)
    module.load_state_dict({"masked_item_embedding": embedding})
    return module, {"training": mode == "train", "inference": mode not in ("train", "eval")}


def test_golden_schema_targets_inputs_and_attention(golden):
    tensors, _ = golden
    item_ids, inputs = tensors["input/item_ids"], tensors["input/inputs"]
    assert len(cases(tensors)) >= 14
    for case in cases(tensors):
        module, mode = build(case, tensors)
        before = item_ids.clone(), inputs.clone()
        info = module.compute_masked_targets(item_ids, **mode)
        assert isinstance(info, MaskingInfo)
        masked = module.apply_mask_to_inputs(inputs, info.schema)
        results = {
            "schema": info.schema,
            "targets": info.targets,
            "inputs": masked,
            **module.transformer_arguments,
        }
        expected = {key.split("/")[2]: value for key, value in tensors.items() if key.startswith(f"output/{case}/")}
        assert results.keys() == expected.keys(), case
        for name, value in expected.items():
            assert results[name].dtype == value.dtype, (case, name)
            assert torch.equal(results[name], value), (case, name)
        assert torch.equal(module(inputs, item_ids, **mode), masked)
        assert module.mask_schema is not None and torch.equal(module.mask_schema, info.schema)
        assert torch.equal(item_ids, before[0]) and torch.equal(inputs, before[1])


def test_without_training_the_last_item_is_evaluated(golden):
    """As documented; inference has an argument of its own."""
    item_ids = golden[0]["input/item_ids"]
    lengths = (item_ids != 0).sum(1)
    last = item_ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    for name in CLASSES:
        module = build(f"{name}_eval", golden[0])[0]
        for info in (module.compute_masked_targets(item_ids), module.compute_masked_targets(item_ids, False)):
            assert torch.equal(info.targets.sum(1), last)
            assert ((info.targets != 0).sum(1) == (lengths > 0)).all()


def test_training_goes_before_inference(golden):
    """Asked for both, a call trains: its targets are labels."""
    item_ids, inputs = golden[0]["input/item_ids"], golden[0]["input/inputs"]
    for name in CLASSES:
        module = build(f"{name}_eval", golden[0])[0]
        masked = []
        for further in ({}, {"inference": True}):
            torch.manual_seed(3)
            masked.append(module(inputs, item_ids, training=True, **further))
            assert module.has_labels
        assert torch.equal(*masked), name


def test_a_subclass_may_take_the_documented_two_arguments(golden):
    item_ids, inputs = golden[0]["input/item_ids"], golden[0]["input/inputs"]

    class FirstItem(MaskSequence):
        def compute_masked_targets(self, item_ids, training=False):
            schema = torch.zeros_like(item_ids, dtype=torch.bool)
            schema[:, 0] = True
            return MaskingInfo(schema, item_ids.where(schema, 0))

    module = FirstItem(inputs.shape[2])
    for training in (True, False):
        masked = module(inputs, item_ids, training=training)
        assert (masked[:, 0] == module.masked_item_embedding).all()
        assert torch.equal(masked[:, 1:], inputs[:, 1:])
        assert torch.equal(module.masked_targets[:, 0], item_ids[:, 0])


def test_a_schema_of_another_width_is_refused():
    module = MaskedLanguageModeling(4)
    with pytest.raises(UserError, match=r"schema \(2, 5\)"):
        module.apply_mask_to_inputs(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.bool))


def test_predict_all_asks_for_every_next_item(golden):
    tensors, _ = golden
    for name in CLASSES:
        info = build(f"{name}_eval", tensors)[0].predict_all(tensors["input/item_ids"])
        assert torch.equal(info.targets, tensors["output/clm_eval_all/targets"])
        assert torch.equal(info.schema, tensors["output/clm_eval_all/schema"])


def build_random(name: str) -> MaskSequence:
    """The module of one entry of the statistics, from its name (``plm_p1/6_span5``, ``mlm_p0.15``)."""
    kind, *options = name.split("_")
    if options == ["permute", "all"]:
        return CLASSES[kind](4, permute_all=True)
    arguments: dict[str, Any] = {}
    for option in options:
        if option.startswith("span"):
            arguments["max_span_length"] = int(option.removeprefix("span"))
        else:
            arguments["plm_probability" if kind == "plm" else "mlm_probability"] = float(Fraction(option[1:]))
    return CLASSES[kind](4, **arguments)


def test_statistics_of_the_draws(golden):
    statistics = golden[1]["random_statistics"]
    names = [name for name, entry in statistics.items() if isinstance(entry, dict)]
    assert {name.split("_")[0] for name in names} == {"mlm", "plm", "rtd"}
    for name in names:
        compare_draws(name, statistics)


def compare_draws(name: str, statistics: dict[str, Any]) -> None:
    item_ids = torch.tensor(statistics["item_ids"])
    lengths = (item_ids != 0).sum(1)
    module, expected, draws = build_random(name), statistics[name], 400
    torch.manual_seed(17)
    infos = [module.compute_masked_targets(item_ids, training=True) for _ in range(draws)]
    schema = torch.stack([info.schema for info in infos])
    targets = torch.stack([info.targets for info in infos])
    assert torch.equal(targets, torch.where(schema, item_ids, 0))
    assert not schema[:, item_ids == 0].any()
    counts = schema.sum(2).double()
    many = lengths >= 2
    assert (counts[:, many] >= 1).all() and (counts < lengths).all()
    # Rows in which that library hid all or nothing (a fault of its own) are not comparable.
    error = counts.std(0) * (1 / draws + 1 / statistics["draws"]) ** 0.5
    difference = (counts.mean(0) - torch.tensor(expected["mean_masked_per_row"])).abs()
    least, most = (torch.tensor(expected[f"{end}_masked_per_row"]) for end in ("min", "max"))
    compared = many & (least >= 1) & (most < lengths)
    assert compared.sum() >= 3
    assert (difference <= 4 * error + 1e-9)[compared].all(), (name, difference, error)


def test_permuted_attention_hides_what_is_asked(golden):
    item_ids = torch.tensor(golden[1]["random_statistics"]["item_ids"])
    module = PermutationLanguageModeling(4, plm_probability=0.5)
    torch.manual_seed(5)
    for _ in range(20):
        schema = module.compute_masked_targets(item_ids, training=True).schema
        closed = module.transformer_arguments["perm_mask"].bool()
        assert torch.equal(closed & ~schema[:, None, :], torch.zeros_like(closed))
        assert closed.diagonal(dim1=1, dim2=2)[schema].all()
        both = schema[:, None, :] & schema[:, :, None]
        apart = ~torch.eye(schema.shape[1], dtype=torch.bool)
        one_way = closed ^ closed.transpose(1, 2)
        assert one_way[both & apart].all()


def test_fakes_and_labels():
    module = ReplacementLanguageModeling(4, padding_idx=0)
    item_ids = torch.tensor([[3, 4, 5, 0], [6, 2, 0, 0]])
    targets = torch.tensor([[0, 4, 5, 0], [6, 0, 0, 0]])
    sure = torch.full((3, 9), -50.0)
    sure[torch.arange(3), torch.tensor([8, 5, 1])] = 50.0
    sure[:, 0] = 60.0  # the padding must not be drawn even when it scores best
    corrupted, labels, updates = module.get_fake_tokens(item_ids, targets.flatten(), sure)
    assert corrupted.tolist() == [[3, 8, 5, 0], [1, 2, 0, 0]]
    assert labels.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert updates.numel() == 0 and item_ids.tolist() == [[3, 4, 5, 0], [6, 2, 0, 0]]
    in_batch = ReplacementLanguageModeling(4, sample_from_batch=True)
    choose = torch.full((3, 3), -50.0)
    choose[torch.arange(3), torch.tensor([2, 1, 0])] = 50.0
    corrupted, labels, updates = in_batch.get_fake_tokens(item_ids, targets.flatten(), choose)
    assert corrupted.tolist() == [[3, 6, 5, 0], [4, 2, 0, 0]]
    assert updates.tolist() == [2, 1, 0]
    assert labels.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("sample_from_batch", [True, False])
def test_logits_of_other_positions_than_the_hidden_are_refused(rows, sample_from_batch):
    module = ReplacementLanguageModeling(4, sample_from_batch=sample_from_batch)
    item_ids, targets = torch.tensor([[3, 4], [6, 2]]), torch.tensor([3, 4, 0, 2])
    with pytest.raises(UserError, match=f"{rows} rows of logits for 3 hidden items"):
        module.get_fake_tokens(item_ids, targets, torch.zeros(rows, 3))


@pytest.mark.parametrize("sample_from_batch", [True, False])
def test_no_fakes_where_nothing_is_hidden(sample_from_batch):
    module = ReplacementLanguageModeling(4, sample_from_batch=sample_from_batch)
    item_ids = torch.tensor([[3, 0], [6, 0]])
    logits = torch.zeros(0, 0 if sample_from_batch else 9)
    corrupted, labels, updates = module.get_fake_tokens(item_ids, torch.zeros(4, dtype=torch.int64), logits)
    assert torch.equal(corrupted, item_ids) and not labels.any() and updates.numel() == 0


def test_samples_follow_the_softmax():
    torch.manual_seed(1)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    samples = ReplacementLanguageModeling(2).sample_from_softmax(logits.expand(20000, 4))
    shares = torch.bincount(samples, minlength=4) / 20000
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)


def test_the_mask_embedding_learns(golden):
    tensors, _ = golden
    for name in CLASSES:
        module, mode = build(f"{name}_eval_all", tensors)
        module(tensors["input/inputs"], tensors["input/item_ids"], **mode).sum().backward()
        assert module.masked_item_embedding.grad.abs().sum() > 0


def test_replacement_modelling_honours_its_probability():
    item_ids = torch.arange(1, 41).expand(50, 40)
    torch.manual_seed(2)
    shares = [
        ReplacementLanguageModeling(2, mlm_probability=p)
        .compute_masked_targets(item_ids, training=True)
        .schema.float()
        .mean()
        for p in (0.1, 0.6)
    ]
    assert shares[0] < 0.2 and shares[1] > 0.5


def test_rows_of_one_or_no_item_and_another_padding():
    item_ids = torch.tensor([[9, 9, 9], [4, 9, 9], [5, 6, 9]])
    for name, kind in CLASSES.items():
        module = kind(2, padding_idx=9)
        for mode in ({"training": True}, {}, {"inference": True}):
            info = module.compute_masked_targets(item_ids, **mode)
            assert (info.targets[0] == 9).all() and not info.schema[0].any(), (name, mode)
        trained = module.compute_masked_targets(item_ids, training=True)
        if name != "clm":
            assert trained.schema.sum(1).tolist() == [0, 0, 1]


def test_unknown_options_are_named_not_swallowed():
    with pytest.warns(UserWarning, match="plm_probabilty"):
        CausalLanguageModeling(2, plm_probabilty=0.5)
