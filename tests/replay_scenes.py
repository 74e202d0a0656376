"""Small schemas of RePlay's models and inputs of its losses."""

from __future__ import annotations

import torch

from generative_recommenders.compat.replay.data import FeatureHint, FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo, TensorSchema
from generative_recommenders.compat.replay.nn.loss import SampledLoss

ITEM_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0, 0.7, 1.5, 0.2, 1.0])


def item_schema(num_items: int, *further: TensorFeatureInfo) -> TensorSchema:
    """Item ids below the padding id ``num_items``, 16 wide."""
    kind, hint = FeatureType.CATEGORICAL, FeatureHint.ITEM_ID
    return TensorSchema([TensorFeatureInfo("item_id", kind, True, hint, None, num_items, num_items, 16), *further])


def dot_product(weight: torch.Tensor):
    def logits(hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        if ids is None or ids.dim() == 1:
            return hidden @ (weight if ids is None else weight[ids]).t()
        return (hidden[:, None] * weight[ids]).sum(-1)

    return logits


def scene(positives: int = 1, items: int = 9):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(items, 4, generator=g)
    hidden = torch.randn(2, 3, 4, generator=g)
    labels = torch.randint(0, items, (2, 3, positives), generator=g)
    mask = torch.tensor([[True, True, False], [True, True, True]])[:, :, None].repeat(1, 1, positives)
    return weight, hidden, labels, mask


def with_logits(loss, weight):
    loss.logits_callback = dot_product(weight)
    return loss


def value_of(loss, weight, hidden, labels, mask, negatives=(0, 4)):
    """The loss; a sampled one is given the negatives."""
    sampled = {"negative_labels": torch.tensor(negatives)} if isinstance(loss, SampledLoss) else {}
    return with_logits(loss, weight)(hidden, labels, target_padding_mask=mask, **sampled)
