"""Attention by tables against dense matrices and its reference, with gradients; what an accelerator computes gives the
same."""

from __future__ import annotations

import contextlib

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention import groups as groups_module
from generative_recommenders.ops.attention.relative_bias import RelativeBias, bias_inputs, time_buckets
from generative_recommenders.ops.attention.tables import table_attention
from generative_recommenders.ops.attention.tiles import PairBias
from generative_recommenders.ops.layout import AttentionMask, Layout, jagged_layout, padded_layout

LENGTHS = torch.tensor([3, 0, 9, 1, 9, 6, 2])
REACH = 12


def bidirectional(layout: Layout) -> Layout:
    zeros = torch.zeros_like(layout.positions)
    return layout.with_attention_mask(AttentionMask(zeros, zeros))


LAYOUTS = {
    "jagged": lambda: jagged_layout(LENGTHS, 10),
    "padded": lambda: padded_layout(LENGTHS, 10),
    "both sides": lambda: bidirectional(jagged_layout(LENGTHS, 10)),
    "both sides, padded": lambda: bidirectional(padded_layout(LENGTHS, 10)),
}


def values_and_times(layout: Layout) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(layout.num_tokens, 2, 3, generator=generator, dtype=torch.float64)
    keys = torch.randint(1, 10**6, (layout.num_tokens,), generator=generator)
    return layout.mask(v).requires_grad_(), (keys + 500, keys)


def dense(v: torch.Tensor, layout: Layout, bias: RelativeBias, times) -> list[torch.Tensor]:
    """One dense matrix over all tokens."""
    place, row = layout.positions, layout.row_of
    sees = row[:, None] == row
    if layout.attention_mask is None:
        sees = sees & (place <= place[:, None])
    if layout.valid is not None:
        sees = sees & layout.valid.T
    by_place = bias.position[REACH - 1 + place - place[:, None]]
    by_time = bias.time[time_buckets(times[0][None], times[1][None])[0]]
    return [torch.einsum("ij,jhd->ihd", weights * sees, v) for weights in (by_place, by_time)]


def joined(outputs: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    return torch.stack([layout.mask(each) for each in outputs])


@pytest.mark.parametrize("step_cost", [4, 40_000])
@pytest.mark.parametrize("way", ["fast", "reference"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_dense(monkeypatch: pytest.MonkeyPatch, name: str, way: str, step_cost: int) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", step_cost)
    layout, bias = LAYOUTS[name](), RelativeBias(REACH).double()
    v, times = values_and_times(layout)
    with dispatch.references() if way == "reference" else contextlib.nullcontext():
        actual = table_attention(v, layout, bias.tables(bias_inputs(layout, REACH, times)))
    expected = dense(v, layout, bias, times)
    assert_same(joined(actual, layout), joined(expected, layout), [v, bias.position, bias.time])


@pytest.mark.parametrize("name", ["jagged", "padded"])
def test_as_an_accelerator_computes_it(name: str) -> None:
    layout, bias = LAYOUTS[name](), RelativeBias(REACH).double()
    v, times = values_and_times(layout)
    buckets = time_buckets(*(layout.to_rectangle(each)[:, : layout.longest] for each in times))
    actual = table_attention(v, layout, PairBias(bias.position, bias.time, buckets.to(torch.uint8)))
    expected = dense(v, layout, bias, times)
    assert_same(joined(actual, layout), joined(expected, layout), [v, bias.position, bias.time])
    (by_place,) = table_attention(v, layout, PairBias(bias.position, None, None))
    torch.testing.assert_close(by_place, actual[0])


def test_without_times_and_without_tokens() -> None:
    bias = RelativeBias(REACH)
    for lengths in ([2, 3], [0, 0]):
        layout = jagged_layout(torch.tensor(lengths), 4)
        v = torch.randn(layout.num_tokens, 2, 3, requires_grad=True)
        by_place, *_ = table_attention(v, layout, bias.tables(bias_inputs(layout, REACH)))
        assert by_place.shape == v.shape
        by_place.sum().backward()
    assert bias.position.grad is not None and bias.position.grad.abs().sum() > 0
