"""Runs of published configurations say how they differ from the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from generative_recommenders.build import parts  # noqa: F401  (registers what the bindings choose)
from generative_recommenders.config.gin import load_settings
from generative_recommenders.config.published_runs import differences, unlike_published
from generative_recommenders.config.schema import RunSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = sorted(CONFIGS.glob("*/*-final.gin"))
by_name = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)


def settings_of(*files: Path, **changes: object) -> RunSettings:
    bindings = [f"train_fn.{name} = {value!r}" for name, value in changes.items()]
    return load_settings(files, bindings)


@by_name
def test_a_published_configuration_alone_names_what_differs(path: Path) -> None:
    line = differences(settings_of(path), "file", has_unrated=True)
    assert line is not None and "\n" not in line
    for part in (
        "protocol 'leave_one_out'",
        "seen_filter 'history'",
        "catalogue 'rated'",
        "--tie_order=file",
    ):
        assert part in line
    assert "do not compare" in line and "configs/runs/published.gin" in line


@by_name
def test_with_the_published_choices_nothing_differs(path: Path) -> None:
    chosen = settings_of(path, CONFIGS / "runs" / "published.gin")
    assert differences(chosen, "published", has_unrated=True) is None
    assert differences(chosen, None, has_unrated=False) is None
    line = differences(chosen, "random", has_unrated=True) or ""
    assert "--tie_order=random of the preparation" in line and "prepare with --tie_order=published" in line
    assert "published.gin" not in line  # which has nothing to do with it


def test_data_without_further_items_do_not_differ_in_the_catalogue() -> None:
    chosen = settings_of(PUBLISHED[0], protocol="paper", seen_filter="window")
    assert "catalogue" in (differences(chosen, None, has_unrated=True) or "")
    assert differences(chosen, None, has_unrated=False) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_name": "synthetic-books"}, {"negatives_sharing": "block"}, {"optimizer": "lazy_adamw"},
        {"main_module": "Transformer"}, {"loss_module": "CE"}, {"label_smoothing": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_our_own_says_nothing(changes: dict[str, object]) -> None:
    path = CONFIGS / "ml-1m" / "sasrec-sampled-softmax-n128-final.gin"
    assert differences(settings_of(path, num_epochs=3, deterministic=True), "file", True) is not None
    assert differences(settings_of(path, **changes), "file", True) is None


def test_sampled_histories_say_what_the_published_programs_did() -> None:
    """They sampled those of ML-1M, anew each epoch as here."""
    (line,) = unlike_published(settings_of(dataset_name="ml-20m", positional_sampling_ratio=0.5))
    assert "anew each epoch" in line and "ml-1m alone and ignored this elsewhere" in line
    assert unlike_published(settings_of(dataset_name="ml-1m", positional_sampling_ratio=0.5)) == []


def test_protocol_paper_says_what_its_evaluations_between_steps_score() -> None:
    (line,) = unlike_published(settings_of(protocol="paper"))
    assert "drawn anew" in line and "the step's own training batch" in line
    assert unlike_published(settings_of()) == []


def test_dropout_of_attention_says_that_the_published_programs_have_none() -> None:
    rate = ["train_fn.main_module = 'HSTU'", "hstu_encoder.attn_dropout_rate = 0.1"]
    (line,) = unlike_published(load_settings([], rate))
    assert "hstu_encoder.attn_dropout_rate" in line and "drop none" in line


@pytest.mark.parametrize(("name", "theirs"), [("main_module_bf16", "weights"), ("eval_bf16", "states and items")])
def test_bfloat16_says_where_it_is_not_the_published_programs(name: str, theirs: str) -> None:
    (line,) = unlike_published(settings_of(**{name: True}))
    assert f"train_fn.{name}" in line and theirs in line
