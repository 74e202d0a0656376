"""BPR (arXiv 1205.2618) as a loss plug-in with an option.

python main.py --plugin=examples/plugins/bpr.py --gin_bindings='train_fn.loss_module = "BPR"' --gin_bindings='bpr.margin
= 0.5'
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge

from generative_recommenders import register_loss
from generative_recommenders.objectives.losses.sampled import SampledLoss, Terms


@register_loss("BPR", gin_name="bpr")
class BPR(SampledLoss):
    """``mean_k softplus(margin + s-_k - s+)`` over the negatives that count.

    margin: by how much a positive has to lie above a negative.
    """

    def __init__(self, margin: Annotated[float, Ge(0.0)] = 0.0) -> None:
        super().__init__()
        self.margin = margin

    def terms(self, positive: torch.Tensor, negative: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> Terms:
        """positive ``[T, P]``, negative ``[T, R]``."""
        # Masked scores may be NaN, which a `where` after the softplus would pass on to the gradients.
        negative = negative.masked_fill(~mask, 0.0)
        gaps = F.softplus(self.margin + negative[:, None, :] - positive[:, :, None])
        count = mask.sum(1, keepdim=True)
        means = torch.where(mask[:, None, :], gaps, 0.0).sum(2) / count.clamp(min=1)
        return Terms(means, weights * (count > 0))
