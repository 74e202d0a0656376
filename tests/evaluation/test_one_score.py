"""The model's own score gives the evaluator's ranking, for every encoder, objective, similarity and item norm."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from generative_recommenders.build.model import build_model
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation import model_evaluation
from generative_recommenders.evaluation.evaluator import Evaluator
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.modeling.inputs import Queries, history_inputs
from generative_recommenders.retrieval.methods import build_top_k
from generative_recommenders.types import SequentialFeatures
from tiny_models import LENGTHS, catalogue, histories, settings

OBJECTIVES = ("causal", "causal_last", "masked", "permuted", "replaced")
SIMILARITIES = {
    "DotProduct": {},
    "MoL": {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"},
}
CHOICES = [
    pytest.param(*choice, id="-".join(map(str, choice)))
    for choice in product(ENCODERS.names(), OBJECTIVES, SIMILARITIES, (False, True))
    if choice[0] != "GRU4Rec" or choice[1].startswith("causal")  # a recurrent encoder reads the past alone
]


@pytest.mark.parametrize(("encoder", "objective", "similarity", "norm"), CHOICES)
def test_the_ranking_is_the_evaluators(
    monkeypatch: pytest.MonkeyPatch,
    ragged_dataset: SequenceDataset,
    encoder: str,
    objective: str,
    similarity: str,
    norm: bool,
) -> None:
    chosen = settings(
        main_module=encoder, objective=objective, item_l2_norm=norm, seen_filter="none", eval_batch_size=29,
        **SIMILARITIES[similarity],
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(chosen, catalogue(num_items=ragged_dataset.num_items)).eval()
    with torch.no_grad():
        model.items.table.mul_(torch.linspace(0.1, 30, len(model.items.table))[:, None])  # norms that matter
    evaluated: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    class Recording(Evaluator):
        def __call__(self, score, lists=None, progress=None):
            def recorded(batch):
                evaluated.append((batch, score(batch)))
                return evaluated[-1][1]

            by_scores = super().__call__(recorded, lists, progress)
            assert torch.equal(super().__call__(score, lists, progress).ranks, by_scores.ranks)
            return by_scores

    monkeypatch.setattr(model_evaluation, "Evaluator", Recording)
    split = make_split(ragged_dataset)
    ModelEvaluation(chosen, ragged_dataset, split, Collectives()).test(model)
    search = build_top_k(chosen, model)
    with torch.no_grad():
        for batch, scores in evaluated:
            queries = model.encode_query(batch)
            own = model.score(queries, model.catalogue())
            assert torch.equal(own.topk(5).indices, scores.topk(5).indices)
            values, ids = search(queries.states, 5, user_ids=queries.user_ids)
            assert torch.equal(ids, own.topk(5).indices + 1)
            torch.testing.assert_close(values, own.topk(5).values)
            torch.testing.assert_close(model.score(queries, ids), values, rtol=1e-4, atol=1e-4)
            some = torch.tensor([3, 0, 1])
            listed = model.score(queries, some)
            torch.testing.assert_close(listed[:, [0, 2]], own[:, [2, 0]], rtol=1e-4, atol=1e-4)
            assert (listed[:, 1] == -torch.inf).all()


@pytest.mark.parametrize("objective", ["masked", "permuted", "replaced"])
@torch.no_grad()
def test_no_state_of_a_masked_model_without_its_mask_slot(objective: str) -> None:
    model = build_model(settings(objective=objective), catalogue()).eval()
    ids, events = histories()
    features = SequentialFeatures(LENGTHS, ids, events)
    for call in (
        lambda: model(LENGTHS, ids, past_events=events),
        lambda: model.states(history_inputs(features)),
        lambda: model.encode_incremental(None, LENGTHS, ids, events),
    ):
        with pytest.raises(UserError, match="mask"):
            call()
    states = model.encode_query(features).states
    model.mask_embedding.weight.add_(1.0)
    assert (model.encode_query(features).states - states).abs().amax(1).min() > 0


@torch.no_grad()
def test_queries_of_unknown_users_need_no_ids() -> None:
    model = build_model(settings(item_l2_norm=True), catalogue()).eval()
    ids, _ = histories()
    queries = model.encode_query({"item_ids": ids, "lengths": LENGTHS})
    assert isinstance(queries, Queries) and queries.user_ids is None
    assert model.score(queries, model.catalogue()).shape == (4, 20)
