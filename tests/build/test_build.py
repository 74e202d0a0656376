"""Objects built from names, and combinations that cannot work, refused in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from absl import logging

from generative_recommenders.build.model import auxiliary_weights
from generative_recommenders.build.parts import (
    build_criterion,
    build_model,
    build_objective,
    build_sampler,
    build_task,
)
from generative_recommenders.config.registry import ENCODERS, LOSSES
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.model_evaluation import catalogue_scores
from generative_recommenders.modeling.encoders.two_tower import EntityFeature, FeatureMerger
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from generative_recommenders.retrieval.methods import build_top_k, check_top_k
from generative_recommenders.retrieval.mol_top_k import MoLAvgTopK
from generative_recommenders.retrieval.top_k import MIPSBruteForceTopK
from tiny_models import CE, EASY, NUM_ITEMS, catalogue, loaded, settings, ten_users, training_step

MOL = {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"}
TOWER = {"main_module": "TwoTower"}
FEATURES = {
    "genre": EntityFeature(EmbeddingSpec("genre", "categorical", 8, 3), torch.arange(NUM_ITEMS + 1) % 4),
    "year": EntityFeature(EmbeddingSpec("year", "numerical", 8), torch.zeros(NUM_ITEMS + 1)),
}


class FeaturesInMemory:
    """Stands for the reader of a data set."""

    def read(self, names, embedding_dim, asked_by, list_reduction="mean"):
        return [
            EntityFeature(dataclasses.replace(FEATURES[name].spec, embedding_dim=embedding_dim), FEATURES[name].values)
            for name in names
        ]


def featured():
    return catalogue(items=FeaturesInMemory(), users=FeaturesInMemory())


def build_all(chosen: RunSettings, data=None) -> None:
    data = data or featured()
    model = build_model(chosen, data)
    check_top_k(chosen, model)
    build_objective(chosen)
    if build_criterion(chosen, data, model).needs_negatives:
        build_sampler(chosen, data)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "log Q of uniform draws": (
        {"log_q_correction": True, "sampling_strategy": "local"},
        "log_q_correction acts with in-batch, popularity, not with local",
    ),
    "encoder": (
        {"main_module": "SASRek"},
        r"unknown encoder 'SASRek' \(train_fn.main_module\); did you mean 'SASRec'",
    ),
    "query tower": (
        {**TOWER, "item_tower.query_module": "TwoTower"},
        "'TwoTower' has a query tower itself",
    ),
    "preprocessor": ({"input_preprocessor": "x"}, "unknown input preprocessor 'x' .*; known: LearnablePos"),
    "postprocessor": (
        {"user_embedding_norm": "x"},
        "unknown output postprocessor 'x' .*; known: l2_norm, layer_norm",
    ),
    "interaction": ({"interaction_module_type": "x"}, "unknown similarity 'x'"),
    "embedding": ({"embedding_module_type": "x"}, "known: local, categorical, item_tower"),
    "objective": ({"objective": "x"}, r"unknown objective .x. \(train_fn.objective\); known: .*causal_last"),
    "loss": ({"loss_module": "x"}, "unknown loss 'x' .*; known: SampledSoftmaxLoss, .*SCE"),
    "sampler": ({"sampling_strategy": "x"}, "known: local, in-batch, popularity, mixed, multi-class"),
    "sharing": (
        {"negatives_sharing": "x"},
        "negatives_sharing 'x' is unknown; known: 'position', 'block', 'batch'",
    ),
    "heads": ({"sasrec.num_heads": 3}, "num_heads 3 does not divide the width 8"),
    "normalization": (
        {"main_module": "HSTU", "hstu.normalization": "x"},
        "known: 'rel_bias', 'softmax_rel_bias'",
    ),
    "norm": ({"main_module": "DiffTransformer", "diff_transformer.norm": "x"}, "known: 'post', 'pre'"),
    "tower negatives": (TOWER, 'set train_fn.negatives_sharing to "block" or "batch"'),
    "tower negatives, local encoder": (
        {"embedding_module_type": "item_tower"},
        "an item tower computes the items that a step gathers",
    ),
    "MoL and a catalogue loss": (
        {**MOL, "loss_module": "CE"},
        "CE scores the catalogue by dot product; with MoL",
    ),
    "MoL searched by MIPS": ({**MOL, "top_k_method": "MIPSBruteForceTopK"}, "does not fit MoLSimilarity"),
    "dot product searched by MoL": ({"top_k_method": "MoLAvgTopK100"}, "does not fit DotProductSimilarity"),
    "top-k": ({"top_k_method": "TopK5"}, r"unknown top-k module 'TopK5' \(train_fn.top_k_method\).*known: "),
    "top-k without its number": ({**MOL, "top_k_method": "MoLAvgTopK"}, "MoLAvgTopK.*avg_top_k"),
    "auxiliary loss": (
        {"loss_weights": {"mi_loss": 1.0}},
        r"name mi_loss, which this configuration does not produce",
    ),
    "auxiliary loss without user ids": (
        {**MOL, "loss_weights": {"uid_embedding_l2_norm": 0.1, "mi_loss": 0.1}},
        r"name uid_embedding_l2_norm, which this configuration does not produce \(mi_loss\)",
    ),
    "auxiliary loss by get_weighted_loss": ({"weighted_loss.weights": {"x": 1.0}}, "loss_weights name x"),
    "attention mask": (
        {**CE, "main_module": "HSTU", "hstu.normalization": "softmax_rel_bias", "objective": "masked"},
        "attention mask, which encoder 'HSTU' does not follow; choose hstu_encoder.normalization 'rel_bias'",
    ),
    "fakes in a tower": ({**TOWER, **CE, "objective": "replaced"}, "no item tower, no MoL"),
    "fakes with MoL": ({**MOL, "objective": "replaced"}, "no item tower, no MoL"),
    "fakes of the catalogue": ({"objective": "replaced", "fakes_from": "catalogue"}, "choose CE"),
    "ratings of masked": (
        {"objective": "masked", "loss_module": "BCELossWithRatings"},
        "needs ratings of the next",
    ),
    "label smoothing": (
        {"loss_module": "BCELoss", "label_smoothing": 0.1},
        "label_smoothing acts with Sampled.*, not with BCELoss",
    ),
    "permuted without spans": (
        {**CE, "objective": "permuted", "max_span_length": 0},
        "max_span_length must be 1 or more",
    ),
    "class feature": ({"sampling_strategy": "multi-class"}, "needs train_fn.class_feature"),
    "class of a number": (
        {"sampling_strategy": "multi-class", "class_feature": "year"},
        "'year' is numerical: choose one of categories",
    ),
    "categories": ({"embedding_module_type": "categorical"}, "needs train_fn.category_feature"),
    "mixed in mixed": ({"sampling_strategy": "mixed", "mixed_shares": {"mixed": 1.0}}, "cannot hold 'mixed'"),
    "tokenizer": ({"loss_module": "VQVAELoss"}, "trains a tokenizer of items"),
    "sampler of a catalogue loss": ({**CE, "sampling_strategy": "x"}, "unknown negative sampler 'x'"),
    "positives of masked": (
        {**CE, "objective": "masked", "num_positives": 2},
        "with causal, causal_last, not with masked",
    ),
    "weights of masked": (
        {**CE, "objective": "masked", "target_weights": "rating"},
        "target_weights acts with causal, causal_last, not with masked: unset it",
    ),
    "positives of SCE": ({"loss_module": "SCE", "num_positives": 2}, "one positive a position"),
    "class of a shared target": (
        {
            "sampling_strategy": "multi-class",
            "class_feature": "genre",
            "class_selector": "target",
            "negatives_sharing": "block",
        },
        'needs negatives_sharing "position"',
    ),
    "seed": ({"random_seed": -1}, "random_seed must be 0 or more"),
    "large seed": ({"random_seed": 1 << 63}, "random_seed must be below 2"),
    "large width": ({"item_embedding_dim": 10**20}, "item_embedding_dim must be below 2"),
    "decay": ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
    "clipping": ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
    "nobody evaluated": ({"eval_user_max_batch_size": -5}, "eval_user_max_batch_size must be 1 or more"),
    "no patience": ({"early_stopping_patience": 0}, "early_stopping_patience must be 1 or more"),
    "patience without validation": (
        {"early_stopping_patience": 2, "protocol": "paper"},
        'protocol "paper" has none',
    ),
    "infinite": ({"learning_rate": float("inf")}, "learning_rate must be finite"),
    "not a number": ({"popularity_power": float("nan")}, "popularity_power must be finite"),
    "name of a weight": ({"loss_weights": {1: 2.0}}, r"must be of type dict\[str, float\], got 1"),
    "value of a weight": ({"loss_weights": {"mi_loss": "x"}}, "must be of type dict"),
    "share": ({"mixed_shares": {"local": "a"}}, "must be of type dict"),
    "weight of get_weighted_loss": ({"weighted_loss.weights": {"x": -1}}, "get_weighted_loss.weights must"),
    "prefetch": ({"loader.prefetch_factor": -3}, "create_data_loader.prefetch_factor must be 0 or more"),
    "list reduction": ({"item_tower.list_reduction": "x"}, "item_tower.list_reduction 'x' is unknown"),
    "discriminator": ({"discriminator_weight": -1.0}, "discriminator_weight must be 0 or more"),
    "SCE sizes": ({"loss_module": "SCE", "sce.n_buckets": 0}, "sce.n_buckets must be 1 or more"),
}


@pytest.mark.parametrize(("choices", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build_all(settings(**choices))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "choices",
    [
        {"input_preprocessor": "CombinedItemAndRating"},
        {"input_preprocessor": "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor"},
        {"loss_module": "BCELossWithRatings"},
    ],
)
def test_data_without_ratings(choices: dict[str, Any]) -> None:
    build_all(settings(**choices))
    with pytest.raises(UserError, match="needs ratings, and synthetic-books has none"):
        build_all(settings(**choices), catalogue(has_ratings=False))


@pytest.mark.parametrize("name", ["CombinedItemAndRating", "LearnablePositionalEmbeddingRated"])
@pytest.mark.parametrize("reach", [(1.0, 10.0), (-1.0, 5.0)])
def test_ratings_without_an_embedding(name: str, reach: tuple[float, float]) -> None:
    chosen = settings(input_preprocessor=name)
    build_all(chosen, catalogue(rating_range=(0.5, 5.0)))
    with pytest.raises(UserError, match=r"ratings 0 to 5 \(train_fn.num_ratings\), and those of synthetic-books"):
        build_all(chosen, catalogue(rating_range=reach))


def test_states_must_be_as_wide_as_items() -> None:
    wide = {"input_preprocessor": "LearnablePositionalEmbeddingRated"}
    build_all(settings(**wide, user_embedding_norm="layer_norm"))
    with pytest.raises(UserError, match=r"'SASRec' are 12 wide after train_fn.user_embedding_norm 'none', and items 8"):
        build_all(settings(**wide, user_embedding_norm="none"))


def test_weights_by_rating_need_ratings() -> None:
    with pytest.raises(UserError, match='"rating" needs ratings'):
        build_all(settings(target_weights="rating"), catalogue(has_ratings=False))


def test_the_rating_threshold_is_a_choice() -> None:
    chosen = settings(loss_module="BCELossWithRatings", rating_threshold=2.5)
    assert build_criterion(chosen, catalogue()).loss.threshold == 2.5


@pytest.mark.parametrize("loss", [name for name in LOSSES.names() if "SCE" not in name and "Scalable" not in name])
def test_several_positives_train(loss: str) -> None:
    chosen = settings(loss_module=loss, num_negatives=4, sampling_strategy="local", temperature=1.0)
    assert moved(chosen.bind({"train_fn.num_positives": 3}), steps=6)


@pytest.mark.parametrize("more", [TOWER, MOL, {"sampling_strategy": "in-batch"}, {"objective": "causal_last"}])
def test_several_positives_train_with(more: dict[str, Any]) -> None:
    assert moved(
        settings(
            **{
                "num_negatives": 4,
                "temperature": 1.0,
                "negatives_sharing": "batch",
                "num_positives": 3,
                "target_weights": "rating",
                **more,
            }
        ),
        steps=6,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_discriminator_of_rated_items_trains(tied: bool) -> None:
    """The states of this preprocessor are wider than items, what the discriminator reads is not."""
    rated = {"input_preprocessor": "LearnablePositionalEmbeddingRated", "tie_discriminator": tied}
    assert moved(settings(**{**EASY["replaced"], **rated}), steps=6)


def test_features_without_a_data_set() -> None:
    for choices in ({**TOWER, "item_tower.features": ("genre",)}, {"item_tower.query_features": ("age",)}):
        with pytest.raises(UserError, match="there is no data set to read"):
            build_model(settings(**choices), catalogue())


class OneOfTwo(Collectives):
    world_size = 2


@pytest.mark.parametrize(("name", "world_size"), [("SCE", 1), ("SCE", 2), ("SASRec", 2)])
def test_a_loss_that_depends_on_the_number_of_processes_says_so(
    monkeypatch: pytest.MonkeyPatch, name: str, world_size: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    build_task(settings(**EASY[name]), catalogue(), OneOfTwo() if world_size == 2 else Collectives())
    told = "SCE draws its buckets from each process's tokens: its numbers depend on the number of processes"
    assert lines == [told] * (name == "SCE" and world_size == 2)


@pytest.mark.parametrize("loss", LOSSES.names())
def test_every_loss_trains_by_its_name(loss: str) -> None:
    chosen = settings(loss_module=loss, num_negatives=4, sampling_strategy="local", temperature=1.0)
    assert moved(chosen, steps=6)


@pytest.mark.parametrize("sampler", ["local", "in-batch", "popularity", "mixed", "multi-class"])
@pytest.mark.parametrize("sharing", ["position", "block", "batch"])
def test_every_sampler_trains_by_its_name(sampler: str, sharing: str) -> None:
    more = {"num_negatives": 4, "class_feature": "genre", "temperature": 1.0}
    assert moved(settings(sampling_strategy=sampler, negatives_sharing=sharing, **more), steps=6)


def moved(chosen: RunSettings, steps: int) -> bool:
    """Whether the loss falls over a few steps on one batch."""
    step = training_step(chosen, featured())
    losses = [float(step(loaded(ten_users()), 0).loss) for _ in range(steps)]
    return losses[-1] < losses[0]


@pytest.mark.parametrize("sharing", ["block", "batch"])
def test_towers_of_features_and_users_train(sharing: str) -> None:
    features = {"item_tower.features": ("item_id", "genre", "year"), "item_tower.query_features": ("genre",)}
    chosen = settings(**TOWER, **features, negatives_sharing=sharing, num_negatives=4, temperature=1.0)
    assert moved(chosen, steps=6)
    assert isinstance(build_model(chosen, featured()).sequence.context_merger, FeatureMerger)


def test_label_smoothing_reaches_cross_entropy() -> None:
    criterion = build_criterion(settings(loss_module="CE", label_smoothing=0.1), catalogue())
    assert criterion.loss.label_smoothing == 0.1


def test_sce_takes_its_sizes() -> None:
    choices = {"sce.n_buckets": 3, "sce.bucket_size_x": 4, "sce.bucket_size_y": 5, "sce.mix_x": True}
    for name in ("SCE", "ScalableCrossEntropyLoss"):
        loss = build_criterion(settings(loss_module=name, **choices), catalogue()).loss
        assert isinstance(loss, ScalableCrossEntropyLoss)
        assert (loss.n_buckets, loss.bucket_size_x, loss.bucket_size_y, loss.mix_x) == (3, 4, 5, True)


def test_classes_give_each_unit_negatives_of_one_class() -> None:
    chosen = settings(sampling_strategy="multi-class", class_feature="genre", num_negatives=12)
    negatives = build_sampler(chosen, featured())(7, 0, 30)
    genres = FEATURES["genre"].values[negatives.ids]
    assert (genres == genres[:, :1]).all()
    assert len(genres[:, 0].unique()) > 2


def test_top_k_searches_the_items_as_they_are_scored() -> None:
    plain = settings(item_l2_norm=True)
    model = build_model(plain, catalogue()).eval()
    search = build_top_k(plain, model)
    assert isinstance(search, MIPSBruteForceTopK)
    items = torch.nn.functional.normalize(model.items.all_item_embeddings(), dim=-1)
    scores, ids = search(items[[4, 9]], 1)
    assert ids[:, 0].tolist() == [5, 10]
    torch.testing.assert_close(scores[:, 0], torch.full((2,), 1 / plain.value("train_fn.temperature")))
    mixed = settings(**{**MOL, "top_k_method": "MoLAvgTopK5"})
    assert isinstance(build_top_k(mixed, build_model(mixed, catalogue()).eval()), MoLAvgTopK)


def test_bf16_training_of_the_similarity_acts_on_mol() -> None:
    chosen = settings(**MOL, **{"similarity.bf16_training": True})
    similarity = build_model(chosen, catalogue()).similarity
    assert similarity.bf16_training
    seen = []
    similarity.item_projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    queries, items = torch.randn(2, 8), torch.randn(3, 8)
    similarity.score(queries, items)
    similarity.eval().score(queries, items)
    assert seen == [torch.bfloat16, torch.bfloat16]  # in evaluation too, as published


def test_a_model_in_bfloat16_scores_so_in_training_and_evaluation() -> None:
    """Scores are multiples of what bfloat16 resolves, wherever they come from; with ``eval_bf16`` they are not."""

    def scores_of(**changes: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        chosen = settings(item_l2_norm=True, temperature=0.05, sampling_strategy="local", num_negatives=16, **changes)
        task, seen = training_step(chosen, catalogue()).task, []
        task.criterion.loss.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
        task.loss(loaded(ten_users()), 0).sum.backward()
        assert task.model.items.table.grad.isfinite().all()
        model, batch = (
            task.model.eval(),
            {"item_ids": torch.randint(1, 21, (3, 7)), "lengths": torch.full((3,), 7)},
        )
        score = catalogue_scores(model, torch.bfloat16 if chosen.evaluation.eval_bf16 else None)
        with torch.no_grad():
            queries = model.encode_query(batch)
            seen += [score(batch), model.score(queries, model.catalogue())]
            seen += [
                model.score(queries, torch.arange(1, 21)),
                model.score(queries, torch.randint(1, 21, (3, 4))),
            ]
        assert all(each.dtype == torch.float32 for each in seen)
        return [each.detach() for each in seen]

    for scores in scores_of(main_module_bf16=True):
        assert torch.equal(scores, scores.bfloat16().float())
    for changes in ({}, {"eval_bf16": True}):
        for scores in scores_of(**changes):
            assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_a_model_in_bfloat16_mixes_its_logits_so() -> None:
    assert build_model(settings(**MOL, main_module_bf16=True), catalogue()).similarity.bf16_training


@pytest.mark.parametrize("name", ["main_module_bf16", "eval_bf16"])
def test_bfloat16_of_the_encoder_holds_in_evaluation(name: str) -> None:
    """main_module_bf16 in training, too; eval_bf16 in evaluation alone."""
    chosen = settings(**{name: True})
    task = training_step(chosen, catalogue()).task
    seen = []
    task.model.sequence.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(torch.is_autocast_enabled("cpu"))
    )
    task.loss(loaded(ten_users()), 0)
    task.model.eval()
    batch = {key: value for key, value in ten_users().items() if key != "user_ids"}
    batch["next_timestamps"] = torch.full((10,), 2000)
    score = catalogue_scores(task.model, torch.bfloat16 if chosen.evaluation.eval_bf16 else None)
    assert score({**batch, "user_ids": torch.arange(1, 11)}).dtype == torch.float32
    assert seen == [name == "main_module_bf16", True]


def test_auxiliary_losses_are_weighted_and_made_only_when_asked() -> None:
    weights = {"mi_loss": 0.5, "uid_embedding_l2_norm": 0.25}
    chosen = settings(**MOL, **{"loss_weights": weights, "mol.uid_embedding_hash_sizes": (10,)}, num_negatives=4)
    task = training_step(chosen, catalogue()).task
    assert set(task.loss(loaded(ten_users()), 0).auxiliary) == set(weights)
    assert task.eval().loss(loaded(ten_users()), 0).auxiliary == {}
    silent = training_step(settings(**MOL, num_negatives=4), catalogue())
    assert silent.task.model.similarity.auxiliary_loss_names == frozenset()


def test_replaced_detection_learns_what_was_replaced() -> None:
    chosen = settings(**EASY["replaced"])
    step, values = training_step(chosen, catalogue()), []
    for number in range(60):
        output = step.task.loss(loaded(ten_users()), number)
        values.append(output.auxiliary["replaced_detection"].item())
        step(loaded(ten_users()), number)
    assert sum(values[-10:]) < 0.9 * sum(values[:10])


def test_a_tied_discriminator_adds_its_head_alone() -> None:
    tied, apart = (settings(**{**EASY[name]}) for name in ("replaced, tied", "replaced"))
    model = build_model(tied, catalogue())
    assert sum(p.numel() for p in build_criterion(tied, catalogue(), model).parameters()) == 9
    encoder = sum(p.numel() for p in model.sequence.parameters())
    assert sum(p.numel() for p in build_criterion(apart, catalogue()).parameters()) == 9 + encoder
    with pytest.raises(UserError, match="tied"):
        build_criterion(tied, catalogue())


def test_decay_of_user_embeddings_is_a_weight_of_their_norm() -> None:
    decay = {**MOL, "mol.uid_embedding_hash_sizes": (7,), "mol.uid_embedding_l2_weight_decay": 0.5}
    assert auxiliary_weights(settings(**decay)) == {"uid_embedding_l2_norm": 0.5}
    build_model(settings(**decay), catalogue())
    both = settings(**decay, loss_weights={"uid_embedding_l2_norm": 0.25, "mi_loss": 1.0})
    assert auxiliary_weights(both) == {"uid_embedding_l2_norm": 0.75, "mi_loss": 1.0}


@pytest.mark.parametrize("kind", ["categorical", "foo"])
def test_an_embedding_beside_the_item_tower_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"embedding_module_type '{kind}' has no effect in TwoTower"):
        build_model(settings(main_module="TwoTower", embedding_module_type=kind), catalogue())


@pytest.mark.parametrize("causal", [True, False])
def test_a_plugin_without_attention_mask_is_refused_by_its_name(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENCODERS["GRU4Rec"].make, "causal", causal)
    with pytest.raises(UserError, match="attention mask, which encoder 'GRU4Rec' does not follow$"):
        build_model(settings(main_module="GRU4Rec", objective="masked"), catalogue())
