"""Output postprocessors: normalisation of the encoder's states before they are scored."""

from __future__ import annotations

import torch

from generative_recommenders.config.fields import Positive
from generative_recommenders.config.registry import register_output_postprocessor
from generative_recommenders.ops.normalization import l2_normalize, layer_norm


class NormPostprocessor(torch.nn.Module):
    """A norm over the last axis, with the options of all of them."""

    def __init__(self, eps: Positive = 1e-6, embedding_dim: int | None = None) -> None:
        super().__init__()
        self.eps, self.embedding_dim = eps, embedding_dim


@register_output_postprocessor("l2_norm")
class L2NormEmbeddingPostprocessor(NormPostprocessor):
    """``v / max(|v|, eps)`` on ``[..., D]``.

    eps: lower bound of the norm that is divided by.
    embedding_dim: D, the first columns of wider states (those of a preprocessor that puts ratings beside the items), as
    in HSTU's public runs; all columns unless given.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return l2_normalize(x[..., : self.embedding_dim], self.eps)


@register_output_postprocessor("layer_norm")
class LayerNormEmbeddingPostprocessor(NormPostprocessor):
    """Layer norm without weights over the last axis of ``[..., D]``.

    eps: added to the variance.
    embedding_dim: as in `L2NormEmbeddingPostprocessor`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x[..., : self.embedding_dim], self.eps)


@register_output_postprocessor("none")
class NoPostprocessor(torch.nn.Identity):
    """The states as they are, for encoders that end in a norm of their own (``sasrec_encoder.final_norm``)."""

    def __init__(self) -> None:  # without the arguments that torch's takes and ignores
        super().__init__()
