"""HSTU's relative bias: buckets of time, position alone, gradients, and the softmax over all columns against its
equation."""

from __future__ import annotations

import math

import torch

from generative_recommenders.ops.attention.relative_bias import (
    RelativeBias,
    bias_inputs,
    softmax_over_all_columns,
    time_buckets,
)
from generative_recommenders.ops.layout import jagged_layout


def test_time_buckets() -> None:
    seconds = [0, 1, 2, 60, 86_400, 31_536_000, 10**12]
    times = torch.tensor([seconds])
    buckets = time_buckets(torch.zeros_like(times), times)[0, 0].tolist()
    assert buckets == [min(int(math.log(max(s, 1)) / 0.301), 128) for s in seconds]
    assert time_buckets(times, torch.zeros_like(times))[0, :, 0].tolist() == buckets
    assert time_buckets(torch.full((1, 1), 2**62), torch.zeros(1, 1, dtype=torch.int64)).item() == 128


def test_without_times_the_bias_is_by_position() -> None:
    bias = RelativeBias(6)
    (inputs,) = bias_inputs(jagged_layout(torch.tensor([4]), 6), 6, whole=True)
    for i in range(4):
        for j in range(4):
            assert bias(inputs)[0, i, j] == bias.position[5 + j - i]
    bias(inputs).sum().backward()
    assert bias.position.grad.tolist() == [0, 0, 1, 2, 3, 4, 3, 2, 1, 0, 0]


def test_gradcheck_of_the_bias() -> None:
    bias = RelativeBias(4).double()
    layout = jagged_layout(torch.tensor([3, 2, 3]), 4)
    times = torch.randint(1, 10**6, (8,), generator=torch.Generator().manual_seed(1))
    inputs = bias_inputs(layout, 4, (times + 500, times))

    def total(position, time):
        tables = {"position": position, "time": time}
        return torch.cat([torch.func.functional_call(bias, tables, (x,)).flatten() for x in inputs])

    assert torch.autograd.gradcheck(total, (bias.position, bias.time))


def test_softmax_over_all_columns() -> None:
    """Padding counts in the normaliser, future columns too, and are then set to 0."""
    lengths, width, heads = [3, 0, 2], 4, 2
    layout, generator = jagged_layout(torch.tensor(lengths), width), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, d, generator=generator) for d in (3, 3, 2))
    bias = RelativeBias(width)
    inputs = bias_inputs(layout, width, whole=True)
    out = softmax_over_all_columns(q, k, v, layout, [bias(each) for each in inputs], width, 0.0)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        logits = torch.zeros(heads, length, width)
        places = torch.arange(length)
        by_position = bias.position[width - 1 + places[None, :] - places[:, None]]
        logits[..., :length] = torch.einsum("ihd,jhd->hij", q[own], k[own]) + by_position
        weights = (logits / 3**0.5).softmax(-1)[..., :length].tril()
        torch.testing.assert_close(out[own], torch.einsum("hij,jhd->ihd", weights, v[own]))
        start += length
