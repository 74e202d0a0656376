"""Grouped attention against dense matrices: values, gradients, tiles, attention mask, groups, dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from comparison import assert_same, fast_and_reference
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention import groups as groups_module
from generative_recommenders.ops.attention.observed import observed_weights
from generative_recommenders.ops.attention.pointwise import pointwise_attention
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.attention.tiles import TableBias, group_mask, tiles
from generative_recommenders.ops.layout import AttentionMask, Layout, jagged_layout, padded_layout
from memory import LargestTensor

DIVISOR = 11.0
LENGTHS = [3, 0, 9, 1, 9, 6, 2]
Attend = Callable[..., torch.Tensor]


def dense_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(~sees, -torch.inf).softmax(-1), v)


def dense_pointwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hij,jhd->ihd", F.silu(torch.einsum("ihd,jhd->hij", q, k)) * sees / DIVISOR, v)


def grouped_pointwise(q, k, v, layout, dropout_rate=0.0):
    return pointwise_attention(q, k, v, layout, None, DIVISOR, dropout_rate)


FORMS = [(softmax_attention, dense_softmax), (grouped_pointwise, dense_pointwise)]
both_forms = pytest.mark.parametrize(("attend", "dense"), FORMS, ids=["softmax", "pointwise"])


def tokens(count: int, heads: int = 2, d: int = 3, dv: int = 5, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shapes = ((count, heads, d), (count, heads, d), (count, heads, dv))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def reference(dense: Attend, layout: Layout, q, k, v) -> torch.Tensor:
    """One dense matrix a sequence, by the layout's attention mask or causal."""
    outputs = []
    for start, stop in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist()):
        if layout.attention_mask is None:
            sees = torch.ones(stop - start, stop - start).tril().bool()
        else:
            key, query = layout.attention_mask.key[start:stop], layout.attention_mask.query[start:stop]
            sees = key[None, :] <= query[:, None]
        outputs.append(dense(q[start:stop], k[start:stop], v[start:stop], sees))
    return torch.cat(outputs)


def assert_dense(attend: Attend, dense: Attend, layout: Layout, heads: int = 2) -> None:
    inputs = tokens(layout.num_tokens, heads)
    assert_same(attend(*inputs, layout), reference(dense, layout, *inputs), inputs, atol=1e-10, rtol=0)


@both_forms
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("step_cost", [0, 4, 40_000])
def test_causal(monkeypatch, attend: Attend, dense: Attend, heads: int, step_cost: int) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", step_cost)
    assert_dense(attend, dense, jagged_layout(torch.tensor(LENGTHS), 9), heads)


@both_forms
@pytest.mark.parametrize("extra", [0, 3, 4])
def test_slices_of_one_projection(attend: Attend, dense: Attend, extra: int) -> None:
    """Rows of the projection that are a whole number of heads wide are gathered in place, others copied first."""
    layout, heads, d = jagged_layout(torch.tensor(LENGTHS), 9), 2, 3
    projection = torch.randn(layout.num_tokens, 3 * heads * d + extra, dtype=torch.float64)
    projection.requires_grad_()
    q, k, v = (part.unflatten(1, (heads, d)) for part in projection[:, extra:].split(heads * d, dim=1))
    assert_same(attend(q, k, v, layout), reference(dense, layout, q, k, v), [projection], atol=1e-10, rtol=0)


def bidirectional(layout: Layout) -> AttentionMask:
    return AttentionMask(torch.zeros_like(layout.positions), torch.zeros_like(layout.positions))


def permuted(layout: Layout) -> AttentionMask:
    """Some see all visible ones, others come in a random order, never seeing themselves."""
    hidden = torch.arange(layout.num_tokens) % 3 == 1
    rank = torch.rand(layout.num_tokens, generator=torch.Generator().manual_seed(0)).argsort()
    return AttentionMask((rank + 1).where(hidden, 0), rank.where(hidden, 0))


@both_forms
@pytest.mark.parametrize("see", [bidirectional, permuted])
@pytest.mark.parametrize("cells", [1, 400_000])
def test_attention_mask(monkeypatch, attend: Attend, dense: Attend, see, cells: int) -> None:
    monkeypatch.setattr(groups_module, "GROUP_CELLS", cells)
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    assert_dense(attend, dense, layout.with_attention_mask(see(layout)))


@both_forms
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("see", [None, bidirectional, permuted])
def test_equals_its_reference_with_gradients_under_one_mask(
    monkeypatch, attend: Attend, dense: Attend, see, rate: float
) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", 4)
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    layout = layout if see is None else layout.with_attention_mask(see(layout))
    inputs = tokens(layout.num_tokens)
    assert_same(*fast_and_reference(lambda: attend(*inputs, layout, rate)), inputs)


@pytest.mark.parametrize("see", [None, bidirectional])
@both_forms
def test_references_are_as_wide_as_the_longest_row(attend: Attend, dense: Attend, see) -> None:
    layout = jagged_layout(torch.tensor([8, 3]), 1024)
    layout = layout if see is None else layout.with_attention_mask(see(layout))
    inputs = [x.detach().float() for x in tokens(layout.num_tokens)]
    with dispatch.references(), LargestTensor() as largest, observed_weights() as weights:
        attend(*inputs, layout, 0.4)
    assert largest.numel < 1024
    assert weights[0].weights.untyped_storage().nbytes() == 4 * 2 * 8 * 8  # of the first row alone


def random_bias(layout: Layout) -> TableBias:
    """One table that all rows look up alike, and one of their own."""
    each = [tile for group in layout.groups for tile in tiles(group, layout)]
    shared = [torch.randint(3, (tile.stop - tile.start, tile.keys)) for tile in each]
    own = [torch.randint(5, (tile.rows, tile.stop - tile.start, tile.keys)) for tile in each]
    tables = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (3, 5))
    return TableBias(tables, list(zip(shared, own)))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_bias_in_the_reference(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", 4)
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    inputs, bias = tokens(layout.num_tokens), random_bias(layout)
    outputs = fast_and_reference(lambda: pointwise_attention(*inputs, layout, bias, DIVISOR, rate))
    assert_same(*outputs, [*inputs, *bias.tables])


@both_forms
def test_gradcheck(attend: Attend, dense: Attend) -> None:
    layout = jagged_layout(torch.tensor([2, 0, 3]), 3)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, layout), tokens(5, 2, 2, 2))


@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck_of_the_bias(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", 1)
    layout = jagged_layout(torch.tensor([2, 4]), 4)
    assert {tile.rows for group in layout.groups for tile in tiles(group, layout)} == {1, 2}
    bias = random_bias(layout)

    def attend(q, k, v, *tables):
        return pointwise_attention(q, k, v, layout, TableBias(tables, bias.indices), DIVISOR)

    assert torch.autograd.gradcheck(attend, (*tokens(6, heads, 2, 2), *bias.tables))


@both_forms
def test_padded_layout_gives_the_same_on_real_tokens(attend: Attend, dense: Attend) -> None:
    lengths = torch.tensor(LENGTHS)
    jagged, padded = jagged_layout(lengths, 10), padded_layout(lengths, 10)
    inputs = tokens(jagged.num_tokens)
    rectangles = [jagged.to_rectangle(x).detach().flatten(0, 1).requires_grad_() for x in inputs]
    outputs = [attend(*inputs, jagged), padded.mask(attend(*rectangles, padded))]
    torch.testing.assert_close(jagged.to_rectangle(outputs[0]).flatten(0, 1), outputs[1])
    for output in outputs:
        (output**2).sum().backward()
    for one, other in zip(inputs, rectangles):
        torch.testing.assert_close(jagged.to_rectangle(one.grad).flatten(0, 1), other.grad)


@both_forms
def test_padded_values_reach_no_real_token(attend: Attend, dense: Attend) -> None:
    layout = padded_layout(torch.tensor([2, 4]), 4)
    inputs = [x.detach() for x in tokens(8)]
    changed = [torch.where(layout.valid[:, :, None], x, torch.full_like(x, 1e3)) for x in inputs]
    assert torch.equal(layout.mask(attend(*inputs, layout)), layout.mask(attend(*changed, layout)))


@both_forms
def test_order_of_rows_and_size_of_groups_change_nothing(monkeypatch, attend: Attend, dense: Attend) -> None:
    lengths = torch.tensor(LENGTHS)
    layout = jagged_layout(lengths, 9)
    inputs = [x.detach() for x in tokens(layout.num_tokens)]
    rectangle = layout.to_rectangle(attend(*inputs, layout))
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    for cells, min_rows in ((1, 1), (100, 2), (10**6, 4)):
        monkeypatch.setattr(groups_module, "GROUP_CELLS", cells)
        monkeypatch.setattr(groups_module, "MIN_ROWS", min_rows)
        shuffled = jagged_layout(lengths[order], 9)
        moved = [shuffled.flatten(layout.to_rectangle(x)[order]) for x in inputs]
        torch.testing.assert_close(shuffled.to_rectangle(attend(*moved, shuffled)), rectangle[order])


@both_forms
def test_nothing_to_attend_to(attend: Attend, dense: Attend) -> None:
    for lengths in ([], [0, 0]):
        layout = jagged_layout(torch.tensor(lengths, dtype=torch.int64), 3)
        inputs = tokens(0)
        out = attend(*inputs, layout)
        assert out.shape == (0, 2, 5)
        out.sum().backward()
        assert inputs[0].grad.shape == (0, 2, 3)


@pytest.mark.parametrize("lengths", [[3], [3, 5, 1]])
def test_token_that_sees_nothing_gets_0(lengths: list[int]) -> None:
    layout = jagged_layout(torch.tensor(lengths), 5)
    blind = layout.with_attention_mask(AttentionMask(layout.positions + 1, layout.positions))
    inputs = tokens(layout.num_tokens)
    out = softmax_attention(*inputs, blind)
    first = layout.positions == 0
    assert (out[first] == 0).all()
    assert (out[~first] != 0).all()
    out[first].sum().backward()
    assert all((x.grad == 0).all() for x in inputs)


@both_forms
def test_bfloat16(attend: Attend, dense: Attend) -> None:
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    inputs = tokens(layout.num_tokens)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    out = attend(*rounded, layout)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), attend(*inputs, layout), atol=0.1, rtol=0.1)
    out.sum().backward()
    attend(*inputs, layout).sum().backward()
    for one, other in zip(rounded, inputs):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.double(), other.grad, atol=0.15, rtol=0.1)


@both_forms
def test_autocast(attend: Attend, dense: Attend) -> None:
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    inputs = tokens(layout.num_tokens, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, layout)
    assert torch.equal(out, attend(*inputs, layout))
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs)


@both_forms
def test_dropout_is_unbiased_and_its_gradient_uses_the_same_mask(attend: Attend, dense: Attend) -> None:
    layout = jagged_layout(torch.tensor([6, 4]), 6)
    q, k, v = tokens(10)
    plain = attend(q, k, v, layout).detach()
    torch.manual_seed(0)
    draws = torch.stack([attend(q, k, v, layout, dropout_rate=0.3).detach() for _ in range(500)])
    assert (draws.std(0) > 0).any()
    error = (draws.mean(0) - plain).abs()
    assert (error <= 5 * draws.std(0) / 500**0.5 + 1e-9).all()
    torch.manual_seed(1)
    out = attend(q, k, v, layout, dropout_rate=0.3)
    (d_v,) = torch.autograd.grad(out.sum(), v)  # out is linear in v, so <d_v, v> gives it back
    assert (d_v * v).sum().item() == pytest.approx(out.sum().item())


@both_forms
def test_gradcheck_with_dropout(monkeypatch, attend: Attend, dense: Attend) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", 1)
    layout = jagged_layout(torch.tensor([2, 3]), 3)

    def seeded(q, k, v):
        torch.manual_seed(7)
        return attend(q, k, v, layout, dropout_rate=0.4)

    assert torch.autograd.gradcheck(seeded, tokens(5, 2, 2, 2))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_keys_that_are_the_values(monkeypatch, rate: float) -> None:
    monkeypatch.setattr(groups_module, "STEP_COST", 1)
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    q, k, _ = tokens(layout.num_tokens, 2, 3, 3)
    outputs = []
    for values in (k, k.clone()):
        torch.manual_seed(7)
        outputs.append(softmax_attention(q, k, values, layout, rate))
    assert_same(*outputs, [q, k])


def test_scale() -> None:
    layout = jagged_layout(torch.tensor([4, 2]), 4)
    q, k, v = tokens(6)
    scaled = softmax_attention(q, k, v, layout, scale=0.2)
    torch.testing.assert_close(scaled, softmax_attention(q * 0.2 * 3**0.5, k, v, layout))


def test_visible_hides_cells_past_a_rows_end() -> None:
    layout = padded_layout(torch.tensor([1, 3]), 3)
    layout = layout.with_attention_mask(AttentionMask(*(torch.zeros_like(layout.positions) for _ in range(2))))
    assert layout.attention_mask is not None
    sees = group_mask(layout.groups[0], layout.attention_mask)
    assert sees[:, 0, 0].tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.gpu
@both_forms
def test_gpu_gives_the_same(attend: Attend, dense: Attend) -> None:
    layout = jagged_layout(torch.tensor(LENGTHS), 9)
    for each in (layout, layout.with_attention_mask(permuted(layout))):
        inputs = [x.detach().float().requires_grad_() for x in tokens(layout.num_tokens)]
        moved = [x.detach().cuda().requires_grad_() for x in inputs]
        outputs = attend(*inputs, each), attend(*moved, each.to(torch.device("cuda")))
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(outputs[0], outputs[1].cpu(), **close)
        for out in outputs:
            (out**2).sum().backward()
        for one, other in zip(inputs, moved):
            torch.testing.assert_close(one.grad, other.grad.cpu(), **close)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_gets_widths_that_it_takes(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of CUDA, run here: widths are filled up to multiples of 8, and no number changes."""
    lengths = torch.tensor(LENGTHS)
    layout = jagged_layout(lengths, 9)
    if not causal:
        everyone = torch.zeros(layout.num_tokens, dtype=torch.int64)
        layout = layout.with_attention_mask(AttentionMask(everyone, everyone))
    widths: list[int] = []
    fused = F.scaled_dot_product_attention

    def noted(q, k, v, *arguments, **options):
        widths.extend(x.shape[-1] for x in (q, k, v))
        return fused(q, k, v, *arguments, **options)

    q, k, v = tokens(layout.num_tokens)
    expected = softmax_attention(q, k, v, layout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(dispatch, "fast_on_cpu", lambda x: False)
    torch.testing.assert_close(softmax_attention(q, k, v, layout), expected)
    assert widths and all(width % 8 == 0 for width in widths)
