"""Dropout masks of numbered rows: the same whatever other rows a process holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.pointwise import pointwise_attention
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.dropout import dropout
from generative_recommenders.ops.feed_forward import feed_forward
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.ops.numbered_rows import NumberedRows, of_block, of_items, opened
from generative_recommenders.ops.recomputation import recomputed

LENGTHS = torch.tensor([5, 0, 9, 3, 7, 2])
Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dropped(x: torch.Tensor, numbers: torch.Tensor, rate: float = 0.3) -> torch.Tensor:
    with opened(NumberedRows(7, numbers)):
        return dropout(x, rate, training=True)


def test_a_part_of_the_rows_drops_what_all_would() -> None:
    x, numbers = torch.randn(40, 5), torch.arange(40) * 3
    whole = dropped(x, numbers)
    parts = [dropped(x[part], numbers[part]) for part in (slice(0, 13), slice(13, 40))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dropped(x.flip(0), numbers.flip(0)), whole.flip(0))


def test_rows_that_became_several() -> None:
    x, numbers = torch.randn(40, 2, 3), torch.arange(40)
    parts = [dropped(x[part].flatten(0, 1), numbers[part]) for part in (slice(0, 13), slice(13, 40))]
    assert torch.equal(torch.cat(parts), dropped(x.flatten(0, 1), numbers))


@pytest.mark.parametrize("rate", [0.003, 0.2, 0.5, 0.999])
def test_the_share_of_what_is_dropped(rate: float) -> None:
    x = dropped(torch.ones(4000, 101), torch.arange(4000), rate)
    share = (x == 0).float().mean()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.allclose(x[x > 0], torch.tensor(1 / (1 - rate)))
    both = ((x[:, :-1] == 0) & (x[:, 1:] == 0)).float().mean().item()
    assert both == pytest.approx(rate**2, abs=5e-3)


def test_sources_differ_and_keys_too() -> None:
    x, numbers = torch.ones(200, 8), torch.arange(200)
    with opened(NumberedRows(7, numbers)):
        first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
        with of_block(slice(0, 200), purpose=1):
            third = dropout(x, 0.5, True)
    with opened(NumberedRows(8, numbers)):
        other = dropout(x, 0.5, True)
    assert len({tuple(each.flatten().tolist()) for each in (first, second, third, other)}) == 4


def attention(kind: str) -> Operation:
    def attend(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        q, layout = x[:, None].expand(-1, 2, -1).contiguous(), jagged_layout(lengths, 9)
        if kind == "softmax":
            return softmax_attention(q, q, q, layout, 0.3).flatten(1)
        return pointwise_attention(q, q, q, layout, None, 9.0, 0.3).flatten(1)

    return attend


def positionwise(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
    return feed_forward(x, first, second, torch.nn.functional.relu, 0.3)


OPERATIONS = {
    "softmax": attention("softmax"),
    "pointwise": attention("pointwise"),
    "feed-forward": positionwise,
}


def result(
    operation: Operation, x: torch.Tensor, lengths: torch.Tensor, first_row: int, again: bool
) -> list[torch.Tensor]:
    """The output and the gradient. first_row: of these rows among all."""
    layout = jagged_layout(lengths, 9)
    x = x.clone().requires_grad_()
    with opened(NumberedRows(3, (layout.row_of + first_row) * 16 + layout.positions)):
        y = recomputed(operation, x, lengths) if again else operation(x, lengths)
    y.sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_over_a_part_of_the_rows(name: str, again: bool) -> None:
    x, operation = torch.randn(int(LENGTHS.sum()), 4), OPERATIONS[name]
    whole = result(operation, x, LENGTHS, 0, again)
    cut = int(LENGTHS[:3].sum())
    parts = [
        result(operation, x[:cut], LENGTHS[:3], 0, False),
        result(operation, x[cut:], LENGTHS[3:], 3, again),
    ]
    for together, one, other in zip(whole, *parts):
        torch.testing.assert_close(torch.cat([one, other]), together, rtol=1e-5, atol=1e-6)
    with dispatch.references():
        for expected, found in zip(result(operation, x, LENGTHS, 0, False), whole):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_items_are_numbered_by_their_ids() -> None:
    ids, x = torch.tensor([2, 5, 9]), torch.ones(3, 64)

    def of(chosen: slice) -> torch.Tensor:
        with opened(NumberedRows(1, torch.arange(4), ids[chosen])), of_items():
            return dropout(x[chosen], 0.5, True)

    assert torch.equal(of(slice(1, 3)), of(slice(0, 3))[1:])


def test_nothing_changes_where_rows_are_not_numbered() -> None:
    with of_items(), of_block(slice(0, 3), 1):
        assert dropout(torch.ones(2, 3), 0.0, True).sum() == 6
