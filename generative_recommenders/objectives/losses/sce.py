"""Scalable cross-entropy, SCE (arXiv 2409.18721): softmax only where tokens and items are close.

Random directions make buckets; a bucket holds the tokens and the items that lie furthest along its direction,
and a token competes with the items of its buckets only. The draw of buckets depends on the whole batch, so
this loss is not a sum over tokens: N processes do not give the numbers of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generative_recommenders.config.fields import Size
from generative_recommenders.config.registry import register_loss
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.catalogue import labels_and_weights
from generative_recommenders.objectives.losses.sampled import full_precision, weighted
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.types import LossOutput

_SELECTION_BYTES = 256 * 2**20  # bound of the products of directions with all items held at a time


@register_loss("ScalableCrossEntropyLoss", "SCE", gin_name="sce")
class ScalableCrossEntropyLoss(nn.Module):
    """Softmax cross-entropy of a token among the items near it alone (arXiv 2409.18721), in float32, also under
    autocast.

    ``-ln softmax`` of a token's label against the items of a bucket, the label among them taken out. Directions are
    ``D^(-1/4) Z`` with normal Z ``[n_buckets, D]``, or ``(D^(-1/4) Z)^T x`` with Z ``[T, n_buckets]`` under mix_x. A
    token in several buckets keeps its largest loss; tokens of no bucket, or of loss exactly 0, are left out of the sum
    and of the weight (RePlay's reading).

    n_buckets: random directions.
    bucket_size_x: tokens of a bucket (all, if there are fewer).
    bucket_size_y: items of a bucket (all, if there are fewer).
    mix_x: directions are random mixtures of the tokens' states instead of random vectors.
    """

    def __init__(
        self,
        n_buckets: Size = 256,
        bucket_size_x: Size = 256,
        bucket_size_y: Size = 256,
        mix_x: bool = False,
    ) -> None:
        super().__init__()
        self.n_buckets, self.mix_x = n_buckets, mix_x
        self.bucket_size_x, self.bucket_size_y = bucket_size_x, bucket_size_y

    def forward(
        self,
        hidden: Tensor,
        item_weight: Tensor,
        positives: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        *,
        selectable: Tensor | None = None,
        normals: Tensor | None = None,
    ) -> LossOutput:
        """Loss of T tokens over V items.

        hidden: ``[T, D]`` float. item_weight: ``[V, D]`` float.
        positives: ``[T]`` int64 rows of ``item_weight``, -1 = none. weights: ``[T]`` float or bool.
        generator: of the normal numbers, on hidden's device.
        selectable: ``[T]`` bool, tokens that buckets choose first; those of non-zero weight by default.
        normals: Z itself, instead of drawing it.
        Raises ``UserError`` for positives out of range, or several of a token.
        """
        if positives.dim() != 1:
            raise UserError(f"SCE takes one positive for each token, not positives {tuple(positives.shape)}")
        own_labels, own_weights = labels_and_weights(positives, weights, len(hidden), len(item_weight))
        with dispatch.autocast(hidden, None):
            hidden, item_weight = full_precision(hidden), full_precision(item_weight)
            weights, labels = own_weights[:, 0].to(hidden.dtype), own_labels[:, 0].clamp(min=0)
            if selectable is None:
                selectable = weights != 0
            tokens, items = self._buckets(hidden.detach(), item_weight.detach(), selectable, generator, normals)
            # By lookups: an index's gradient would be added up by torch's threads in whatever order they come.
            own = lookup_rows((hidden * lookup_rows(item_weight, labels)).sum(1, keepdim=True), tokens)[..., 0]
            logits = lookup_rows(hidden, tokens) @ lookup_rows(item_weight, items).transpose(1, 2)
            # The label is among the items of some buckets; it counts once, as the positive.
            logits = logits.masked_fill(items[:, None, :] == labels[tokens][:, :, None], -torch.inf)
            losses = torch.logaddexp(own, logits.logsumexp(2)) - own  # [n_buckets, X]
            zeros = hidden.new_zeros(len(hidden))
            largest = zeros.scatter_reduce(0, tokens.flatten(), losses.flatten(), "amax")
            return weighted(largest, weights * (largest != 0))

    @torch.no_grad()
    def _buckets(
        self,
        hidden: Tensor,
        item_weight: Tensor,
        selectable: Tensor,
        generator: torch.Generator | None,
        normals: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[n_buckets, X]`` and items ``[n_buckets, Y]`` of the buckets."""
        count, (length, width) = self.n_buckets, hidden.shape
        shape = (length, count) if self.mix_x else (count, width)
        if normals is None:
            normals = torch.randn(shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
        if normals.shape != shape:
            raise UserError(f"SCE's normal numbers must be {list(shape)}, not {list(normals.shape)}")
        scaled = normals * width**-0.25
        directions = scaled.t() @ hidden if self.mix_x else scaled
        reach = (directions @ hidden.t()).masked_fill(~selectable, -torch.inf)
        tokens = reach.topk(min(self.bucket_size_x, len(hidden))).indices
        size = min(self.bucket_size_y, len(item_weight))
        rows = max(1, _SELECTION_BYTES // (item_weight.shape[0] * item_weight.element_size()))
        items = [(part @ item_weight.t()).topk(size).indices for part in directions.split(rows)]
        return tokens, torch.cat(items)
