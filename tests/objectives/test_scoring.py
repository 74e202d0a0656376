"""Scores by products against gathered rows: values, gradients, sharing, collisions, golden losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.objectives.losses.sampled import BCELoss, SampledLoss, SampledSoftmaxLoss
from generative_recommenders.objectives.negative_samplers import LocalNegativesSampler, Negatives, Sharing
from generative_recommenders.objectives.scoring import (
    negative_products,
    no_collisions,
    sampled_scores,
)
from generative_recommenders.ops.counter_random import stream_key
from generative_recommenders.ops.layout import jagged_layout
from golden_encoders import ENTRANCES, choose_backend
from golden_parity import assert_gradients, assert_near, load_golden

TOKENS, ITEMS, DIM = 21, 12, 4
SHARINGS = [Sharing(), Sharing("block", 8), Sharing("block", 1), Sharing("block", 100), Sharing("batch")]
over_sharings = pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: f"{s.granularity}-{s.block_size}")
USERS = torch.arange(1, TOKENS + 1)


def draws(sharing: Sharing, first_token: int = 0, tokens: int = TOKENS, negatives: int = 5) -> Negatives:
    return LocalNegativesSampler(ITEMS, negatives, sharing)(stream_key(3), first_token, tokens)


def hidden_and_weight(dtype=torch.float64, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, DIM, generator=generator, dtype=dtype)
    weight = torch.randn(ITEMS + 1, DIM, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def gathered(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.einsum("td,trd->tr", hidden, weight[ids])


def assert_products_of_gathered_rows(hidden: torch.Tensor, weight: torch.Tensor, negatives: Negatives) -> None:
    actual = negative_products(hidden, weight, negatives.ids, negatives)
    expected = gathered(hidden, weight, negatives.per_token(negatives.ids, TOKENS))
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(x, (hidden, weight), cotangent) for x in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over_sharings
@pytest.mark.parametrize("first_token", [0, 3, 8, 13])
def test_products_are_those_of_gathered_rows(sharing: Sharing, first_token: int, dtype: torch.dtype) -> None:
    hidden, weight = hidden_and_weight(dtype)
    assert_products_of_gathered_rows(hidden, weight, draws(sharing, first_token))


@over_sharings
def test_more_negatives_than_rows(sharing: Sharing) -> None:
    hidden, weight = hidden_and_weight()
    assert_products_of_gathered_rows(hidden, weight, draws(sharing, negatives=3 * ITEMS))


@pytest.mark.parametrize("sharing", [Sharing(), Sharing("block", 8), Sharing("batch")])
def test_no_tokens(sharing: Sharing) -> None:
    hidden, weight = hidden_and_weight(tokens=0)
    negatives = draws(sharing, 3, 0)
    scores = negative_products(hidden, weight, negatives.ids, negatives)
    assert scores.shape == (0, 5)
    scores.sum().backward()
    assert (weight.grad == 0).all()


class NoProduct(DotProductSimilarity):
    """A dot product that is asked for rows of items, as learned similarities are."""

    def operands(self, states: torch.Tensor, weight: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("raw_positives", [True, False])
@over_sharings
@pytest.mark.parametrize("is_product", [True, False])
def test_scores_of_positives_and_negatives(sharing: Sharing, raw_positives: bool, is_product: bool) -> None:
    hidden, weight = hidden_and_weight(torch.float32)
    negatives, targets = draws(sharing), torch.randint(1, ITEMS + 1, (TOKENS, 2))
    normed, similarity = (
        F.normalize(weight, dim=-1),
        (DotProductSimilarity if is_product else NoProduct)(0.05),
    )
    items = ItemRows(weight, norm_eps=1e-6)
    scores = sampled_scores(hidden, items, targets, negatives, similarity, USERS, raw_positives)
    ids = negatives.per_token(negatives.ids, TOKENS)
    positive = gathered(hidden, weight if raw_positives else normed, targets) / 0.05
    torch.testing.assert_close(scores.positive, positive, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.negative, gathered(hidden, normed, ids) / 0.05, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.negative_mask, (ids[:, :, None] != targets[:, None, :]).all(2))
    assert scores.sums == {}


SIMILARITIES = (DotProductSimilarity(0.1), NoProduct(0.1))


@over_sharings
def test_scores_by_rows_are_those_of_products(sharing: Sharing) -> None:
    targets, negatives = torch.randint(1, ITEMS + 1, (TOKENS,)), draws(sharing, 5)
    results = []
    for similarity in SIMILARITIES:
        hidden, weight = hidden_and_weight(torch.float32)
        scores = sampled_scores(hidden, ItemRows(weight), targets, negatives, similarity, USERS)
        (scores.positive.sum() + scores.negative.square().sum()).backward()
        results.append([scores.positive, scores.negative, scores.negative_mask, hidden.grad, weight.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@over_sharings
def test_collisions(sharing: Sharing) -> None:
    negatives, targets = draws(sharing, 2), torch.randint(0, ITEMS + 1, (TOKENS, 3))
    ids = negatives.per_token(negatives.ids, TOKENS)
    mask = no_collisions(targets, negatives)
    for token in range(TOKENS):
        expected = [int(i) not in targets[token].tolist() for i in ids[token]]
        assert mask[token].tolist() == expected
    assert not mask.all()


@over_sharings
def test_log_q_is_subtracted_from_negatives_alone(sharing: Sharing) -> None:
    hidden, weight = hidden_and_weight(torch.float32)
    plain, targets = draws(sharing, 5), torch.ones(TOKENS, dtype=torch.int64)
    log_q = torch.randn(plain.ids.shape)
    corrected = Negatives(plain.ids, plain.sharing, plain.lead, log_q)
    for similarity in SIMILARITIES:
        before, after = (
            sampled_scores(hidden, ItemRows(weight), targets, n, similarity, USERS) for n in (plain, corrected)
        )
        torch.testing.assert_close(after.negative, before.negative - plain.per_token(log_q, TOKENS))
        assert torch.equal(after.positive, before.positive)


def test_gathered_rows_score_like_the_whole_table() -> None:
    hidden, weight = hidden_and_weight(torch.float32)
    negatives, targets = draws(Sharing("block", 8)), torch.tensor([3, 9, 9] * 7)
    ids = torch.unique(torch.cat([targets, negatives.ids.flatten()]))
    part = ItemRows(weight.detach()[ids].requires_grad_(), ids)
    whole = ItemRows(weight)
    outputs = [sampled_scores(hidden, x, targets, negatives, SIMILARITIES[0], USERS) for x in (part, whole)]
    torch.testing.assert_close(outputs[0].negative, outputs[1].negative)
    for out in outputs:
        (out.positive.sum() + out.negative.square().sum()).backward()
    torch.testing.assert_close(part.weight.grad, weight.grad[ids])


@pytest.mark.parametrize("positives", [1, 2])
def test_rows_are_normalised_where_they_are_scored(positives: int) -> None:
    """Many rows, each read about once, whose products are divided instead of them."""
    hidden, targets = torch.randn(TOKENS, 4, requires_grad=True), torch.randint(1, 200, (TOKENS, positives))
    weight = torch.randn(200, 4, requires_grad=True)
    negatives = Negatives(torch.randint(1, 200, (TOKENS, 8)), Sharing())
    lazily = ItemRows(weight, norm_eps=1e-6)
    results = []
    for rows in (lazily, lazily.normalized()):
        scores = sampled_scores(hidden, rows, targets, negatives, SIMILARITIES[0], USERS)
        total = scores.positive.pow(3).sum() + scores.negative.square().sum()
        results.append((scores.positive, scores.negative, *torch.autograd.grad(total, (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


LOSSES: dict[str, SampledLoss] = {"meta_sampled_softmax": SampledSoftmaxLoss(), "meta_bce": BCELoss()}


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("scorer", [DotProductSimilarity, NoProduct])
@pytest.mark.parametrize("case", LOSSES)
def test_golden_losses(
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    scorer: type[DotProductSimilarity],
    entrance: str,
    backend: str,
) -> None:
    choose_backend(monkeypatch, backend)
    golden, loss = load_golden(case), LOSSES[case]
    c = golden.config
    hidden = golden.inputs["output_embeddings"].requires_grad_()
    states = hidden
    if entrance == "padded":  # there and back through the rectangle
        layout = jagged_layout(golden.inputs["lengths"].long(), c["max_len"])
        states = layout.flatten(layout.to_rectangle(hidden))
    table = golden.parameters["item_emb.weight"].requires_grad_()
    negatives = Negatives(golden.inputs["sampled_ids"].long(), Sharing())
    targets, weights = golden.inputs["supervision_ids"].long(), golden.inputs["supervision_weights"]
    rows, users = ItemRows(table, norm_eps=c["l2_eps"]), torch.zeros_like(targets)
    scores = sampled_scores(states, rows, targets, negatives, scorer(c["temperature"]), users, loss.raw_positives)
    total, weight, _ = loss(scores.positive, scores.negative, weights[:, None], scores.negative_mask)
    value = total / weight
    assert_near(value, golden.outputs["loss"])
    assert_near(value, golden.outputs["loss_from_padded_forward"])
    tensors = {"item_emb.weight": table, "output_embeddings": hidden}
    assert_gradients(golden, value, **tensors)


def test_shared_negatives_never_make_a_tensor_for_each_token_and_negative() -> None:
    """R D numbers a block, not T R D: seen in the largest tensor that autograd keeps."""
    sizes: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    hidden, weight = hidden_and_weight(torch.float32)
    negatives = draws(Sharing("block", 7), negatives=16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        negative_products(hidden, weight, negatives.ids, negatives)
    assert max(sizes) < TOKENS * 16 * DIM
    with FlopCounterMode(display=False) as flops:
        negative_products(hidden, weight, negatives.ids, negatives)
    assert flops.get_total_flops() == 2 * 21 * 16 * DIM
