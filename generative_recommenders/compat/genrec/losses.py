"""genrec's losses under their documented names, arguments and defaults.

Differences on purpose: in ``SequenceLoss`` a position whose attention mask is 0 does not count (genrec documents the
mask and does not use it), and a batch without any target is a ``UserError`` where it was NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.sampled import SampledSoftmaxLoss, full_precision


class VQVAELoss(nn.Module):
    """Reconstruction, commitment and codebook terms of a VQ-VAE (arXiv 1711.00937, equation 3).

    ``total = mean (x_recon - x)^2 + commitment_cost * commitment + beta * embedding``.
    """

    def __init__(self, commitment_cost: float = 0.25, beta: float = 1.0) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost
        self.beta = beta

    def forward(self, x: Tensor, x_recon: Tensor, commitment_loss: Tensor, embedding_loss: Tensor) -> dict[str, Tensor]:
        """x, x_recon: any one shape, float; commitment_loss, embedding_loss: scalars.

        Returns scalars ``total_loss``, ``reconstruction_loss``, ``commitment_loss``, ``embedding_loss``;
        ``UserError`` for an empty x.
        """
        if not x.numel():
            raise UserError("VQVAELoss: the batch is empty")
        reconstruction = F.mse_loss(x_recon, x)
        total = reconstruction + self.commitment_cost * commitment_loss + self.beta * embedding_loss
        return {
            "total_loss": total,
            "reconstruction_loss": reconstruction,
            "commitment_loss": commitment_loss,
            "embedding_loss": embedding_loss,
        }


class SequenceLoss(nn.Module):
    """Cross-entropy and accuracy of a sequence model, mean over the positions that count.

    Without a mask, or with one that is non-zero everywhere, the numbers are genrec's.

    vocab_size: V. ignore_index: label that does not count.
    label_smoothing: share of the target spread evenly over the vocabulary.
    """

    def __init__(self, vocab_size: int, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing is {label_smoothing}: give a share in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """logits: ``[B, N, V]`` float; labels: ``[B, N]`` int64; attention_mask: ``[B, N]``, non-zero = counts.

        Returns scalars ``loss`` and ``accuracy`` (share of counting positions whose label has the largest
        logit). Raises ``UserError`` where no position counts or a label that counts is outside 0..V-1.
        """
        counts = labels != self.ignore_index
        if attention_mask is not None:
            counts = counts & (attention_mask != 0)
        if not counts.any():
            raise UserError("SequenceLoss: no position counts (every label ignored or masked)")
        chosen, wanted = logits.reshape(*labels.shape, self.vocab_size)[counts], labels[counts]
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"SequenceLoss: labels reach from {low} to {high}, not 0..{self.vocab_size - 1} "
                f"(ignored: {self.ignore_index})"
            )
        accuracy = (chosen.detach().argmax(-1) == wanted).float().mean()
        loss = F.cross_entropy(full_precision(chosen), wanted, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": accuracy}


class ContrastiveLoss(nn.Module):
    """InfoNCE of an anchor, its positive and its negatives over cosine similarities, mean over anchors.

    ``-ln softmax`` of ``cos(a, p) / temperature`` among itself and all ``cos(a, n_k) / temperature``. genrec
    documents a margin and does not read it; so does the default here.

    temperature: divisor of the similarities.
    margin: lead in cosine that the positive must have.
    apply_margin: take ``cos(a, p) - margin`` for ``cos(a, p)`` (additive margin softmax, arXiv 1801.05599).
    """

    def __init__(self, temperature: float = 0.1, margin: float = 0.2, *, apply_margin: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.margin = margin
        self.apply_margin = apply_margin
        self.criterion = SampledSoftmaxLoss()

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """anchor, positive: ``[B, D]``; negative: ``[B, R, D]``. Returns a scalar; ``UserError`` for B = 0."""
        if not len(anchor):
            raise UserError("ContrastiveLoss: the batch has no anchors")
        anchor, positive, negative = (F.normalize(x, dim=-1) for x in (anchor, positive, negative))
        lead = self.margin if self.apply_margin else 0.0
        close = ((anchor * positive).sum(-1, keepdim=True) - lead) / self.temperature
        far = torch.bmm(negative, anchor[:, :, None])[:, :, 0] / self.temperature
        return self.criterion(close, far, torch.ones_like(close), torch.ones_like(far, dtype=torch.bool)).mean()
