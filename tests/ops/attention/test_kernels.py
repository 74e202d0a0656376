"""The kernels of a GPU against the references, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from comparison import assert_same
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.fused import Weights, fused_attention
from generative_recommenders.ops.attention.reference import (
    pointwise_attention_reference,
    softmax_attention_reference,
)
from generative_recommenders.ops.attention.relative_bias import PairInputs, RelativeBias, bias_inputs, time_buckets
from generative_recommenders.ops.attention.tiles import PairBias, takes_kernel
from generative_recommenders.ops.layout import Layout, device_layout, jagged_layout, padded_layout
from generative_recommenders.ops.normalization import layer_norm_reference
from generative_recommenders.ops.normalization_kernels import FusedLayerNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = torch.tensor([40, 3, 0, 33], device=DEVICE)  # of one to three narrow blocks, one or two wide ones
LONGEST = 45
LAYOUTS = {
    "jagged": lambda: jagged_layout(LENGTHS, LONGEST),
    "padded": lambda: padded_layout(LENGTHS, LONGEST),
}
every_layout = pytest.mark.parametrize("layout", [make() for make in LAYOUTS.values()], ids=LAYOUTS)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def heads(layout: Layout, *widths: int) -> list[torch.Tensor]:
    """Slices of one projection ``[T, 2 * sum of widths]``, as models have them, two heads each."""
    torch.manual_seed(0)
    together = torch.randn(layout.num_tokens, 2 * sum(widths), device=DEVICE).requires_grad_()
    return [x.unflatten(1, (2, -1)) for x in together.split([2 * width for width in widths], 1)]


def same(ours: torch.Tensor, theirs: torch.Tensor, layout: Layout, leaves: list[torch.Tensor]) -> None:
    """At the tokens that count."""
    ours, theirs = layout.mask(ours), layout.mask(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same(ours, theirs, leaves, rtol=1e-4, atol=1e-5)


@every_layout
@pytest.mark.parametrize("width", [5, 40, 100, 200])
def test_softmax(layout: Layout, width: int) -> None:
    q, k, v = heads(layout, width, width, 7)
    theirs = softmax_attention_reference(q, k, v, layout, 0.0, 0.3)
    same(fused_attention(q, k, v, layout, Weights(True, logit_scale=0.3)), theirs, layout, [q, k, v])


@pytest.mark.parametrize("softmax", [True, False])
def test_a_row_of_three_wide_blocks(softmax: bool) -> None:
    layout = jagged_layout(torch.tensor([70, 3], device=DEVICE), LONGEST + 30)
    q, k, v = heads(layout, 40, 40, 7)
    theirs = (
        softmax_attention_reference(q, k, v, layout, 0.0, 0.3)
        if softmax
        else pointwise_attention_reference(q, k, v, layout, None, 11.0, 0.0)
    )
    weights = Weights(True, logit_scale=0.3) if softmax else Weights(False, divisor=11.0)
    same(fused_attention(q, k, v, layout, weights), theirs, layout, [q, k, v])


@every_layout
@pytest.mark.parametrize("timed", [True, False])
def test_pointwise_with_a_bias(layout: Layout, timed: bool) -> None:
    q, k, v = heads(layout, 5, 5, 7)
    bias = RelativeBias(LONGEST).to(DEVICE)
    times = torch.randint(10**6, (layout.num_tokens,), device=DEVICE).cumsum(0)
    inputs = bias_inputs(layout, LONGEST, (times + 900, times) if timed else None)
    if DEVICE.type == "cpu":  # where a GPU has all pairs at once
        cells = (layout.starts[:, None] + torch.arange(layout.longest)).clamp(max=layout.num_tokens - 1)
        buckets = time_buckets((times + 900)[cells], times[cells]).to(torch.uint8)
        pairs = PairBias(bias.position, bias.time, buckets) if timed else PairBias(bias.position, None, None)
        tiles = bias.tables(inputs)
    else:
        pairs, tiles = bias.tables(inputs), bias.cpu().tables(bias_inputs(layout, LONGEST, None))
    theirs = pointwise_attention_reference(q, k, v, layout, tiles, 11.0, 0.0)
    ours = fused_attention(q, k, v, layout, Weights(False, divisor=11.0), pairs)
    same(ours, theirs, layout, [q, k, v, bias.position, *([bias.time] if timed else [])])


@every_layout
@pytest.mark.parametrize("softmax", [True, False])
def test_dropout_is_that_of_the_backward_pass_too(layout: Layout, softmax: bool) -> None:
    """Attended values are linear in the values: their gradient holds the same weights, dropped alike."""
    q, k, v = heads(layout, 5, 5, 7)
    out = fused_attention(q, k, v, layout, Weights(softmax, dropout_rate=0.5))
    grad = layout.mask(torch.randn_like(out))
    (d_v,) = torch.autograd.grad(out, [v], grad)
    torch.testing.assert_close((layout.mask(v) * d_v).sum(), (out * grad).sum(), rtol=1e-4, atol=1e-4)
    whole = fused_attention(q, k, torch.ones_like(v), layout, Weights(True, dropout_rate=0.5))
    assert (
        abs(float(layout.mask(whole.detach()).sum() / LENGTHS.sum() / 14) - 1.0) < 0.1
    )  # inverted dropout keeps the mean


@pytest.mark.parametrize(
    ("width", "ampere", "taken"), [(128, False, True), (129, False, False), (256, True, True), (257, True, False)]
)
def test_heads_that_do_not_fit_into_shared_memory_take_no_kernel(width: int, ampere: bool, taken: bool) -> None:
    layout = jagged_layout(LENGTHS, LONGEST)
    with (
        mock.patch.object(dispatch, "takes_kernels", return_value=True),
        mock.patch.object(dispatch, "since_ampere", return_value=ampere),
    ):
        assert takes_kernel(layout, width) == taken
        assert isinstance(bias_inputs(layout, LONGEST, head_width=width), PairInputs) == taken


def test_no_tokens() -> None:
    layout = jagged_layout(torch.zeros(2, dtype=torch.int64, device=DEVICE), 4)
    q, k, v = heads(layout, 5, 5, 7)
    out = fused_attention(q, k, v, layout, Weights(False), PairBias(torch.zeros(7, requires_grad=True), None, None))
    out.sum().backward()
    assert out.shape == (0, 2, 7)


def test_a_layout_made_on_a_device_attends_alike() -> None:
    ours, theirs = device_layout(LENGTHS, LONGEST, int(LENGTHS.sum())), jagged_layout(LENGTHS, LONGEST)
    q, k, v = heads(theirs, 5, 5, 7)
    outputs = [fused_attention(q, k, v, each, Weights(True)) for each in (ours, theirs)]
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_more_rows_and_heads_than_one_axis_of_a_grid_holds() -> None:
    layout = jagged_layout(torch.ones(40_000, dtype=torch.int64, device=DEVICE), 1)
    q, k, v = heads(layout, 5, 5, 7)
    out = fused_attention(q, k, v, layout, Weights(True))
    assert torch.equal(out, v)  # a token attends to itself alone
    out.sum().backward()


@pytest.mark.parametrize("width", [1, 7, 50])
def test_layer_norm(width: int) -> None:
    torch.manual_seed(0)
    x = (10.0 * torch.randn(83, width, device=DEVICE) + 3.0).requires_grad_()
    ours, theirs = FusedLayerNorm.apply(x, 1e-6), layer_norm_reference(x, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(ours, theirs, [x], rtol=1e-3, atol=1e-4)
