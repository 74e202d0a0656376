"""Exact search by dot product for one query at a time, which reads the items as 8-bit integers.

A single query waits for memory, where a float32 item is 4 D bytes. Let s be the scale of an item, t that of the query,
x = s x' + r and q = t q' + p, with integers x' and q'. Then

    q . x = s t (q' . x') + (q . r + p . s x'),    |q . r + p . s x'| <= s (|q| max |r / s| + |p| max |x'|)

and the integers alone, D bytes, say what an item can reach and what it reaches at least. The few items that can reach
the k-th largest of the latter are scored in full.
"""

from __future__ import annotations

import math

import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.integer_products import integer_products
from generative_recommenders.retrieval.selection import largest

FEW_QUERIES = 4
"""Queries up to which one at a time is faster than float products of all."""
MANY_ITEMS = 1 << 17
"""Items from which a second copy of them is worth its memory."""
LANE = 64
"""Items that share a scale, and are looked into only where the best of them can be among the k."""
MOST_CANDIDATES = 1 / 32
"""Share of the lanes beyond which looking into them costs more than float products."""
BUILD_LANES = 1 << 10
ROUNDING = 4e-6
"""Of the float32 operations that make a bound, relative to the largest possible product."""


def is_faster(queries: torch.Tensor, num_items: int) -> bool:
    """Whether queries ``[n, D]`` are searched faster by `QuantizedItems`."""
    few = len(queries) <= FEW_QUERIES and num_items >= MANY_ITEMS
    return few and queries.dtype == torch.float32 and dispatch.multiplies_integers(queries)


class QuantizedItems:
    """Items ``[V, D]`` float32 with a copy in 8 bits, D bytes an item beside their own 4 D."""

    @torch.no_grad()
    def __init__(self, items: torch.Tensor) -> None:
        self.items = items
        lanes, dim = -(-len(items) // LANE), items.shape[1]
        self.integers = torch.zeros(lanes * LANE, dim, dtype=torch.int8)
        self.scales = torch.zeros(lanes)
        self.error, self.norm = torch.zeros(()), torch.zeros(())
        for start in range(0, lanes, BUILD_LANES):
            rows = items[start * LANE : (start + BUILD_LANES) * LANE]
            missing = -len(rows) % LANE
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing)).view(-1, LANE, dim)
            scales = (rows.abs().amax((1, 2)) / 127).clamp(min=1e-30)
            scaled = rows / scales[:, None, None]
            rounded = scaled.round()
            self.scales[start : start + len(scales)] = scales
            places = slice(start * LANE, (start + len(scales)) * LANE)
            self.integers[places] = rounded.nan_to_num(0).to(torch.int8).view(-1, dim)
            # maximum keeps a NaN: items with one are never searched by bounds
            self.error = torch.maximum(self.error, (scaled - rounded).norm(dim=2).amax())
            self.norm = torch.maximum(self.norm, rounded.norm(dim=2).amax())

    @torch.no_grad()
    def search(
        self, queries: torch.Tensor, k: int, seen_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scores and ids ``[n, k]`` of the k largest products with ``queries [n, D]``, best first, ties by the smaller
        id.

        seen_ids: ``[n, S]`` int64 padded with 0, left out of a row. Scores are products in double precision, rounded.
        None where bounds do not single out few items (many are alike, or fewer than k are left), or a number is not
        finite.
        """
        values, ids = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
        for row, query in enumerate(queries):
            candidates = self._candidates(query, k, None if seen_ids is None else seen_ids[row])
            if candidates is None:
                return None
            scores = (self.items[candidates].double() @ query.double()).float()
            values[row : row + 1], columns = largest(scores[None], k)
            ids[row] = candidates[columns[0]] + 1
        return values, ids

    def _candidates(self, query: torch.Tensor, k: int, seen_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Rows of `items`, in order, among which the k best of one query are; None as for `search`."""
        count, step = len(self.items), float(query.abs().max()) / 127
        if not 0 < step < math.inf or not 0 < k <= len(self.scales):
            return None
        integers = (query / step).round()
        rest = float((query - step * integers).norm()) + ROUNDING * step * float(integers.norm())
        slack = float(query.norm() * self.error + rest * self.norm)
        products = integer_products(self.integers, integers.to(torch.int8))
        none = torch.iinfo(torch.int32).min
        products[count:] = none
        if seen_ids is not None:
            products[seen_ids[(seen_ids > 0) & (seen_ids <= count)] - 1] = none
        lanes = products.view(-1, LANE)
        most = (lanes.amax(1) * step + slack) * self.scales
        best = most.topk(k).indices
        # k items reach this, so the k-th best does: what cannot is not among them
        least = ((lanes[best] * step - slack) * self.scales[best, None]).flatten().topk(k).values[-1]
        some = (most >= least).nonzero()[:, 0]
        if not math.isfinite(least) or len(some) > MOST_CANDIDATES * len(lanes):
            return None
        reaches = (lanes[some] * step + slack) * self.scales[some, None] >= least
        lane, place = (reaches & (lanes[some] > none)).nonzero(as_tuple=True)
        return some[lane] * LANE + place if len(lane) >= k else None
