"""SASRec (arXiv 1808.09781), in the form of HSTU's public runs and, by options, of RePlay's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from generative_recommenders.config.registry import register_encoder
from generative_recommenders.modeling.cache import Appended, KeysValues, softmax_over_cache
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention import softmax_attention
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import feed_forward
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.normalization import LayerNorm

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def check_heads(width: int, num_heads: int) -> int:
    """Width of a head, or ValueError where the heads do not divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide the width {width}: choose one of its divisors"
        )
    return width // num_heads


def check_positive(**sizes: int) -> None:
    """ValueError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size} must be 1 or more")


class SasrecBlock(torch.nn.Module):
    """``Q = LN(x)``, ``y = LN(Q + MHA(Q, x, x))``, ``x = W2 act(W1 y + b1) + b2 + y``; LN eps 1e-8.

    The residual of the attention is the normalised query. norm_weights: layer norms carry weights and biases.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        ffn_hidden_dim: int,
        activation: str = "relu",
        dropout_rate: float = 0.0,
        norm_weights: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.num_heads = num_heads
        self.dropout_rate = Dropout(dropout_rate).rate
        self.activation = ACTIVATIONS[activation]
        norm = partial(torch.nn.LayerNorm, embedding_dim) if norm_weights else LayerNorm
        self.query_norm = norm(eps=1e-8)
        self.in_proj = torch.nn.Linear(embedding_dim, 3 * embedding_dim)
        self.out_proj = torch.nn.Linear(embedding_dim, embedding_dim)
        self.ffn_norm = norm(eps=1e-8)
        self.ffn_in = torch.nn.Linear(embedding_dim, ffn_hidden_dim)
        self.ffn_out = torch.nn.Linear(ffn_hidden_dim, embedding_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier normal for matrices, as in the published runs; attention biases 0."""
        for linear in (self.in_proj, self.out_proj, self.ffn_in, self.ffn_out):
            torch.nn.init.xavier_normal_(linear.weight)
        torch.nn.init.zeros_(self.in_proj.bias)
        torch.nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x: ``[T, D]``; returns the same shape."""
        rate = self.dropout_rate if self.training else 0.0
        if self.num_heads == 1 and dispatch.fast_on_cpu_in_one_dtype(x):
            query = self.query_norm(x)
            return layout.mask(self.transform(query + self.attend_inputs(query, x, layout, rate)))
        query, q, k, v = self.project(x)
        return layout.mask(self.combine(query, softmax_attention(q, k, v, layout, rate)))

    def attend_inputs(
        self, query: torch.Tensor, x: torch.Tensor, layout: Layout, rate: float
    ) -> torch.Tensor:
        """The attention of one head with two products fewer: over ``[x, 1]`` itself, keys and values in one.

        ``(Wq a + bq)·(Wk x + bk)`` is ``(Wkᵀ (Wq a + bq))·x`` and what is the same for all keys; and ``sum p (Wv x + bv)`` is
        ``[Wv, bv] sum p [x, 1]``. So keys' weights go into those of queries, and values' into the output's.
        """
        dim = x.shape[1]
        spare = 1 + -(dim + 1) % 8  # one for the constant; products of full widths are faster
        (w_q, w_k, w_v), (b_q, _, b_v) = self.in_proj.weight.split(dim), self.in_proj.bias.split(dim)
        to_keys = F.pad(w_k * dim**-0.5, (0, spare)).T
        to_output = F.pad(self.out_proj.weight @ torch.cat([w_v, b_v[:, None]], dim=1), (0, spare - 1))
        inputs = F.pad(x, (0, spare), value=1.0)[:, None]
        q = F.linear(query, to_keys @ w_q, to_keys @ b_q)[:, None]
        attended = softmax_attention(q, inputs, inputs, layout, rate, scale=1.0)
        return F.linear(attended.flatten(1), to_output, self.out_proj.bias)

    def append(
        self, x: torch.Tensor, appended: Appended, cached: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        """`forward` of the tokens ``x [T, D]`` alone, behind the cached ones."""
        query, q, k, v = self.project(x)
        block = appended.extend_block(cached, k, v)
        return self.combine(query, softmax_over_cache(q, block, appended)), block

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalised query ``[T, D]``; q, k, v ``[T, H, D / H]``."""
        dim, query = x.shape[-1], self.query_norm(x)
        weight, bias = self.in_proj.weight, self.in_proj.bias
        projections = zip(
            (query, x, x), weight.split(dim), bias.split(dim)
        )  # apart: nothing is put together later
        return query, *(F.linear(t, w, b).unflatten(-1, (self.num_heads, -1)) for t, w, b in projections)

    def combine(self, query: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """query: ``[T, D]``; attended: ``[T, H, D / H]``."""
        return self.transform(query + self.out_proj(attended.flatten(1)))

    def transform(self, attended: torch.Tensor) -> torch.Tensor:
        """Norm and feed-forward ``[T, D]``."""
        y = self.ffn_norm(attended)
        rate = self.dropout_rate if self.training else 0.0
        return feed_forward(y, self.ffn_in, self.ffn_out, self.activation, rate)


@register_encoder("SASRec", gin_name="sasrec_encoder")
class SASRec(torch.nn.Module):
    """A stack of `SasrecBlock`. final_norm: layer norm with weights behind the last block (RePlay's body)."""

    causal = True

    def __init__(
        self,
        embedding_dim: int,
        num_blocks: int = 2,
        num_heads: int = 1,
        ffn_hidden_dim: int = 64,
        ffn_activation_fn: str = "relu",
        ffn_dropout_rate: float = 0.2,
        norm_weights: bool = False,
        final_norm: bool = False,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_positive(num_blocks=num_blocks, ffn_hidden_dim=ffn_hidden_dim)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.blocks = torch.nn.ModuleList(
            SasrecBlock(
                embedding_dim, num_heads, ffn_hidden_dim, ffn_activation_fn, ffn_dropout_rate, norm_weights
            )
            for _ in range(num_blocks)
        )
        self.final_norm = torch.nn.LayerNorm(embedding_dim) if final_norm else torch.nn.Identity()

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events are not used."""
        for block in self.blocks:
            x = run_block(block, self.activation_checkpoint and self.training, x, layout)
        return layout.mask(self.final_norm(x))

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        """No state depends on what comes after it."""
        return False

    def encode_appended(
        self,
        x: torch.Tensor,
        events: Mapping[str, torch.Tensor],
        appended: Appended,
        cached: Sequence[KeysValues],
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """See `incremental.IncrementalEncoder`."""
        blocks = []
        for block, before in zip(cast(Iterable[SasrecBlock], self.blocks), cached or repeat(None)):
            x, after = block.append(x, appended, before)
            blocks.append(after)
        return self.final_norm(x), tuple(blocks)


def run_block(block: torch.nn.Module, checkpoint: bool, *inputs):
    """The block's output; with checkpoint, its activations are computed again in the backward pass."""
    if not checkpoint:
        return block(*inputs)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
