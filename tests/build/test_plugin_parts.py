"""Plug-in parts of every kind of a model: built with their options, trained, written down and asked for."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from generative_recommenders import build
from generative_recommenders.build.parts import build_model, build_sampler
from generative_recommenders.config.gin import load_settings, resolved_text
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.published import describe
from generative_recommenders.config.registry import INPUT_PREPROCESSORS, NEGATIVE_SAMPLERS, REGISTRIES
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.recommender import Recommender
from tiny_models import catalogue, loaded, settings, ten_users, training_step

PLUGIN = Path(__file__).parent / "plugin_parts.py"
load_plugins([str(PLUGIN)])
CHOICES = {
    "sampling_strategy": "latest",
    "user_embedding_norm": "scaled",
    "input_preprocessor": "ItemsAlone",
    "embedding_module_type": "halved",
    "interaction_module_type": "Cosine",
    "top_k_method": "Repeated",
}
OPTIONS = {
    "newest_negatives": {"newest": 3}, "scaled": {"factor": 0.25}, "items_alone": {"gain": 3.0},
    "halved": {"part": 0.1}, "cosine": {"sharpness": 4.0}, "repeated": {"times": 3},
}  # fmt: skip


def chosen() -> RunSettings:
    return settings(**CHOICES, num_negatives=8).changed(options=OPTIONS)


def test_each_part_is_built_with_its_options() -> None:
    model, sampler = build_model(chosen(), catalogue()), build_sampler(chosen(), catalogue())
    sequence = model.sequence
    assert (sequence.preprocessor.gain, sequence.postprocessor.factor) == (3.0, 0.25)
    assert model.similarity.temperature == 0.25
    assert set(sampler(7, 0, 50).ids.flatten().tolist()) == {18, 19, 20}
    assert model.items.table.abs().max() < 0.02


@pytest.mark.parametrize("setting", CHOICES)
def test_each_part_trains_by_itself(setting: str) -> None:
    chosen = settings(**{"num_negatives": 8, "sampling_strategy": "local", setting: CHOICES[setting]})
    step = training_step(chosen, catalogue())
    losses = [float(step(loaded(ten_users()), 0).loss) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_preprocessor_without_learned_positions_appends_to_histories() -> None:
    model = build_model(settings(input_preprocessor="ItemsAlone"), catalogue()).eval()
    ids = torch.tensor([[3, 5, 2]])
    _, cache = model.encode_incremental(None, torch.tensor([2]), ids[:, :2])
    states, _ = model.encode_incremental(cache, torch.tensor([1]), ids[:, 2:])
    torch.testing.assert_close(states, model.encode_query({"item_ids": ids, "lengths": torch.tensor([3])}).states)


def test_answers_read_nothing_of_a_preprocessor_beside_its_interface() -> None:
    chosen = settings(input_preprocessor="ItemsAlone")
    model = build_model(chosen, catalogue())
    model.sequence.preprocessor.rating = torch.nn.Embedding(6, 8)
    names = pa.array([str(item) for item in range(1, model.items.num_items + 1)])
    answer = Recommender(chosen, model, names).recommend({"a reader": ["3", "5"]}, k=3)
    assert len(answer) == 3


@pytest.mark.parametrize("attribute", ["causal", "output_dim"])
def test_an_encoder_without_its_attributes_is_told_which(monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    class Bare(torch.nn.Module):
        causal, output_dim = True, 8

    delattr(Bare, attribute)
    monkeypatch.setattr(build.model, "get_sequential_encoder", lambda *args, **options: Bare())
    with pytest.raises(UserError, match=f"encoder 'SASRec' lacks the attribute '{attribute}'"):
        build_model(settings(), catalogue())


def test_a_value_that_a_part_refuses_after_its_making_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> int:
        raise ValueError("no tokens of these")

    preprocessor = INPUT_PREPROCESSORS["ItemsAlone"].make
    monkeypatch.setattr(preprocessor, "tokens_per_item", property(refuse), raising=False)
    with pytest.raises(UserError, match="^no tokens of these$"):
        build_model(chosen(), catalogue())


def test_a_mixture_takes_a_plugin_sampler() -> None:
    mixed = settings(sampling_strategy="mixed", mixed_shares={"latest": 1.0, "local": 3.0}, num_negatives=8)
    ids = build_sampler(mixed, catalogue())(7, 0, 50).ids
    assert ids[:, :2].min() >= 16 and ids.min() < 16
    assert [each["name"] for each in mixed.plugin_parts()] == ["latest"]


def test_checkpoints_say_where_each_part_comes_from() -> None:
    written = chosen().to_json()
    assert {each["name"]: each["options"] for each in written["plugins"]} == dict(
        zip(("ItemsAlone", "scaled", "halved", "Cosine", "latest", "Repeated"),
            (OPTIONS[name] for name in ("items_alone", "scaled", "halved", "cosine", "newest_negatives", "repeated")))
    )  # fmt: skip
    assert {each["plugin"] for each in written["plugins"]} == {str(PLUGIN)}
    assert RunSettings.from_json(written) == chosen()


def test_a_packages_hash_is_of_all_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for number in (1, 2):
        folder = tmp_path / f"package_of_parts_{number}"
        (folder / "inner").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "inner" / "part.py").write_text(f"VALUE = {number}\n")
        hashes |= {plugin.sha256 for plugin in load_plugins([folder.name])}
    assert len(hashes) == 2


def test_gin_binds_their_options_and_resolved_text_gives_them_back() -> None:
    bindings = [f"train_fn.{name} = {value!r}" for name, value in CHOICES.items()]
    read = load_settings([], [*bindings, "newest_negatives.newest = 3"])
    resolved = resolved_text(read)
    assert read.options == {"newest_negatives": {"newest": 3}}
    assert "newest_negatives.newest = 3" in resolved and "cosine.sharpness = 10.0" in resolved
    with pytest.raises(UserError, match="newest_negatives.newest must be 1 or more, got 0"):
        load_settings([], [*bindings, "newest_negatives.newest = 0"])
    with pytest.raises(UserError, match="popularity_power = 0.5 are one option"):
        load_settings([], ["train_fn.sampling_strategy = 'popularity'", "train_fn.popularity_power = 0.5",
                           "PopularityNegativesSampler.power = 0.25"])  # fmt: skip


def test_an_unknown_name_lists_all_and_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown negative sampler 'populariti' .*did you mean 'popularity'.*latest"):
        build_sampler(settings(sampling_strategy="populariti"), catalogue())


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("negative_samplers", "power: float = 0.75, by train_fn.popularity_power; log_q_correction: bool"),
        ("input_preprocessors", "num_ratings: int = 6 (>= 1"),
        ("output_postprocessors",
        "l2_norm (L2NormEmbeddingPostprocessor): eps: float = 1e-06 (> 0), by train_fn.l2_norm_eps"),
        ("item_embeddings", "item_l2_norm: bool = False, by train_fn.item_l2_norm; l2_norm_eps: float"),
        ("similarities", "DotProduct (DotProductSimilarity): temperature: float = 0.05 (> 0), by train_fn.temperature"),
    ],
)  # fmt: skip
def test_parts_are_described_with_their_options(kind: str, line: str) -> None:
    assert line in "\n".join(describe(REGISTRIES[kind]))
    assert NEGATIVE_SAMPLERS["latest"].plugin is not None
