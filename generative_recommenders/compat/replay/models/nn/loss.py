"""RePlay's scalable cross-entropy by its module path."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses import sce

__all__ = ["SCEParams", "ScalableCrossEntropyLoss"]


@dataclass(frozen=True)
class SCEParams:
    """Sizes of SCE, see `objectives.losses.sce.ScalableCrossEntropyLoss`."""

    n_buckets: int
    bucket_size_x: int
    bucket_size_y: int
    mix_x: bool = False


class ScalableCrossEntropyLoss(nn.Module):
    """SCE over rectangles (`objectives.losses.sce`), drawing from torch's global generator."""

    def __init__(self, sce_params: SCEParams) -> None:
        super().__init__()
        self.core = sce.ScalableCrossEntropyLoss(**asdict(sce_params))

    def forward(
        self,
        embeddings: Tensor,
        positive_labels: Tensor,
        all_embeddings: Tensor,
        padding_mask: Tensor,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean loss, scalar; 0 where no bucket holds a position that counts.

        embeddings: ``[B, L, D]``. positive_labels: ``[B, L]`` int64. all_embeddings: ``[V, D]``.
        padding_mask: ``[B, L]`` bool, True = real. tokens_mask: ``[B, L]`` bool, True = does not count in the mean.
        ``UserError`` where every position is masked, or a label is no row of ``all_embeddings``.
        """
        counted = padding_mask if tokens_mask is None else padding_mask & ~tokens_mask
        if not counted.any():
            raise UserError("ScalableCrossEntropyLoss: every position is masked, there is nothing to learn")
        output = self.core(
            embeddings.flatten(0, 1),
            all_embeddings,
            positive_labels.masked_fill(~padding_mask, 0).flatten(),
            counted.flatten(),
            selectable=padding_mask.flatten(),
        )
        return output.sum / output.weight.clamp(min=1)
