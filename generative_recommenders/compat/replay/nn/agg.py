"""Aggregators of the feature embeddings of a position into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.protocols import AggregatorProto
from generative_recommenders.errors import UserError
from generative_recommenders.ops.dropout import Dropout

__all__ = ["AggregatorProto", "ConcatAggregator", "PositionAwareAggregator", "SumAggregator"]


class _Aggregator(nn.Module):
    """Base class of the aggregators of embeddings: the width of their result."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self._embedding_dim = embedding_dim

    @property
    def embedding_dim(self) -> int:
        return self._embedding_dim

    @staticmethod
    def check_width(name: str, tensor: Tensor, width: int) -> None:
        if tensor.shape[-1] != width:
            raise UserError(f"embedding {name} has width {tensor.shape[-1]}: the aggregator was built for {width}")


class SumAggregator(_Aggregator):
    """The sum of all embeddings, which must be equally wide."""

    def forward(self, feature_tensors: Mapping[str, Tensor]) -> Tensor:
        """Name to ``[..., D]``; returns ``[..., D]``. UserError where a width is not D."""
        for name, tensor in feature_tensors.items():
            self.check_width(name, tensor, self.embedding_dim)
        return torch.stack(tuple(feature_tensors.values())).sum(0)


class ConcatAggregator(_Aggregator):
    """The embeddings side by side in the order of their names, then a linear layer to ``output_embedding_dim``.

    A single embedding is returned as it is and must have the output's width already.
    """

    def __init__(self, input_embedding_dims: Sequence[int], output_embedding_dim: int) -> None:
        super().__init__(output_embedding_dim)
        self._input_width = sum(input_embedding_dims)
        self.feat_projection: nn.Linear | None = None
        if len(input_embedding_dims) > 1:
            self.feat_projection = nn.Linear(self._input_width, output_embedding_dim)
        elif self._input_width != output_embedding_dim:
            raise UserError(
                f"ConcatAggregator of one embedding of width {self._input_width}: "
                f"output_embedding_dim {output_embedding_dim} must be the same"
            )

    def forward(self, feature_tensors: Mapping[str, Tensor]) -> Tensor:
        """Name to ``[..., D_name]``; returns ``[..., output_embedding_dim]``."""
        joined = torch.cat([feature_tensors[name] for name in sorted(feature_tensors)], dim=-1)
        self.check_width(" + ".join(sorted(feature_tensors)), joined, self._input_width)
        return joined if self.feat_projection is None else self.feat_projection(joined)


class PositionAwareAggregator(nn.Module):
    """sqrt(D) times the aggregated embeddings, plus learned positions, then dropout.

    The last position of a sequence has the last row of the table, so left-padded sequences of any length agree.

    embedding_aggregator: what joins the features; its width D is the width of the positions.
    max_sequence_length: rows of the table.
    """

    def __init__(self, embedding_aggregator: AggregatorProto, max_sequence_length: int, dropout: float) -> None:
        super().__init__()
        self.embedding_aggregator = embedding_aggregator
        self.pe = nn.Embedding(max_sequence_length, embedding_aggregator.embedding_dim)
        self.dropout = Dropout(dropout)
        nn.init.xavier_normal_(self.pe.weight)

    @property
    def embedding_dim(self) -> int:
        return self.embedding_aggregator.embedding_dim

    def forward(self, feature_tensors: Mapping[str, Tensor]) -> Tensor:
        """Name to ``[B, N, D_name]``; returns ``[B, N, D]``. UserError where N exceeds the table."""
        aggregated = self.embedding_aggregator(feature_tensors)
        length, rows = aggregated.shape[1], self.pe.num_embeddings
        if length > rows:
            raise UserError(f"sequence of {length} positions: PositionAwareAggregator has max_sequence_length {rows}")
        return self.dropout(math.sqrt(self.embedding_dim) * aggregated + self.pe.weight[rows - length :])
