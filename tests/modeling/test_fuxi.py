"""FuXi-alpha against its equations one sequence at a time, its channels, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from generative_recommenders.modeling.encoders.fuxi import FuXi, FuxiBlock
from generative_recommenders.ops.layout import jagged_layout

SMALL = {"num_heads": 2, "dqk": 3, "dv": 5}
N = 9


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def block_by_hand(block: FuxiBlock, x: torch.Tensor, queries: list[int] | None, keys: list[int] | None) -> torch.Tensor:
    """One sequence ``x [n, D]``, position by position and head by head."""
    heads, dqk, dv, n = block.num_heads, SMALL["dqk"], SMALL["dv"], len(x)
    projected = F.silu(rms(x) @ block.uvqk)
    u, v, q, k = projected.split([3 * heads * dv, heads * dv, heads * dqk, heads * dqk], dim=1)
    out = torch.zeros(n, heads, 3, dv)
    for i in range(n):
        for j in range(i + 1):
            for h in range(heads):
                v_j, at = v[j, h * dv : (h + 1) * dv], slice(h * dqk, (h + 1) * dqk)
                out[i, h, 0] += block.channels.position[N - 1 + j - i] * v_j
                if queries is not None and keys is not None:
                    seconds = max(abs(queries[i] - keys[j]), 1)
                    out[i, h, 1] += block.channels.time[min(int(math.log(seconds) / 0.301), 128)] * v_j
                out[i, h, 2] += F.silu(q[i, at] @ k[j, at]) / N * v_j
    o = x + block.output(rms(out.flatten(1)) * u)
    if block.feed_forward is None:
        return o
    gate, up, down = block.feed_forward.WG.weight, block.feed_forward.W1.weight, block.feed_forward.W2.weight
    return o + (F.silu(rms(o) @ gate.T) * (rms(o) @ up.T)) @ down.T


def small_input(lengths: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator, count = torch.Generator().manual_seed(1), sum(lengths)
    times = torch.randint(1, 10**6, (count,), generator=generator)
    return torch.randn(count, 8, generator=generator), {"timestamps": times, "next_timestamps": times + 500}


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("options", [{}, {"ffn_single_stage": True}, {"ffn_multiply": 2.5}], ids=str)
@torch.no_grad()
def test_its_equations(options: dict, timed: bool) -> None:
    torch.manual_seed(0)
    lengths = [7, 1, 0, 4]
    encoder = FuXi(8, N, **SMALL, **options).eval()
    for block in encoder.blocks:
        block.channels.position.normal_()
        block.channels.time.normal_()
    x, events = small_input(lengths)
    events = events if timed else {}
    actual = encoder(x, jagged_layout(torch.tensor(lengths), N), events)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        queries, keys = (events[name][own].tolist() if timed else None for name in ("next_timestamps", "timestamps"))
        expected = x[own]
        for block in encoder.blocks:
            expected = block_by_hand(block, expected, queries, keys)
        torch.testing.assert_close(actual[own], expected, rtol=1e-4, atol=1e-5)
        start += length


@torch.no_grad()
def test_the_channel_of_time_can_be_left_out() -> None:
    encoder, layout = (
        FuXi(8, 6, **SMALL, enable_relative_time_bias=False),
        jagged_layout(torch.tensor([4]), 6),
    )
    x, events = small_input([4])
    assert torch.equal(encoder(x, layout, events), encoder(x, layout, {}))
