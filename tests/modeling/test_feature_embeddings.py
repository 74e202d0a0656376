"""Embeddings of categories, lists and numbers, and refused specifications."""

from __future__ import annotations

import logging

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.feature_embeddings import (
    CategoricalEmbedding,
    EmbeddingSpec,
    NumericalEmbedding,
    SequenceEmbedding,
    category_ids,
)


def _tags(reduction: str) -> CategoricalEmbedding:
    return CategoricalEmbedding(EmbeddingSpec("tags", "categorical_list", 4, 5, list_reduction=reduction))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_lists_skip_padding(reduction: str) -> None:
    module = _tags(reduction)
    ids = torch.tensor([[[3, 0, 1], [2, 0, 0], [0, 0, 0]]])
    out = module(ids)
    rows = module.emb.weight[[3, 1]]
    expected = rows.max(0).values if reduction == "max" else getattr(rows, reduction)(0)
    assert out.shape == (1, 3, 4)
    assert torch.allclose(out[0, 0], expected)
    assert torch.allclose(out[0, 1], module.emb.weight[2])
    assert torch.equal(out[0, 2], torch.zeros(4))


@pytest.mark.parametrize("kind", ["categorical", "categorical_list"])
def test_unseen_categories_share_one_trained_row(kind: str) -> None:
    module = CategoricalEmbedding(EmbeddingSpec("genre", kind, 4, 3))
    ids = torch.tensor([[1], [4], [77], [-5], [0]])
    out = module(ids).view(5, 4)
    assert torch.equal(out[1], out[2]) and torch.equal(out[1], out[3])
    assert out[1].abs().sum() > 0
    assert torch.equal(out[4], torch.zeros(4))
    out[2].sum().backward()
    assert torch.equal(module.emb.weight.grad[4], torch.ones(4))
    assert module.emb.weight.grad[:4].abs().sum() == 0


def test_padding_row_gets_no_gradient() -> None:
    module = CategoricalEmbedding(EmbeddingSpec("item", "categorical", 3, 4))
    module(torch.tensor([0, 1])).sum().backward()
    assert module.emb.weight.grad[0].abs().sum() == 0
    assert module.emb.weight.grad[1].abs().sum() > 0


def test_numbers_are_linear() -> None:
    price = NumericalEmbedding(4)
    values = torch.randn(2, 3)
    assert torch.allclose(price(values), values[..., None] * price.linear.weight[:, 0] + price.linear.bias)
    assert torch.equal(NumericalEmbedding(1)(values), values[..., None])


def _schema() -> list[EmbeddingSpec]:
    return [
        EmbeddingSpec("item_id", "categorical", 4, 6),
        EmbeddingSpec("type", "categorical_list", 4, 3),
        EmbeddingSpec("a.b", "numerical", 2),
    ]


def test_sequence_embedding_embeds_by_name() -> None:
    module = SequenceEmbedding(_schema())
    batch = {
        "item_id": torch.randint(0, 7, (2, 5)),
        "type": torch.randint(0, 4, (2, 5, 3)),
        "a.b": torch.randn(2, 5),
        "not_embedded": torch.zeros(2),
    }
    out = module(batch)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "item_id": (2, 5, 4),
        "type": (2, 5, 4),
        "a.b": (2, 5, 2),
    }
    assert list(module(batch, ["type"])) == ["type"]
    assert torch.equal(module(batch, ["type"])["type"], module.embedder("type")(batch["type"]))


def test_sequence_embedding_names_what_is_missing() -> None:
    module = SequenceEmbedding(_schema()[1:])
    with pytest.raises(UserError, match=r"missing from the batch: a\.b"):
        module({"type": torch.zeros(1, 1, 1, dtype=torch.int64)})
    with pytest.raises(UserError, match="'colour'"):
        module({"colour": torch.zeros(1)}, ["colour"])
    with pytest.raises(UserError, match="different names"):
        SequenceEmbedding([*_schema(), _schema()[0]])


def test_category_ids_count_the_unseen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ids = category_ids(["drama", None, "opera", "comedy", "mime"], {"comedy": 1, "drama": 2}, "genre")
    assert ids.tolist() == [2, 0, 3, 1, 3]
    assert "genre: 2 values" in caplog.text
    caplog.clear()
    assert category_ids(["drama"], {"drama": 1}, "genre").tolist() == [1]
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "colour"}, "colour"),
        ({"kind": "categorical"}, "cardinality"),
    ],
)
def test_bad_specs_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        EmbeddingSpec("x", embedding_dim=4, **settings)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(UserError, match="min"):
        CategoricalEmbedding(EmbeddingSpec("x", "categorical_list", 4, 3, list_reduction="min"))
