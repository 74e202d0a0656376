"""Position-wise feed-forward networks. All of them act on the last axis: ``[T, D]`` and ``[B, N, D]``
alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.dropout import Dropout, KeepMasks, dropout
from generative_recommenders.ops.normalization import RMSNorm, column_sums

FLOAT32_EPS = torch.finfo(torch.float32).eps
"""The epsilon of the RMS norms here, whatever the dtype of the activations."""


def feed_forward(
    x: torch.Tensor,
    first: nn.Linear,
    second: nn.Linear,
    activation: Callable[[torch.Tensor], torch.Tensor],
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """``x + D(W2 D(act(W1 x + b1)) + b2)`` on ``[..., D]``, D being dropout."""
    if not dispatch.fast():
        return feed_forward_reference(x, first, second, activation, dropout_rate)
    written_out = activation is F.relu and dispatch.fast_on_cpu_in_one_dtype(x)
    if written_out and dropout_rate > 0.0:
        weights = first.weight, first.bias, second.weight, second.bias
        return _ReluFeedForward.apply(x.flatten(0, -2), *weights, dropout_rate).view(x.shape)
    hidden = dropout(activation(first(x)), dropout_rate, training=True)
    return dropout(second(hidden), dropout_rate, training=True, residual=x)


def feed_forward_reference(
    x: torch.Tensor,
    first: nn.Linear,
    second: nn.Linear,
    activation: Callable[[torch.Tensor], torch.Tensor],
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """`feed_forward` as its equation; with relu, under the masks that a CPU draws from the same seed."""
    hidden = activation(first(x))
    if dropout_rate == 0.0:
        return x + second(hidden)
    masks = KeepMasks(dropout_rate, x, elements=hidden.numel() + x.numel())  # one source for both
    hidden = hidden * masks.draw(hidden.shape) / (1.0 - dropout_rate)
    return x + second(hidden) * masks.draw(x.shape) / (1.0 - dropout_rate)


class _ReluFeedForward(torch.autograd.Function):
    """`feed_forward` with relu and dropout on ``[T, D]``, in place where nothing is lost.

    What the first dropout leaves of relu(a) is positive where both let a pass, so it is all that their backward needs.
    Both scales 1 / (1 - rate) are multiplied into the second weights.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, rate):
        ctx.scale = 1.0 / (1.0 - rate)
        ctx.masks = KeepMasks(rate, x, elements=len(x) * (len(weight1) + len(weight2)))
        hidden = F.linear(x, weight1, bias1).relu_()
        # The mask without its scale, which is in the weights: [T, H] is passed over once less.
        hidden.mul_(ctx.masks.draw(hidden.shape))
        scaled = weight2 * ctx.scale**2
        out = F.linear(hidden, scaled, bias2 * ctx.scale)
        bits = ctx.masks.bits(out.numel())
        ctx.save_for_backward(x, hidden, bits, weight1, scaled)
        return torch.addcmul(x, out, ctx.masks.kept(bits).view(out.shape), out=out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, hidden, bits, weight1, scaled = ctx.saved_tensors
        d_out = ctx.masks.kept(bits).view(grad.shape).mul_(grad)
        d_hidden = d_out @ scaled
        # hidden > 0 is where relu and dropout both let pass.
        torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0.0, grad_input=d_hidden)
        d_weights1 = d_hidden.T @ x, column_sums(d_hidden)
        d_weights2 = (d_out.T @ hidden).mul_(ctx.scale**2), column_sums(d_out).mul_(ctx.scale)
        return torch.mm(d_hidden, weight1, out=d_out).add_(grad), *d_weights1, *d_weights2, None


class SwiGLU(nn.Module):
    """W2 (silu(WG x) * W1 x), no residual (arXiv 2002.05202, eq. 6).

    embedding_dim: width D of input and output; hidden_dim: width of the gated layer, 2 D in DiffTransformer. bias: in
    all three layers. dropout_rate: on the gated layer.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, bias: bool = True, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.WG = nn.Linear(embedding_dim, hidden_dim, bias)
        self.W1 = nn.Linear(embedding_dim, hidden_dim, bias)
        self.W2 = nn.Linear(hidden_dim, embedding_dim, bias)
        self.dropout = Dropout(dropout_rate)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        x, drops = input_embeddings, self.training and self.dropout.rate > 0.0
        if drops or not dispatch.fast_on_cpu_in_one_dtype(x):
            return swiglu_reference(x, self.WG, self.W1, self.W2, self.dropout)
        weights = (each for layer in (self.WG, self.W1, self.W2) for each in (layer.weight, layer.bias))
        return _SwiGlu.apply(x.flatten(0, -2), *weights).view(x.shape)


def swiglu_reference(
    x: torch.Tensor, gate: nn.Module, first: nn.Module, second: nn.Module, drop: nn.Module
) -> torch.Tensor:
    """`SwiGLU` as its equation, with dropout on the gated layer."""
    return second(drop(F.silu(gate(x)) * first(x)))


class _SwiGlu(torch.autograd.Function):
    """``W2 h + b2`` on ``[T, D]``, with h = silu(g) a, g = WG x + bG, a = W1 x + b1; biases may be None."""

    @staticmethod
    def forward(ctx, x, gate, gate_bias, first, first_bias, second, second_bias):
        g, a = F.linear(x, gate, gate_bias), F.linear(x, first, first_bias)
        s = F.silu(g)
        h = s * a
        ctx.save_for_backward(x, g, a, s, h, gate, first, second)
        ctx.biased = gate_bias is not None, first_bias is not None, second_bias is not None
        return F.linear(h, second, second_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, g, a, s, h, gate, first, second = ctx.saved_tensors
        d_h = grad @ second
        d_a = d_h * s
        d_g = torch.ops.aten.silu_backward(d_h.mul_(a), g)
        d_weights = []
        for d, inputs, biased in zip((d_g, d_a, grad), (x, x, h), ctx.biased):
            d_weights += [d.T @ inputs, column_sums(d) if biased else None]
        return (d_a @ first).addmm_(d_g, gate), *d_weights


class SwiGLUEncoder(nn.Module):
    """Two residual SwiGLU layers, each followed by an RMS norm: y = RMS(S1(x) + x), out = RMS(S2(y) + y)."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.sw1 = SwiGLU(embedding_dim, hidden_dim)
        self.norm1 = RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.sw2 = SwiGLU(embedding_dim, hidden_dim)
        self.norm2 = RMSNorm(embedding_dim, eps=FLOAT32_EPS)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.norm1(self.sw1(input_embeddings) + input_embeddings)
        return self.norm2(self.sw2(hidden) + hidden)
