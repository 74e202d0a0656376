"""Item embeddings: lookups, gathered rows against the whole table, categories, gradients."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.modeling.initialization import truncated_normal_
from generative_recommenders.modeling.items import (
    CategoricalEmbeddingModule,
    ItemEmbedding,
    ItemRows,
    LocalEmbeddingModule,
)
from memory import LargestTensor

CATEGORIES = torch.tensor([2, 0, 2, 1, 0, 0])


@pytest.fixture(params=["local", "categorical"])
def items(request: pytest.FixtureRequest) -> ItemEmbedding:
    return LocalEmbeddingModule(6, 3) if request.param == "local" else CategoricalEmbeddingModule(CATEGORIES, 3)


def test_the_two_calls_and_the_catalogue_agree(items: ItemEmbedding) -> None:
    ids = torch.tensor([[1, 6], [3, 3]])
    assert items.all_item_embeddings().shape == (6, 3)
    assert torch.equal(items.get_item_embeddings(ids), items.all_item_embeddings()[ids - 1])
    assert torch.equal(items.embed_history(ids), items.get_item_embeddings(ids))


def test_gathered_rows_give_what_the_whole_table_gives(items: ItemEmbedding) -> None:
    ids = torch.tensor([2, 3, 6])
    rows = items.table_rows(ids)
    assert torch.equal(rows, rows.unique())
    leaf = items.table.detach()[rows].requires_grad_()
    wanted = torch.tensor([6, 3, 3])
    for part in (items.history_rows(ItemRows(leaf, rows)), items.scored_rows(ItemRows(leaf, rows), ids)):
        assert torch.equal(part.lookup(wanted), items.get_item_embeddings(wanted))
    items.scored_rows(ItemRows(leaf, rows), ids).lookup(wanted).square().sum().backward()
    items.get_item_embeddings(wanted).square().sum().backward()
    assert torch.equal(torch.zeros_like(items.table).index_copy(0, rows, leaf.grad), items.table.grad)


def test_few_items_are_scored_without_a_pass_over_the_table() -> None:
    items, ids = LocalEmbeddingModule(5000, 8, item_l2_norm=True), torch.tensor([[3, 4999], [17, 3]])
    with LargestTensor() as largest:
        scored = items.get_item_embeddings(ids)
    assert largest.numel == ids.numel() * 8
    assert torch.equal(scored, items.all_item_embeddings()[ids - 1])


def test_items_of_a_category_share_a_row() -> None:
    items = CategoricalEmbeddingModule(CATEGORIES, 3)
    everything = items.all_item_embeddings()
    assert items.table.shape == (4, 3)
    for i, one in enumerate(CATEGORIES):
        for j, other in enumerate(CATEGORIES):
            assert torch.equal(everything[i], everything[j]) == bool(one == other)
    assert items.table_rows(torch.tensor([1, 2, 3])).tolist() == [1, 3]


def test_an_override_of_history_rows_alone_leaves_scored_items_as_they_are() -> None:
    class Shifted(ItemEmbedding):
        def history_rows(self, leaf: ItemRows) -> ItemRows:
            return ItemRows(leaf.weight + 1.0, leaf.ids)

    items, ids = Shifted(6, 3), torch.tensor([2, 5])
    assert torch.equal(items.embed_history(ids), items.table[ids] + 1.0)
    assert torch.equal(items.get_item_embeddings(ids), items.table[ids])
    assert torch.equal(items.all_item_embeddings(), items.table[1:])


def test_an_override_of_the_initial_table_gets_its_deviation() -> None:
    class Wide(ItemEmbedding):
        def initial_table(self, num_rows: int, std: float) -> torch.Tensor:
            return super().initial_table(num_rows, 50 * std)

    torch.manual_seed(0)
    assert Wide(1000, 8).table.std().item() == pytest.approx(50 * 0.02 * 0.8796, rel=0.05)


def test_catalogue_of_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows are held"):
        ItemRows(torch.zeros(3, 2), torch.tensor([1, 2, 3])).catalogue()


@pytest.mark.parametrize("categories", [torch.tensor([], dtype=torch.int64), torch.tensor([0, -1])])
def test_bad_categories(categories: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="item_category"):
        CategoricalEmbeddingModule(categories, 3)


def test_truncated_normal() -> None:
    torch.manual_seed(0)
    x = truncated_normal_(torch.empty(70_000, 2), std=0.5)
    assert x.abs().max() <= 1.0
    assert abs(x.mean()) < 0.01
    assert x.std().item() == pytest.approx(0.5 * 0.8796, rel=0.02)  # of a normal cut at two deviations
    assert not torch.equal(x[:100], x[-100:])


def test_the_gradient_of_a_few_rows_is_added_to_that_of_the_others() -> None:
    items = LocalEmbeddingModule(200, 4)
    held = torch.arange(1, 201)
    looked_up, factors = torch.tensor([[7, 9], [7, 200]]), torch.randn(200, 4)
    for others in (True, False):
        leaf = items.step_rows(held)
        loss = leaf.lookup(looked_up).pow(3).sum() + ((leaf.weight * factors).sum() if others else 0)
        loss.backward()
        plain = items.table.detach()[held].requires_grad_()
        expected = plain[looked_up - 1].pow(3).sum() + ((plain * factors).sum() if others else 0)
        torch.testing.assert_close(leaf.gradient(), torch.autograd.grad(expected, plain)[0])
