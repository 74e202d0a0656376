"""RePlay's TwoTower (doi 10.1145/3366424.3386195): a query tower over the history, an item tower over item features."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.data.schema import TensorFeatureInfo, TensorSchema, item_id_feature
from generative_recommenders.compat.replay.nn import protocols
from generative_recommenders.compat.replay.nn.agg import SumAggregator
from generative_recommenders.compat.replay.nn.sequential.sasrec import (
    NextItemModel,
    QueryTower,
    SasRec,
    call_with_accepted,
    embedded_schema,
)
from generative_recommenders.config.sections import ListReduction
from generative_recommenders.data.list_columns import padded, read_columns
from generative_recommenders.errors import UserError
from generative_recommenders.ops.feed_forward import SwiGLUEncoder

FeaturesReaderProtocol = protocols.FeaturesReaderProtocol

__all__ = ["FeaturesReader", "FeaturesReaderProtocol", "ItemTower", "TwoTower", "TwoTowerBody"]


class FeaturesReader:
    """Item features from a Parquet file, as tensors in the order of the item ids.

    schema: names the item id and, by ``feature_sources``, the column of each feature (its own name by default).
    metadata: the features to read. A list feature may have a width and a value to pad it with on the left,
        ``{"genres": {"shape": 5, "padding": 20}}``; the defaults are the longest list and the feature's padding value.
    path: one row per item, ids 0..V-1, already encoded.

    UserError where ids are not 0..V-1 each once, and where values are empty, too many or outside their categories.
    """

    def __init__(self, schema: TensorSchema, metadata: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
        item = item_id_feature(schema, "FeaturesReader").name
        unknown = [name for name in metadata if name not in schema]
        if unknown:
            raise UserError(f"FeaturesReader: metadata names features that the schema does not have: {unknown}")
        sources = {name: schema[name].feature_source for name in (item, *metadata)}
        columns = {name: source.column if source else name for name, source in sources.items()}
        table = read_columns(Path(path), list(dict.fromkeys(columns.values())))
        ids = table[columns[item]].to_numpy()
        order = np.argsort(ids, kind="stable")
        if not np.array_equal(ids[order], np.arange(ids.size)):
            missing = np.setdiff1d(np.arange(ids.size), ids)[:5].tolist()
            raise UserError(f"item features in {path}: ids must be 0..{ids.size - 1}, each once; missing: {missing}")
        self._features: dict[str, Tensor] = {}
        for name, settings in metadata.items():
            try:
                values = _encoded(schema[name], table[columns[name]].combine_chunks(), settings)
            except (TypeError, ValueError, pa.ArrowException) as error:
                raise UserError(f"item feature {name!r}: {error}") from error
            self._features[name] = values[torch.from_numpy(order)]

    @property
    def feature_names(self) -> list[str]:
        return list(self._features)

    def __getitem__(self, key: str) -> Tensor:
        """``[V]`` or ``[V, width]``, int64 for categorical features and float32 for numerical ones."""
        if key not in self._features:
            raise UserError(f"item feature {key!r} was not read: metadata names {', '.join(self._features)}")
        return self._features[key]


def _encoded(feature: TensorFeatureInfo, column: pa.Array, settings: Mapping[str, Any]) -> Tensor:
    """The column as a tensor; ValueError for values that are no category or finite number, and for lists too long."""
    shape: tuple[int, ...] = ()
    if feature.is_list:
        longest = pc.max(pc.list_value_length(column)).as_py() or 0
        width = operator.index(settings.get("shape", longest))  # numpy's integers, too
        if longest > width:
            raise ValueError(f"a list of {longest} entries, metadata allows {width}")
        shape = (width,)
    values, real = padded(column, shape, settings.get("padding", feature.padding_value))
    entries = values[real]
    if feature.is_cat:
        size = feature.cardinality or 0
        wrong = entries[((entries < 0) | (entries >= size)) & (entries != feature.padding_value)]
        allowed = f"categories 0..{size - 1}"
    else:
        wrong, allowed = entries[~np.isfinite(entries)], "finite numbers"
    if wrong.size:
        raise ValueError(f"{wrong.size} of {entries.size} values are not {allowed}, the first is {wrong[0]}")
    return torch.from_numpy(values).to(torch.int64 if feature.is_cat else torch.float32)


class ItemTower(nn.Module):
    """Item features to item embeddings. The features of all items are held in memory, as buffers.

    encoder: called with those of feature_tensors and input_embeddings that it accepts.
    """

    def __init__(
        self,
        schema: TensorSchema,
        item_features_reader: protocols.FeaturesReaderProtocol,
        feature_names: Sequence[str],
        embedder: protocols.EmbedderProto,
        embedding_aggregator: protocols.AggregatorProto,
        encoder: protocols.ItemEncoderProto,
    ) -> None:
        super().__init__()
        self.feature_names = list(feature_names)
        self.embedder = embedder
        self.embedding_aggregator = embedding_aggregator
        self.encoder = encoder
        item = item_id_feature(schema, "ItemTower")
        if item.cardinality is None:
            raise UserError(f"item id feature {item.name!r}: give its cardinality")
        # A padding id that ends the range of ids is no item; one within it is an id like the others.
        ends_the_range = item.padding_value in (item.cardinality - 1, item.cardinality)
        num_items = item.padding_value if ends_the_range else item.cardinality
        for name in self.feature_names:
            values = item_features_reader[name]
            if (rows := len(values)) != num_items:
                raise UserError(
                    f"item feature {name!r} has {rows} rows, the schema has {num_items} items: give each a row"
                )
            self.register_buffer(_buffer_name(name), values)

    def forward(self, candidates_to_score: Tensor | None = None) -> Tensor:
        """``[V, D]``, or ``[..., D]`` for item ids ``[...]``."""
        features = {name: self.get_buffer(_buffer_name(name)) for name in self.feature_names}
        if candidates_to_score is not None:
            features = {name: values[candidates_to_score] for name, values in features.items()}
        embeddings = self.embedding_aggregator(self.embedder(features, self.feature_names))
        return call_with_accepted(self.encoder, feature_tensors=features, input_embeddings=embeddings)


class TwoTowerBody(nn.Module):
    """A `QueryTower` and an `ItemTower` over one embedder, whose tables they share."""

    def __init__(
        self,
        schema: TensorSchema,
        embedder: protocols.EmbedderProto,
        attn_mask_builder: protocols.AttentionMaskProto,
        query_tower_feature_names: Sequence[str],
        item_tower_feature_names: Sequence[str],
        query_embedding_aggregator: protocols.AggregatorProto,
        item_embedding_aggregator: protocols.AggregatorProto,
        query_encoder: protocols.QueryEncoderProto,
        query_tower_output_normalization: protocols.NormalizerProto,
        item_encoder: protocols.ItemEncoderProto,
        item_features_reader: protocols.FeaturesReaderProtocol,
    ) -> None:
        super().__init__()
        self.embedder = embedder
        self.query_tower = QueryTower(
            query_tower_feature_names,
            embedder,
            query_embedding_aggregator,
            attn_mask_builder,
            query_encoder,
            query_tower_output_normalization,
        )
        self.item_tower = ItemTower(
            schema, item_features_reader, item_tower_feature_names, embedder, item_embedding_aggregator, item_encoder
        )

    def forward(self, feature_tensors: protocols.Tensors, padding_mask: Tensor) -> Tensor:
        """The query tower's hidden states ``[B, N, D]``."""
        return self.query_tower(feature_tensors, padding_mask)


class TwoTower(NextItemModel):
    """Scores are dot products of the two towers' outputs.

    context_merger: called as ``(model_hidden_state=[B, N, D], feature_tensors=...)`` on the query tower's output, in
    training and in evaluation; what it returns is scored.
    """

    body: TwoTowerBody

    def __init__(
        self, body: TwoTowerBody, loss: protocols.LossProto, context_merger: protocols.ContextMergerProto | None = None
    ) -> None:
        super().__init__(body, loss)
        self.context_merger = context_merger

    @classmethod
    def from_params(
        cls,
        schema: TensorSchema,
        item_features_reader: protocols.FeaturesReaderProtocol,
        embedding_dim: int = 192,
        num_heads: int = 4,
        num_blocks: int = 2,
        max_sequence_length: int = 50,
        dropout: float = 0.3,
        excluded_features: Sequence[str] | None = None,
        categorical_list_feature_aggregation_method: ListReduction = "sum",
    ) -> TwoTower:
        """The query tower of `SasRec.from_params`, SwiGLU as item tower over the same features, summed; full
        cross-entropy."""
        sasrec = SasRec.from_params(
            schema, embedding_dim, num_heads, num_blocks, max_sequence_length, dropout, excluded_features,
            categorical_list_feature_aggregation_method,
        )  # fmt: skip
        query, schema = sasrec.body, embedded_schema(schema, excluded_features, embedding_dim)
        body = TwoTowerBody(
            schema=schema,
            embedder=query.embedder,
            attn_mask_builder=query.attn_mask_builder,
            query_tower_feature_names=schema.names,
            item_tower_feature_names=schema.names,
            query_embedding_aggregator=query.embedding_aggregator,
            item_embedding_aggregator=SumAggregator(embedding_dim),
            query_encoder=query.encoder,
            query_tower_output_normalization=query.output_normalization,
            item_encoder=SwiGLUEncoder(embedding_dim, 2 * embedding_dim),
            item_features_reader=item_features_reader,
        )
        return cls(body, sasrec.loss)

    def hidden_states(self, feature_tensors: protocols.Tensors, padding_mask: Tensor) -> tuple[Tensor, ...]:
        states = super().hidden_states(feature_tensors, padding_mask)
        if self.context_merger is None:
            return states
        return (*states, self.context_merger(model_hidden_state=states[-1], feature_tensors=feature_tensors))

    def item_embeddings(self, candidates_to_score: Tensor | None = None) -> Tensor:
        return self.body.item_tower(candidates_to_score)


def _buffer_name(feature: str) -> str:
    # As in RePlay's checkpoints.
    return "item_reference_" + feature.replace(".", "_")
