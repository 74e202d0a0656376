"""The documented examples of SasRec and TwoTower: import lines changed, undefined names filled in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from generative_recommenders.compat.replay.data import FeatureHint, FeatureSource, FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator, SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.ffn import SwiGLUEncoder
from generative_recommenders.compat.replay.nn.loss import CESampled
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.sequential import (
    SasRec,
    SasRecBody,
    SasRecTransformerLayer,
    TwoTower,
    TwoTowerBody,
)
from generative_recommenders.compat.replay.nn.sequential.twotower import FeaturesReader
from generative_recommenders.compat.replay.nn.transform.template import make_default_sasrec_transforms

NUM_UNIQUE_ITEMS = 40


def _schema(cardinality: int) -> TensorSchema:
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=256,
        padding_value=NUM_UNIQUE_ITEMS,
        cardinality=cardinality,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    return TensorSchema([item])


def _step_and_score(model: torch.nn.Module, tensor_schema: TensorSchema) -> None:
    """One step on a batch made by the default transforms, then inference with candidates."""
    items = torch.randint(0, NUM_UNIQUE_ITEMS, (3, 11))
    items[0, :7] = NUM_UNIQUE_ITEMS
    batch = {"item_id": items, "item_id_mask": items != NUM_UNIQUE_ITEMS, "query_id": torch.arange(3)}
    for transform in make_default_sasrec_transforms(tensor_schema)["train"]:
        batch = transform(batch)
    labels, target_mask = batch["positive_labels"], batch["target_padding_mask"]
    output = model(
        batch["feature_tensors"],
        batch["padding_mask"],
        positive_labels=labels,
        negative_labels=torch.randint(0, NUM_UNIQUE_ITEMS, (5,)),
        target_padding_mask=target_mask,
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    model.eval()
    logits = model(batch["feature_tensors"], batch["padding_mask"], torch.tensor([3, 1])).logits
    every = model(batch["feature_tensors"], batch["padding_mask"]).logits
    assert torch.allclose(logits, every[:, [3, 1]], atol=1e-4)


def test_sasrec() -> None:
    tensor_schema = _schema(NUM_UNIQUE_ITEMS + 1)
    body = SasRecBody(
        embedder=SequenceEmbedding(
            schema=tensor_schema,
        ),
        embedding_aggregator=PositionAwareAggregator(
            embedding_aggregator=SumAggregator(embedding_dim=256),
            max_sequence_length=100,
            dropout=0.2,
        ),
        attn_mask_builder=DefaultAttentionMask(
            reference_feature_name=tensor_schema.item_id_feature_name,
            num_heads=2,
        ),
        encoder=SasRecTransformerLayer(
            embedding_dim=256,
            num_heads=2,
            num_blocks=2,
            dropout=0.3,
            activation="relu",
        ),
        output_normalization=torch.nn.LayerNorm(256),
    )
    sasrec = SasRec(body=body, loss=CESampled(padding_idx=tensor_schema.item_id_features.item().padding_value))
    _step_and_score(sasrec, tensor_schema)


def test_two_tower(tmp_path: Path) -> None:
    path = tmp_path / "item_features.parquet"
    pq.write_table(pa.table({"item_id": list(range(NUM_UNIQUE_ITEMS))}), path)
    tensor_schema = _schema(NUM_UNIQUE_ITEMS)
    common_aggregator = SumAggregator(embedding_dim=256)
    body = TwoTowerBody(
        schema=tensor_schema,
        embedder=SequenceEmbedding(schema=tensor_schema),
        attn_mask_builder=DefaultAttentionMask(
            reference_feature_name=tensor_schema.item_id_feature_name,
            num_heads=2,
        ),
        query_tower_feature_names=tensor_schema.names,
        item_tower_feature_names=tensor_schema.names,
        query_embedding_aggregator=PositionAwareAggregator(
            embedding_aggregator=common_aggregator,
            max_sequence_length=100,
            dropout=0.2,
        ),
        item_embedding_aggregator=common_aggregator,
        query_encoder=SasRecTransformerLayer(
            embedding_dim=256,
            num_heads=2,
            num_blocks=2,
            dropout=0.3,
            activation="relu",
        ),
        query_tower_output_normalization=torch.nn.LayerNorm(256),
        item_encoder=SwiGLUEncoder(embedding_dim=256, hidden_dim=2 * 256),
        item_features_reader=FeaturesReader(
            schema=tensor_schema,
            metadata={"item_id": {}},
            path=path,
        ),
    )
    twotower = TwoTower(
        body=body,
        loss=CESampled(ignore_index=tensor_schema["item_id"].padding_value),
    )
    _step_and_score(twotower, tensor_schema)
