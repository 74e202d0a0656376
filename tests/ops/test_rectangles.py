"""Gather and scatter between tokens and padded tiles, with heads and hidden padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.ops.attention import groups as groups_module
from generative_recommenders.ops.layout import Layout, jagged_layout, padded_layout
from generative_recommenders.ops.rectangles import Places, Rectangles

lengths_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12)
heads_counts = st.integers(1, 3)


def layouts(lengths: list[int]) -> list[Layout]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "STEP_COST", 1)  # many steps
        patch.setattr(groups_module, "GROUP_CELLS", 200)  # many groups
        return [each(torch.tensor(lengths), 9) for each in (jagged_layout, padded_layout)]


def both(layout: Layout) -> list[tuple[list[Rectangles], Places]]:
    keys, queries = ([getattr(group, name) for group in layout.groups] for name in ("keys", "queries"))
    return [(keys, layout.keys), (queries, layout.queries)]


@settings(max_examples=40, deadline=None)
@given(lengths_lists, heads_counts)
def test_round_trip(lengths: list[int], heads: int) -> None:
    for layout in layouts(lengths):
        x = torch.randn(layout.num_tokens, heads, 2)
        for rectangles, places in both(layout):
            cells = torch.cat([x.new_zeros(0, 2), *(each.gather(x) for each in rectangles)])
            assert torch.equal(places.ungather(cells, heads), x)


@settings(max_examples=40, deadline=None)
@given(lengths_lists, heads_counts)
def test_a_rectangle_by_a_plain_walk(lengths: list[int], heads: int) -> None:
    """Row, head and column of every cell; what is cut out of a wider projection is gathered as it lies."""
    layout, _ = layouts(lengths)
    wide = torch.randn(layout.num_tokens, 5 * heads)
    x = wide[:, 2 * heads : 4 * heads].unflatten(1, (heads, 2))
    for group in layout.groups:
        rows = layout.row_of[group.gather(torch.arange(layout.num_tokens))][:, 0]
        parts = group.queries.split(group.queries.gather(x), heads)
        assert len(parts) == len(group.steps)
        for step, part in zip(group.steps, parts):
            for row in range(step.rows):
                source, last = rows[row], group.lengths[row] - 1
                for column in range(step.start, step.stop):
                    token = layout.starts[source] + min(column, int(last))
                    for head in range(heads):
                        found = part.view(step.rows, heads, -1, 2)[row, head, column - step.start]
                        assert torch.equal(found, x[token, head])


@settings(max_examples=40, deadline=None)
@given(lengths_lists, heads_counts)
def test_hidden_padding(lengths: list[int], heads: int) -> None:
    for layout in layouts(lengths):
        for rectangles, _ in both(layout):
            ones = [each.hide_padding(each.empty(torch.ones(1, heads, 3)).fill_(1.0), heads) for each in rectangles]
            total = sum(float(each.sum()) for each in ones)
            assert total == sum(lengths) * heads * 3
