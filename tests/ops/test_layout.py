"""Jagged and padded layouts: the same tokens, rectangles that come back, groups that cover all once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.ops.attention import groups as groups_module
from generative_recommenders.ops.attention import tiles
from generative_recommenders.ops.layout import (
    AttentionMask,
    Layout,
    attended_tokens,
    jagged_layout,
    padded_layout,
)

lengths_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def layouts(lengths: list[int], width: int) -> tuple[Layout, Layout]:
    tensor = torch.tensor(lengths)
    return jagged_layout(tensor, width), padded_layout(tensor, width)


def rectangle(lengths: list[int], width: int, *trailing: int) -> torch.Tensor:
    """Random numbers other than 0, with zeros as padding."""
    x = torch.rand(len(lengths), width, *trailing) + 1.0
    for row, length in enumerate(lengths):
        x[row, length:] = 0
    return x


@settings(max_examples=30, deadline=None)
@given(lengths_lists, st.integers(0, 2))
def test_round_trips(lengths: list[int], spare: int) -> None:
    width = max([*lengths, 1]) + spare
    for trailing in ((), (3,), (2, 3)):
        expected = rectangle(lengths, width, *trailing)
        for each in layouts(lengths, width):
            assert torch.equal(each.to_rectangle(each.flatten(expected)), expected)


@settings(max_examples=30, deadline=None)
@given(lengths_lists)
def test_tokens_by_a_plain_walk(lengths: list[int]) -> None:
    layout = jagged_layout(torch.tensor(lengths), 9)
    tokens = [(row, place) for row, length in enumerate(lengths) for place in range(length)]
    assert list(zip(layout.row_of.tolist(), layout.positions.tolist())) == tokens
    assert layout.offsets.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    assert (layout.num_rows, layout.num_tokens) == (len(lengths), len(tokens))


@settings(max_examples=30, deadline=None)
@given(lengths_lists)
def test_last_tokens(lengths: list[int]) -> None:
    for layout in layouts(lengths, 9):
        for row, length in enumerate(lengths):
            if length:
                last = layout.last_tokens[row]
                assert layout.row_of[last] == row
                assert layout.positions[last] == length - 1
        ends = layout.at_end(torch.arange(1.0, layout.num_tokens + 1)[:, None])[:, 0]
        expected = (layout.last_tokens + 1).where(layout.lengths > 0, 0)
        assert ends.tolist() == expected.tolist()


@settings(max_examples=30, deadline=None)
@given(lengths_lists, st.sampled_from([1, 20, 400_000]))
def test_groups_cover_every_token_once(lengths: list[int], cells: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "GROUP_CELLS", cells)
        layout = jagged_layout(torch.tensor(lengths), 9)
    everything = torch.arange(layout.num_tokens)
    rows_of = [layout.row_of[group.gather(everything)] for group in layout.groups]
    held = sorted(row for rows in rows_of for row in rows[:, 0].tolist())
    assert held == [row for row, length in enumerate(lengths) if length]
    gathered = [group.gather(everything).flatten() for group in layout.groups]
    if gathered:
        assert torch.equal(torch.cat(gathered)[layout.keys.cells.long()], everything)
    for group, rows in zip(layout.groups, rows_of):
        assert group.width == max(group.lengths.tolist())
        assert group.lengths.tolist() == [lengths[row] for row in rows[:, 0]]
        assert (rows == rows[:, :1]).all()
        assert group.real().sum(1).tolist() == group.lengths.tolist()


def test_long_rows_do_not_share_a_rectangle_with_short_ones_where_all_of_it_counts() -> None:
    layout = jagged_layout(torch.tensor([200] * 10 + [5] * 50), 200)
    everyone = torch.zeros_like(layout.positions)
    seen = layout.with_attention_mask(AttentionMask(everyone, everyone))
    assert sum(group.keys.tokens.numel() for group in seen.groups) <= 1.1 * layout.num_tokens
    assert torch.equal(
        torch.cat([group.keys.tokens for group in seen.groups])[seen.keys.cells.long()], every_token(seen)
    )


def every_token(layout: Layout) -> torch.Tensor:
    return torch.arange(layout.num_tokens, dtype=torch.int32)


@settings(max_examples=50, deadline=None)
@given(lengths_lists, st.sampled_from([0, 1, 10, 40_000]))
def test_steps_reach_every_token_of_a_group(lengths: list[int], cost: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "STEP_COST", cost)
        layout = jagged_layout(torch.tensor(lengths), 9)
    for group in layout.groups:
        assert [step.start for step in group.steps] == [0, *(step.stop for step in group.steps[:-1])]
        assert group.steps[-1].stop == group.width
        for step in group.steps:
            assert step.rows == (group.lengths > step.start).sum()


def test_steps_leave_out_most_of_what_nobody_sees() -> None:
    lengths = torch.tensor([200] * 50 + [120] * 30 + [40] * 48)
    layout = jagged_layout(lengths, 200)
    (group,) = layout.groups
    computed = sum((step.stop - step.start) * step.stop * step.rows for step in group.steps)
    needed = int((lengths * (lengths + 1) // 2).sum())
    assert needed <= computed <= 1.5 * needed


def test_attended_tokens_of_causal_masked_and_padded_layouts() -> None:
    lengths, masked = torch.tensor([4, 0, 3]), torch.tensor([0, 5, 5, 0, 0, 2, 9])
    causal = jagged_layout(lengths, 6)
    assert attended_tokens(causal).tolist() == [1, 2, 3, 4, 1, 2, 3]
    both = causal.with_attention_mask(AttentionMask(masked, torch.full((7,), 4)))
    assert attended_tokens(both).tolist() == [2, 2, 2, 2, 2, 2, 2]
    padded = padded_layout(lengths, 5)
    full = padded.with_attention_mask(AttentionMask(torch.zeros(15).long(), torch.zeros(15).long()))
    assert attended_tokens(full).view(3, 5)[0].tolist() == [4] * 5


class Padded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = SASRec(8)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, padded_layout(lengths, 4), {})


@torch.no_grad()
def test_a_padded_layout_can_be_exported() -> None:
    """For other lengths than it was traced with; what is exported runs without gradients."""
    model, x = Padded().eval(), torch.randn(8, 8)
    tiles.kept_future.cache_clear()  # as in a process that has attended to nothing yet
    exported = torch.export.export(model, (x, torch.tensor([2, 4]))).module()
    for lengths in ([2, 4], [3, 1]):
        torch.testing.assert_close(exported(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))


def test_mask_changes_padding_only() -> None:
    jagged, padded = layouts([2, 0, 1], 3)
    x = torch.ones(9, 2)
    assert jagged.mask(x[:3]) is not None
    assert padded.mask(x)[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 1, 0, 0]
    assert jagged.mask(x[:3]).equal(x[:3])


def test_layouts_without_tokens() -> None:
    for lengths in ([], [0, 0]):
        layout = jagged_layout(torch.tensor(lengths, dtype=torch.int64), 4)
        assert (layout.num_rows, layout.num_tokens, layout.groups) == (len(lengths), 0, ())
        assert layout.to_rectangle(torch.zeros(0, 2)).tolist() == torch.zeros(len(lengths), 4, 2).tolist()


def test_to_moves_every_tensor() -> None:
    layout = jagged_layout(torch.tensor([2, 3]), 3)
    layout = layout.with_attention_mask(AttentionMask(layout.positions, layout.positions))
    moved = layout.to(torch.device("meta"))
    tensors = [moved.lengths, moved.positions, moved.row_of, moved.starts]
    for group in moved.groups:
        tensors += [group.lengths, group.keys.tokens, group.keys.real, group.queries.tokens]
    tensors += [t for found in (moved.keys, moved.queries) for t in (found.cells, found.runs)]
    assert moved.attention_mask is not None
    tensors += [moved.attention_mask.key, moved.attention_mask.query]
    assert {t.device.type for t in tensors} == {"meta"}
    assert layout.device.type == "cpu"
    assert (moved.max_length, moved.num_tokens, moved.groups[0].width) == (3, 5, 3)
    assert padded_layout(torch.tensor([1]), 2).to(torch.device("cpu")).valid is not None


@pytest.mark.gpu
def test_layout_made_for_a_gpu_equals_the_one_moved_there() -> None:
    lengths, device = torch.tensor([3, 0, 7]), torch.device("cuda")
    made, moved = jagged_layout(lengths, 7, device), jagged_layout(lengths, 7).to(device)
    assert made.device.type == "cuda"
    assert torch.equal(made.queries.cells, moved.queries.cells)
    assert torch.equal(made.row_of, moved.row_of)


@pytest.mark.parametrize("lengths", [[2, 4], [-1, 2]])
def test_lengths_that_no_row_can_have(lengths: list[int]) -> None:
    with pytest.raises(UserError, match="lengths reach from .* and a row has 3 columns"):
        jagged_layout(torch.tensor(lengths), 3)
