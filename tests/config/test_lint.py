"""Hints about settings that have no effect, or are likely a slip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config import lint as notices
from generative_recommenders.config.gin import differences, load_settings
from generative_recommenders.config.lint import likely_slips, settings_without_effect
from generative_recommenders.config.registry import LOSSES, NEGATIVE_SAMPLERS
from generative_recommenders.config.schema import RunSettings
from tiny_models import OWNERS

register_built_in_parts()
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def chosen(**choices: Any) -> RunSettings:
    """``owner__name`` or a name of ``train_fn``; all else as by default."""
    owned = {name.rpartition("__")[::2]: value for name, value in choices.items()}
    return RunSettings().bind({f"{OWNERS[owner]}.{name}": value for (owner, name), value in owned.items()})


def test_all_acts_by_default() -> None:
    assert settings_without_effect(RunSettings()) == likely_slips(RunSettings()) == []


@pytest.mark.parametrize(
    ("idle", "acting", "line"),
    [
        (
            {"negatives_block_size": 7},
            {"negatives_sharing": "block"},
            "train_fn.negatives_block_size has no effect",
        ),
        ({"class_feature": "genre"}, {"sampling_strategy": "multi-class"}, "'in-batch' has no such option"),
        ({"mixed_shares": {"local": 1.0}}, {"sampling_strategy": "mixed"}, "'in-batch' has no such option"),
        (
            {"popularity_power": 0.5},
            {"sampling_strategy": "popularity"},
            "train_fn.popularity_power has no effect: train_fn.sampling_strategy = 'in-batch' has no such option",
        ),
        ({"calibration": 0.5}, {"loss_module": "gBCE"}, "'SampledSoftmaxLoss' has no such option"),
        ({"mask_probability": 0.5}, {"objective": "masked"}, "train_fn.objective = 'causal' has no"),
        ({"permute_all": True}, {"objective": "permuted"}, "train_fn.objective = 'causal' has no"),
        ({"tie_discriminator": True}, {"objective": "replaced"}, "train_fn.objective = 'causal' has no"),
        (
            {"category_feature": "genre"},
            {"embedding_module_type": "categorical"},
            "train_fn.embedding_module_type = 'local' has no such option",
        ),
        ({"next_time": "hidden"}, {"main_module": "HSTU"}, "train_fn.main_module = 'SASRec' has no"),
        (
            {"num_ratings": 11},
            {"input_preprocessor": "CombinedItemAndRating"},
            "'LearnablePositionalEmbedding' has no",
        ),
        ({"partial_eval_num_iters": 3}, {"full_eval_every_n": 2}, "train_fn.full_eval_every_n is 1"),
        ({"hstu__num_blocks": 8}, {"main_module": "HSTU"}, "hstu_encoder.num_blocks has no effect"),
        ({"sce__n_buckets": 8}, {"loss_module": "ScalableCrossEntropyLoss"}, "sce.n_buckets has no effect"),
        ({"item_tower__num_blocks": 2}, {"main_module": "TwoTower"}, "item_tower.num_blocks has no effect"),
        ({"mol__dot_product_dimension": 8}, {"interaction_module_type": "MoL"}, "this run has no such part"),
        (
            {"similarity__bf16_training": True},
            {"interaction_module_type": "MoL"},
            "'DotProduct' has no such option",
        ),
    ],
)
def test_settings_without_effect_are_reported(
    idle: dict, acting: dict, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "has_bfloat16", lambda: True)
    (said,) = settings_without_effect(chosen(**idle))
    assert line in said
    assert settings_without_effect(chosen(**idle, **acting)) == []


def test_losses_over_the_catalogue_draw_nothing() -> None:
    settings = chosen(loss_module="CE", negatives_sharing="block", calibration=0.5, loss_activation_checkpoint=True)
    assert settings_without_effect(settings) == [
        "train_fn.loss_activation_checkpoint, train_fn.negatives_sharing have no effect: CE scores the catalogue and "
        "draws no negatives",
        "train_fn.calibration has no effect: train_fn.loss_module = 'CE' has no such option",
    ]


def test_what_this_machine_lacks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "has_bfloat16", lambda: False)
    lines = settings_without_effect(chosen(loader__num_workers=8, loader__prefetch_factor=1024, main_module_bf16=True))
    assert [line.partition(":")[0].partition(" = ")[0] for line in lines] == [
        "create_data_loader.num_workers", "create_data_loader.prefetch_factor", "train_fn.main_module_bf16",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides there")
@pytest.mark.parametrize(("unit", "has_it"), [("", False), ("avx512_bf16", True), ("amx_bf16", True)])
def test_avx_512_alone_has_no_bfloat16_units(unit: str, has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"flags\t\t: avx2 avx512f avx512dq avx512bw avx512vl {unit}\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert notices.has_bfloat16() == has_it


def test_a_part_that_is_not_chosen_may_lack_options_that_it_needs() -> None:
    """``MoLCombTopK.avg_top_k`` has no default."""
    idle = RunSettings().bind({"MoLCombTopK.k_per_group": 2})
    assert settings_without_effect(idle) == ["MoLCombTopK.k_per_group has no effect: this run has no such part"]
    assert differences(RunSettings(), idle) == [("MoLCombTopK.k_per_group", None, 2)]
    assert idle.value("MoLCombTopK.avg_top_k") is None


def test_a_parts_own_option_of_a_settings_name_is_not_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NEGATIVE_SAMPLERS, "_parts", dict(NEGATIVE_SAMPLERS._parts))

    @NEGATIVE_SAMPLERS.register("own-number", gin_name="own_number")
    def own_number(num_negatives: int = 4) -> None: ...  # without SUPPLIED, which would make it the setting

    (said,) = settings_without_effect(chosen(sampling_strategy="own-number", num_negatives=8))
    assert said.startswith("train_fn.num_negatives has no effect")


def test_a_tuple_is_as_good_as_the_list_of_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOSSES, "_parts", dict(LOSSES._parts))

    @LOSSES.register("listed", gin_name="listed")
    def listed(values: list[int] = [1, 2]) -> None: ...  # noqa: B006  (as plug-ins may write it)

    assert settings_without_effect(RunSettings(options={"listed": {"values": (1, 2)}})) == []
    (said,) = settings_without_effect(RunSettings(options={"listed": {"values": (1, 3)}}))
    assert said == "listed.values has no effect: this run has no such part"


def test_an_approximate_top_k_is_reported_to_have_no_effect() -> None:
    (line,) = settings_without_effect(chosen(interaction_module_type="MoL", top_k_method="MoLAvgTopK100"))
    assert "MoLAvgTopK100" in line and "exactly" in line


@pytest.mark.parametrize(
    "encoder", [{"main_module": "HSTU"}, {"main_module": "TwoTower", "item_tower__query_module": "HSTU"}]
)
def test_unequal_widths_of_hstu_are_reported(encoder: dict) -> None:
    (line,) = likely_slips(chosen(**encoder, hstu__dqk=4, hstu__dv=6))
    assert "hstu_encoder.dqk = 4 and hstu_encoder.dv = 6 do not match" in line
    assert likely_slips(chosen(hstu__dqk=4, hstu__dv=6)) == []
    assert likely_slips(chosen(**encoder, hstu__dqk=4, hstu__dv=4)) == []


def test_a_tower_under_a_loss_over_the_catalogue_is_reported() -> None:
    (line,) = likely_slips(chosen(main_module="TwoTower", loss_module="CE"))
    assert "every item passes through the item tower" in line


SHIPPED = sorted(path for path in CONFIGS.glob("*/*.gin") if path.parent.name != "ablations")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_hold_nothing_idle(path: Path) -> None:
    lines = settings_without_effect(load_settings([path]))
    assert [line for line in lines if " no effect: " in line] == []
