"""The documented signatures, typed from the documentation: parameter names, their order, kinds and defaults.

We may take more than is documented, after it or by keyword, and ask for less: what we add has a default.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

COMPAT = "generative_recommenders.compat"
LOSS = "model_embeddings, positive_labels, target_padding_mask"
SAMPLED = "model_embeddings, positive_labels, negative_labels, target_padding_mask"
LOG_IN = "log_epsilon=1e-06, clamp_border=100.0, negative_labels_ignore_index=-100"
TOWERS = (
    "embedding_dim=192, num_heads=4, num_blocks=2, max_sequence_length=50, dropout=0.3, excluded_features=None, "
    "categorical_list_feature_aggregation_method='sum'"
)
NEXT_ITEM = (
    "feature_tensors, padding_mask, candidates_to_score=None, positive_labels=None, negative_labels=None, "
    "target_padding_mask=None"
)
MASKING = "hidden_size, padding_idx=0, eval_on_last_item_seq_only=True"
AT_K = "predictions, targets, k"

GENREC = {
    "TransformerEncoder": "vocab_size, embedding_dim, num_heads, num_layers, attn_dim, dropout=0.1, "
    "max_seq_length=1024",
    "TransformerEncoder.forward": "input_ids, attention_mask=None",
    "PositionalEncoding": "embedding_dim, max_seq_length=5000",
    "PositionalEncoding.forward": "x",
    "MultiHeadAttention": "embedding_dim, num_heads, dropout=0.1",
    "MultiHeadAttention.forward": "query, key, value, mask=None",
    "VQVAELoss": "commitment_cost=0.25, beta=1.0",
    "VQVAELoss.forward": "x, x_recon, commitment_loss, embedding_loss",
    "SequenceLoss": "vocab_size, ignore_index=-100, label_smoothing=0.0",
    "SequenceLoss.forward": "logits, labels, attention_mask=None",
    "ContrastiveLoss": "temperature=0.1, margin=0.2",
    "ContrastiveLoss.forward": "anchor, positive, negative",
    "RecommendationMetrics.recall_at_k": AT_K,
    "RecommendationMetrics.precision_at_k": AT_K,
    "RecommendationMetrics.ndcg_at_k": AT_K,
    "RecommendationMetrics.hit_rate_at_k": AT_K,
    "RecommendationMetrics.coverage": "predictions, total_items",
    "RecommendationMetrics.diversity": "predictions",
    "AttentionVisualization.plot_attention_heatmap": "attention_weights, input_tokens, output_tokens, save_path=None",
    "ModelUtils.count_parameters": "model",
    "ModelUtils.get_model_size": "model",
    "ModelUtils.freeze_layers": "model, layer_names",
    "ModelUtils.unfreeze_layers": "model, layer_names",
    "ModelUtils.initialize_weights": "model, init_type='xavier'",
}
REPLAY_LOSSES = {
    "BCE": "**kwargs",
    "BCE.forward": LOSS,
    "BCESampled": LOG_IN,
    "BCESampled.forward": SAMPLED,
    "CE": "**kwargs",
    "CE.forward": LOSS,
    "CESampled": "negative_labels_ignore_index=-100, **kwargs",
    "CESampled.forward": SAMPLED,
    "LogInCE": f"cardinality, {LOG_IN}",
    "LogInCE.forward": LOSS,
    "LogInCESampled": LOG_IN,
    "LogInCESampled.forward": SAMPLED,
    "LogOutCE": "cardinality, negative_labels_ignore_index=-100, **kwargs",
    "LogOutCE.forward": LOSS,
}
REPLAY_SCE = {
    "SCEParams": "n_buckets, bucket_size_x, bucket_size_y, mix_x=False",
    "ScalableCrossEntropyLoss": "sce_params",
    "ScalableCrossEntropyLoss.forward": "embeddings, positive_labels, all_embeddings, padding_mask, tokens_mask=None",
}
REPLAY_TRANSFORMS = {
    "CopyTransform": "mapping",
    "GroupTransform": "mapping",
    "RenameTransform": "mapping",
    "UnsqueezeTransform": "column_name, dim",
    "NextTokenTransform": (
        "label_field, shift=1, query_features=['query_id', 'query_id_mask'], out_feature_name='positive_labels', "
        "mask_postfix='_mask'"
    ),
    "TokenMaskTransform": "token_field, out_feature_name='token_mask', mask_prob=0.15, generator=None",
    "TrimTransform": "seq_len, feature_names",
    "SequenceRollTransform": "field_name, roll=-1, padding_value=0",
    "UniformNegativeSamplingTransform": (
        "cardinality, num_negative_samples, *, out_feature_name='negative_labels', sample_distribution=None, "
        "generator=None"
    ),
    "MultiClassNegativeSamplingTransform": (
        "num_negative_samples, sample_mask, *, negative_selector_name='negative_selector', "
        "out_feature_name='negative_labels', generator=None"
    ),
}
REPLAY_POSTPROCESSORS = {
    "PostprocessorBase": "",
    "PostprocessorBase.on_prediction": "batch, logits",
    "PostprocessorBase.on_validation": "batch, logits",
    "SeenItemsFilter": "item_count, seen_items_column='seen_ids'",
    "SeenItemsFilter.on_prediction": "batch, logits",
    "SeenItemsFilter.on_validation": "batch, logits",
}
REPLAY: dict[str, dict[str, str]] = {
    "replay.nn.sequential": {
        "SasRec": "body, loss",
        "SasRec.forward": NEXT_ITEM,
        "SasRecBody": "embedder, embedding_aggregator, attn_mask_builder, encoder, output_normalization",
        "SasRecBody.forward": "feature_tensors, padding_mask",
        "SasRecTransformerLayer": "embedding_dim, num_heads, num_blocks, dropout, activation='gelu'",
        "SasRecTransformerLayer.forward": "feature_tensors, input_embeddings, padding_mask, attention_mask",
        "PositionAwareAggregator": "embedding_aggregator, max_sequence_length, dropout",
        "PositionAwareAggregator.forward": "feature_tensors",
        "DiffTransformerBlock": "embedding_dim, num_heads, lambda_init",
        "DiffTransformerBlock.forward": "input_embeddings, attention_mask",
        "DiffTransformerLayer": "embedding_dim, num_heads, num_blocks",
        "DiffTransformerLayer.forward": "input_embeddings, attention_mask",
        "TwoTower": "body, loss, context_merger=None",
        "TwoTower.forward": NEXT_ITEM,
        "TwoTower.from_params": f"schema, item_features_reader, {TOWERS}",
        "TwoTowerBody": (
            "schema, embedder, attn_mask_builder, query_tower_feature_names, item_tower_feature_names, "
            "query_embedding_aggregator, item_embedding_aggregator, query_encoder, query_tower_output_normalization, "
            "item_encoder, item_features_reader"
        ),
        "QueryTower": (
            "feature_names, embedder, embedding_aggregator, attn_mask_builder, encoder, output_normalization"
        ),
        "QueryTower.forward": "feature_tensors, padding_mask",
        "ItemTower": "schema, item_features_reader, feature_names, embedder, embedding_aggregator, encoder",
        "ItemTower.forward": "candidates_to_score=None",
    },
    "replay.nn.attention": {
        "MultiHeadDifferentialAttention": "embedding_dim, num_heads, lambda_init, bias=False, kdim=None, vdim=None",
        "MultiHeadDifferentialAttention.forward": "query, key, value, attn_mask",
    },
    "replay.nn.embedding": {
        "SequenceEmbedding": ("schema, excluded_features=None, categorical_list_feature_aggregation_method='sum'"),
        "SequenceEmbedding.forward": "feature_tensor, feature_names=None",
        "SequenceEmbedding.get_item_weights": "indices=None",
        "CategoricalEmbedding": "feature_info, categorical_list_feature_aggregation_method='sum'",
        "CategoricalEmbedding.forward": "indices",
        "NumericalEmbedding": "feature_info",
        "NumericalEmbedding.forward": "values",
    },
    "replay.nn.agg": {
        "SumAggregator": "embedding_dim",
        "SumAggregator.forward": "feature_tensors",
        "ConcatAggregator": "input_embedding_dims, output_embedding_dim",
        "ConcatAggregator.forward": "feature_tensors",
    },
    "replay.nn.ffn": {
        "PointWiseFeedForward": "embedding_dim, dropout, activation='gelu'",
        "PointWiseFeedForward.forward": "input_embeddings",
        "SwiGLU": "embedding_dim, hidden_dim",
        "SwiGLU.forward": "input_embeddings",
        "SwiGLUEncoder": "embedding_dim, hidden_dim",
        "SwiGLUEncoder.forward": "input_embeddings",
    },
    "replay.nn.mask": {
        "DefaultAttentionMask": "reference_feature_name, num_heads",
        "DefaultAttentionMask.forward": "feature_tensor, padding_mask",
    },
    "replay.nn.head": {
        "EmbeddingTyingHead": "",
        "EmbeddingTyingHead.forward": "hidden_states, item_embeddings",
    },
    "replay.nn.output": {
        "TrainOutput": "loss, hidden_states=None",
        "InferenceOutput": "logits, hidden_states=None",
    },
    "replay.nn.sequential.twotower": {"FeaturesReader": "schema, metadata, path"},
    "replay.nn.loss": REPLAY_LOSSES,
    "replay.models.nn.loss": REPLAY_SCE,
    "replay.nn.transform": REPLAY_TRANSFORMS,
    "replay.nn.transform.template": dict.fromkeys(
        ("make_default_sasrec_transforms", "make_default_twotower_transforms"),
        "tensor_schema, query_column='query_id'",
    ),
    "replay.nn.lightning.postprocessor": REPLAY_POSTPROCESSORS,
}
"""By RePlay's module paths."""
T4R_MASKING = {
    "MaskingInfo": "schema, targets",
    "MaskSequence": f"{MASKING}, **kwargs",
    "MaskSequence.compute_masked_targets": "item_ids, training=False",
    "MaskSequence.apply_mask_to_inputs": "inputs, schema",
    "MaskSequence.predict_all": "item_ids",
    "MaskSequence.forward": "inputs, item_ids, training=False",
    "MaskSequence.forward_output_size": "input_size",
    "MaskSequence.transformer_required_arguments": "",
    "MaskSequence.transformer_optional_arguments": "",
    "CausalLanguageModeling": f"{MASKING}, train_on_last_item_seq_only=False, **kwargs",
    "CausalLanguageModeling.apply_mask_to_inputs": "inputs, mask_schema",
    "MaskedLanguageModeling": f"{MASKING}, mlm_probability=0.15, **kwargs",
    "PermutationLanguageModeling": (
        f"{MASKING}, plm_probability=0.16666666666666666, max_span_length=5, permute_all=False, **kwargs"
    ),
    "PermutationLanguageModeling.compute_masked_targets": "item_ids, training=False",
    "PermutationLanguageModeling.transformer_required_arguments": "",
    "ReplacementLanguageModeling": f"{MASKING}, sample_from_batch=False, **kwargs",
    "ReplacementLanguageModeling.get_fake_tokens": "itemid_seq, target_flat, logits",
    "ReplacementLanguageModeling.sample_from_softmax": "logits",
}
METRICS = (
    "RankingMetric", "PrecisionAt", "RecallAt", "AvgPrecisionAt", "DCGAt", "NDCGAt", "MeanRecipricolRankAt",
    "MeanReciprocalRankAt",
)  # fmt: skip
RANKING = {
    **dict.fromkeys(METRICS, "top_ks=None, labels_onehot=False"),
    "RankingMetric.update": "preds, target, **kwargs",
    "RankingMetric.compute": "",
}

LIGHTNING = {
    "replay.nn.lightning": {
        "LightningModule": "model, optimizer_factory=None, lr_scheduler_factory=None",
        "LightningModule.forward": "batch",
    },
    "replay.nn.lightning.callback": {
        "ComputeMetricsCallback": (
            "metrics=None, ks=None, postprocessors=None, item_count=None, ground_truth_column='ground_truth', "
            "train_column='train'"
        ),
        **dict.fromkeys(
            ("PandasTopItemsCallback", "PolarsTopItemsCallback"),
            "top_k, query_column, item_column, rating_column='rating', postprocessors=None",
        ),
        "SparkTopItemsCallback": (
            "top_k, query_column, item_column, rating_column, spark_session, postprocessors=None"
        ),
        "TorchTopItemsCallback": "top_k, postprocessors=None",
        "HiddenStatesCallback": "hidden_state_index",
        **{
            f"{kind}Callback.get_result": ""
            for kind in ("PandasTopItems", "PolarsTopItems", "SparkTopItems", "TorchTopItems", "HiddenStates")
        },
    },
}
"""Needs the extra ``lightning``."""
DOCUMENTED = {
    **REPLAY,
    "genrec.modules": GENREC,
    "transformers4rec.masking": T4R_MASKING,
    "transformers4rec.metrics": RANKING,
    "meta.modules": {"truncated_normal": "x, mean, std"},
}
ALL = [(path, name, text) for path, table in (DOCUMENTED | LIGHTNING).items() for name, text in table.items()]
PROTOCOLS = {
    "replay.nn.agg": "AggregatorProto",
    "replay.nn.embedding": "EmbedderProto",
    "replay.nn.mask": "AttentionMaskProto",
    "replay.nn.normalization": "NormalizerProto",
    "replay.nn.loss": "LossProto",
    "replay.nn.sequential.twotower": "FeaturesReaderProtocol",
}


def module_of(path: str) -> Any:
    if path in LIGHTNING:
        pytest.importorskip("lightning")
    return importlib.import_module(f"{COMPAT}.{path}")


def test_every_documented_name_is_in_compat() -> None:
    compat = importlib.import_module(COMPAT)
    documented = {(path, name.split(".")[0]) for path, table in DOCUMENTED.items() for name in table}
    assert {name for _, name in documented} <= set(compat.__all__)
    for path, name in documented:
        assert getattr(compat, name) is getattr(module_of(path), name)


@pytest.mark.parametrize(
    "name",
    [
        "CEWeighted",
        "EqualityMaskTransform",
        "GeneralizedInteractionModule",
        "IdentityEmbedding",
        "LogOutCESampled",
        "ContextMergerProto",
        "EncoderProto",
        "ItemEncoderProto",
        "QueryEncoderProto",
        "SelectTransform",
    ],
)
def test_names_without_a_documented_signature_are_in_compat_too(name: str) -> None:
    compat = importlib.import_module(COMPAT)
    assert name in compat.__all__ and hasattr(compat, name)


@pytest.mark.parametrize(("path", "name"), [*PROTOCOLS.items()])
def test_protocols_are_where_their_blocks_are(path: str, name: str) -> None:
    assert getattr(module_of(path), name) is getattr(importlib.import_module(COMPAT), name)


def documented(text: str) -> list[inspect.Parameter]:
    """The parameters of a documented signature."""
    scope: dict[str, Callable[..., Any]] = {}
    exec(f"def documented({text}): ...", scope)
    return [*inspect.signature(scope["documented"]).parameters.values()]


def ours(path: str, name: str) -> list[inspect.Parameter]:
    """The parameters of a class, function or method here, without self."""
    value: Any = module_of(path)
    for part in name.split("."):
        owner, value = value, getattr(value, part)
    parameters = [*inspect.signature(value).parameters.values()]
    takes_self = inspect.isclass(owner) and inspect.isfunction(inspect.getattr_static(owner, name.rpartition(".")[2]))
    return parameters[1:] if takes_self else parameters


def default(parameter: inspect.Parameter) -> Any:
    """Immutable where the documentation has a list."""
    return list(parameter.default) if isinstance(parameter.default, (tuple, list)) else parameter.default


@pytest.mark.parametrize(("path", "name", "text"), ALL, ids=[f"{path}.{name}" for path, name, _ in ALL])
def test_signature(path: str, name: str, text: str) -> None:
    expected, actual = documented(text), ours(path, name)
    by_name = {parameter.name: parameter for parameter in actual}
    for place, parameter in enumerate(expected):
        if parameter.kind is parameter.VAR_KEYWORD:
            assert any(p.kind is p.VAR_KEYWORD for p in actual)
            continue
        mine = by_name[parameter.name]
        assert mine.kind is parameter.kind
        assert parameter.default is parameter.empty or default(mine) == default(parameter)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert actual[place].name == parameter.name
    for parameter in actual:
        if parameter.name not in {p.name for p in expected}:
            anything = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            assert anything or parameter.default is not parameter.empty


@pytest.mark.parametrize(
    ("path", "owner", "name"),
    [
        ("replay.nn.embedding", "SequenceEmbedding", "embeddings_dim"),
        ("replay.nn.embedding", "CategoricalEmbedding", "embedding_dim"),
        ("replay.nn.embedding", "CategoricalEmbedding", "weight"),
        ("replay.nn.embedding", "NumericalEmbedding", "embedding_dim"),
        ("replay.nn.embedding", "NumericalEmbedding", "weight"),
        ("replay.nn.agg", "SumAggregator", "embedding_dim"),
        ("replay.nn.agg", "ConcatAggregator", "embedding_dim"),
        ("replay.nn.lightning", "LightningModule", "candidates_to_score"),
        ("transformers4rec.masking", "MaskSequence", "transformer_arguments"),
    ],
)
def test_documented_properties(path: str, owner: str, name: str) -> None:
    assert isinstance(inspect.getattr_static(getattr(module_of(path), owner), name), property)
