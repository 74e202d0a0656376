"""Products with rows that are L2-normalised on the way."""

from __future__ import annotations

import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.normalization import l2_normalize_reference


def normalized_products(queries: torch.Tensor, items: torch.Tensor, eps: float) -> torch.Tensor:
    """``[B, R, N]`` products of queries ``[B, N, D]`` with items ``[B, R, D]`` over their norms, which are eps at
    least."""
    if dispatch.fast_on_cpu_in_one_dtype(items):
        return _NormalizedProducts.apply(queries, items, eps)
    return normalized_products_reference(queries, items, eps)


def normalized_products_reference(queries: torch.Tensor, items: torch.Tensor, eps: float) -> torch.Tensor:
    """`normalized_products` as its equation."""
    return l2_normalize_reference(items, eps) @ queries.mT


class _NormalizedProducts(torch.autograd.Function):
    """With l = <q, x> / |x|: ``dx = (sum_n dl_n q_n - x sum_n dl_n l_n / |x|) / |x|``. Neither normalised items nor
    their gradient are written, which are many times wider than the products."""

    @staticmethod
    def forward(ctx, queries, items, eps):
        norm = torch.linalg.vector_norm(items, dim=-1, keepdim=True)
        divisor = norm.clamp_min(eps)
        products = (items @ queries.mT).div_(divisor)
        ctx.save_for_backward(queries, items, divisor, norm >= eps, products)
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        queries, items, divisor, normalized, products = ctx.saved_tensors
        along = (grad * products).sum(-1, keepdim=True).div_(divisor.square()).mul_(normalized)
        scaled = grad / divisor
        return scaled.mT @ items, (scaled @ queries).addcmul_(items, along, value=-1.0), None
