"""A SASRec training step as it is usually written, for a ratio in one run: whole rectangles,
`torch.nn.MultiheadAttention`, an embedding gathered for each negative of each position.

The model, loss and batches of `train_step.py --encoder=SASRec --negatives_sharing=position`, whatever it is asked to
train, on the CPU.
"""

from __future__ import annotations

import records  # noqa: F401  (the package's place)
import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.objectives.examples import TrainingExample


class PlainBlock(nn.Module):
    """Attention of normed queries over the inputs, then two 1x1 convolutions (arXiv 1808.09781)."""

    def __init__(self, width: int, hidden: int, heads: int, rate: float) -> None:
        super().__init__()
        self.query_norm, self.ffn_norm = (nn.LayerNorm(width, eps=1e-8, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, rate, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Conv1d(width, hidden, 1),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Conv1d(hidden, width, 1),
            nn.Dropout(rate),
        )

    def forward(self, x: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """x: ``[B, N, D]``; future: bool ``[N, N]``, True where a query must not see a key."""
        query = self.query_norm(x)
        attended, _ = self.attention(query, x, x, attn_mask=future, need_weights=False)
        y = self.ffn_norm(query + attended)
        return self.ffn(y.mT).mT + y


class PlainStep:
    """Trains a plain SASRec; calling it does one step on an example."""

    def __init__(self, settings: RunSettings, num_items: int) -> None:
        width, length = settings.items.item_embedding_dim, settings.data.max_sequence_length
        names = ("ffn_hidden_dim", "num_heads", "ffn_dropout_rate")
        sizes = [settings.value(f"sasrec_encoder.{name}") for name in names]
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            PlainBlock(width, *sizes) for _ in range(settings.value("sasrec_encoder.num_blocks"))
        )
        self.dropout = nn.Dropout(settings.value("train_fn.dropout_rate"))
        modules = nn.ModuleList([self.items, self.positions, self.blocks])
        self.optimizer = torch.optim.AdamW(modules.parameters(), settings.updates.learning_rate, (0.9, 0.98))
        self.num_items, self.num_negatives = num_items, settings.negatives.num_negatives
        self.temperature = settings.value("train_fn.temperature")
        self.future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def __call__(self, example: TrainingExample) -> float:
        """The loss."""
        self.optimizer.zero_grad()
        loss = self.loss(example.features.past_ids, example.features.past_lengths, example.targets)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def loss(self, ids: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """ids ``[B, N]``, lengths ``[B]``, targets ``[T]`` of all real positions, row by row."""
        length = ids.shape[1]
        real = torch.arange(length) < lengths[:, None]
        x = self.items(ids) * self.items.embedding_dim**0.5 + self.positions.weight[:length]
        x = self.dropout(x) * real[..., None]
        for block in self.blocks:
            x = block(x, self.future[:length, :length]) * real[..., None]
        states = F.normalize(x[real], dim=-1)
        negatives = torch.randint(1, self.num_items + 1, (len(targets), self.num_negatives))
        scored = F.normalize(self.items(torch.cat([targets[:, None], negatives], dim=1)), dim=-1)
        logits = (scored @ states[..., None])[..., 0] / self.temperature
        collisions = F.pad(negatives == targets[:, None], (1, 0))
        return -F.log_softmax(logits.masked_fill(collisions, -5e4), dim=1)[:, 0].mean()
