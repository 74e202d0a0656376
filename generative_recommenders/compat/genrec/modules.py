"""genrec's modules under their documented names: encoder, model utilities, attention pictures, losses, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from absl import logging
from torch import nn

from generative_recommenders.compat.genrec.losses import ContrastiveLoss, SequenceLoss, VQVAELoss
from generative_recommenders.compat.genrec.metrics import RecommendationMetrics
from generative_recommenders.compat.genrec.transformer import MultiHeadAttention, TransformerEncoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.transformer import PositionalEncoding

__all__ = [
    "AttentionVisualization",
    "ContrastiveLoss",
    "ModelUtils",
    "MultiHeadAttention",
    "PositionalEncoding",
    "RecommendationMetrics",
    "SequenceLoss",
    "TransformerEncoder",
    "VQVAELoss",
]

MAX_ANNOTATED_CELLS = 400

_INITIALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_uniform_,
    "normal": lambda weight: nn.init.normal_(weight, mean=0.0, std=0.02),
}


class ModelUtils:
    """Counting, freezing and initialising the parameters of any module."""

    @staticmethod
    def count_parameters(model: nn.Module) -> int:
        """Elements of the parameters that are trained."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @staticmethod
    def get_model_size(model: nn.Module) -> str:
        """Bytes of parameters and buffers in MiB, as "1.23 MB"."""
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        return f"{size / 2**20:.2f} MB"

    @staticmethod
    def freeze_layers(model: nn.Module, layer_names: Sequence[str]) -> None:
        """Stop training every parameter whose name contains one of ``layer_names``."""
        _set_trained(model, layer_names, trained=False)

    @staticmethod
    def unfreeze_layers(model: nn.Module, layer_names: Sequence[str]) -> None:
        """Train every parameter whose name contains one of ``layer_names``."""
        _set_trained(model, layer_names, trained=True)

    @staticmethod
    def initialize_weights(model: nn.Module, init_type: str = "xavier") -> None:
        """Draw all matrices named "weight" anew and set all biases to 0.

        init_type: "xavier", "kaiming" (both uniform) or "normal" (standard deviation 0.02). Weights with fewer than two
        axes (scales of norms) keep their values; padding rows of embeddings stay 0.
        """
        if init_type not in _INITIALIZERS:
            raise UserError(f"init_type {init_type!r}: choose one of {', '.join(_INITIALIZERS)}")
        for name, parameter in model.named_parameters():
            if "weight" in name and parameter.dim() >= 2:
                _INITIALIZERS[init_type](parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])


class AttentionVisualization:
    """Pictures of attention weights."""

    @staticmethod
    def plot_attention_heatmap(
        attention_weights: torch.Tensor,
        input_tokens: Sequence[str],
        output_tokens: Sequence[str],
        save_path: str | Path | None = None,
    ) -> None:
        """Draw weights ``[len(output_tokens), len(input_tokens)]`` as a heat map, with the numbers where they fit.

        save_path: the picture's file (format by its ending). It is shown only where matplotlib is interactive.
        """
        import matplotlib.pyplot as plt

        from generative_recommenders.run.report.pictures import draw_heat_map

        expected = (len(output_tokens), len(input_tokens))
        if tuple(attention_weights.shape) != expected:
            raise UserError(f"attention weights of shape {tuple(attention_weights.shape)}: the tokens need {expected}")
        weights = attention_weights.detach().float().cpu().numpy()
        figure, axes = plt.subplots(figsize=(10, 8))
        figure.colorbar(draw_heat_map(axes, weights, input_tokens, output_tokens), ax=axes)
        axes.tick_params(axis="x", rotation=45)
        axes.set(title="Attention Weights", xlabel="Input Tokens", ylabel="Output Tokens")
        if weights.size <= MAX_ANNOTATED_CELLS:
            middle = weights.max(initial=0.0) / 2
            for (row, column), value in np.ndenumerate(weights):
                color = "white" if value > middle else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        try:
            if save_path is not None:
                figure.savefig(save_path, dpi=300, bbox_inches="tight")
            if plt.isinteractive():
                plt.show()
        finally:  # a folder may be missing
            plt.close(figure)


def _set_trained(model: nn.Module, layer_names: Sequence[str], trained: bool) -> None:
    for part in layer_names:
        matching = [parameter for name, parameter in model.named_parameters() if part in name]
        for parameter in matching:
            parameter.requires_grad_(trained)
        if not matching:
            logging.warning("no parameter's name contains %r", part)
