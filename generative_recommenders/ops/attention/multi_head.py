"""Multi-head attention with its projections (arXiv 1706.03762, section 3.2.2) over the tokens of a layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.layout import Layout


def multi_head_attention(
    query: torch.Tensor,
    x: torch.Tensor,
    in_proj: torch.nn.Linear,
    out_proj: torch.nn.Linear,
    num_heads: int,
    layout: Layout,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """``Concat_h(softmax(q_h k_hᵀ / sqrt(d)) v_h) Wo + bo`` with q from ``query [T, D]``, k and v from ``x [T, D]``.

    in_proj: weights of q, k and v, ``[3 D, D]``. dropout_rate: on the probabilities.
    """
    if num_heads > 1 or not dispatch.fast_on_cpu_in_one_dtype(x):
        return multi_head_attention_reference(query, x, in_proj, out_proj, num_heads, layout, dropout_rate)
    # One head takes two products of [T, D] fewer, over [x, 1] itself as keys and values in one. (Wq a + bq)·(Wk x + bk)
    # is (Wkᵀ (Wq a + bq))·x and what is the same for all keys, which a softmax does not see; sum p (Wv x + bv) is
    # [Wv, bv] sum p [x, 1]. So the keys' weights go into those of queries, and the values' into the output's.
    dim = x.shape[1]
    spare = 1 + -(dim + 1) % 8  # one for the constant; products of full widths are faster
    (w_q, w_k, w_v), (b_q, _, b_v) = in_proj.weight.chunk(3), in_proj.bias.chunk(3)
    to_keys = F.pad(w_k * dim**-0.5, (0, spare)).T
    to_output = F.pad(out_proj.weight @ torch.cat([w_v, b_v[:, None]], dim=1), (0, spare - 1))
    inputs = F.pad(x, (0, spare), value=1.0)[:, None]
    q = F.linear(query, to_keys @ w_q, to_keys @ b_q)[:, None]
    attended = softmax_attention(q, inputs, inputs, layout, dropout_rate, scale=1.0)
    return F.linear(attended.flatten(1), to_output, out_proj.bias)


def multi_head_attention_reference(
    query: torch.Tensor,
    x: torch.Tensor,
    in_proj: torch.nn.Linear,
    out_proj: torch.nn.Linear,
    num_heads: int,
    layout: Layout,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """`multi_head_attention` as its equation, for any number of heads."""
    q, k, v = (project_heads(t, in_proj, num_heads, part) for part, t in enumerate((query, x, x)))
    return out_proj(softmax_attention(q, k, v, layout, dropout_rate).flatten(1))


def project_heads(x: torch.Tensor, in_proj: torch.nn.Linear, num_heads: int, part: int) -> torch.Tensor:
    """q (part 0), k (1) or v (2) of ``x [T, D]``, ``[T, H, D / H]``; apart, as nothing is put together later."""
    weight, bias = in_proj.weight.chunk(3)[part], in_proj.bias.chunk(3)[part]
    return F.linear(x, weight, bias).unflatten(-1, (num_heads, -1))


def last_token_attention(
    q: torch.Tensor, in_proj: torch.nn.Linear, inputs: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """``[R, D]``: `multi_head_attention` of one query a row before the output's projection, over the row's first tokens
    ``inputs [R, C, D]``. q: ``[R, H, d]``; lengths: ``[R]``, how many of the tokens.
    """
    (_, w_k, w_v), (_, _, b_v) = in_proj.weight.chunk(3), in_proj.bias.chunk(3)
    weights = weights_over_inputs(q, w_k, inputs, lengths)
    return values_over_inputs(weights, inputs, w_v).flatten(1) + b_v  # the weights sum to 1


def weights_over_inputs(
    q: torch.Tensor, w_k: torch.Tensor, inputs: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """``[R, H, C]``: softmax(q kᵀ / sqrt(d)) of one query a row, over the keys that ``w_k [H * d, D]`` would make of
    its first tokens ``inputs [R, C, D]``. q: ``[R, H, d]``; lengths: ``[R]``, how many of the tokens.

    q·(Wk x) is (Wkᵀ q)·x, and a bias of the keys is the same for all: one query a row needs no keys.
    """
    to_inputs = torch.einsum("rhd,hde->rhe", q * q.shape[2] ** -0.5, w_k.view(*q.shape[1:], -1))
    beyond = torch.arange(inputs.shape[1], device=inputs.device) >= lengths[:, None]
    return (to_inputs @ inputs.mT).masked_fill(beyond[:, None], -torch.inf).softmax(-1)


def values_over_inputs(weights: torch.Tensor, inputs: torch.Tensor, w_v: torch.Tensor) -> torch.Tensor:
    """``[R, H, dv]``: the ``weights [R, H, C]`` times the values that ``w_v [H * dv, D]`` would make of the tokens
    ``inputs [R, C, D]``."""
    return torch.einsum("rhe,hve->rhv", weights @ inputs, w_v.unflatten(0, (weights.shape[1], -1)))
