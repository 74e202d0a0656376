"""GRU4Rec (arXiv 1511.06939) as an encoder plug-in.

python main.py --plugin=examples/plugins/gru4rec.py --gin_bindings='train_fn.main_module = "GRU4Rec"'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Le, Lt

from generative_recommenders import register_encoder
from generative_recommenders.ops.layout import Layout


@register_encoder("GRU4Rec", gin_name="gru4rec_encoder")
class GRU4Rec(torch.nn.Module):
    """Gated recurrent units over each history, projected back to the items' width.

    takes_attention_mask: False, a recurrent encoder reads the past alone; masked objectives are refused.
    """

    causal = True
    takes_attention_mask = False

    def __init__(
        self,
        embedding_dim: int,
        num_layers: Annotated[int, Ge(1), Le(16)] = 1,
        hidden_dim: Annotated[int, Ge(1), Le(4096)] = 64,
        layer_dropout_rate: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0,
    ) -> None:
        super().__init__()
        self.output_dim = embedding_dim
        self.gru = torch.nn.GRU(embedding_dim, hidden_dim, num_layers, batch_first=True, dropout=layer_dropout_rate)
        self.output = torch.nn.Linear(hidden_dim, embedding_dim)

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events are not used."""
        states, _ = self.gru(layout.to_rectangle(x))
        return layout.mask(self.output(layout.flatten(states)))
