"""Exact evaluation of a model under a run's settings."""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np
import torch

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.baselines import training_counts
from generative_recommenders.evaluation.evaluator import EvaluationResult, Evaluator, Score
from generative_recommenders.evaluation.top_lists import TopLists
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops import dispatch
from generative_recommenders.training.progress import with_progress
from generative_recommenders.types import Batch


class ModelEvaluation:
    """Scores the validation or test targets of a split by the model as it is.

    An evaluation of everyone has the metrics of top-k lists too, where ``train_fn.list_metrics_k`` asks for them.
    """

    def __init__(
        self,
        settings: RunSettings,
        dataset: SequenceDataset,
        split: Split,
        collectives: Collectives,
    ) -> None:
        self.settings, self.dataset, self.split, self.collectives = settings, dataset, split, collectives

    def validation(self, model: SequenceRecommender, max_batches: int | None = None) -> EvaluationResult:
        """The split's validation targets; in protocol "paper" there are none and the test targets are taken.

        max_batches: of all processes together, for a partial evaluation.
        """
        if self.settings.train.protocol == "paper":
            return self.test(model, max_batches)
        return self._ranks(
            model, self.split.validation_targets, self.split.unseen_validation_targets, max_batches
        )

    def test(self, model: SequenceRecommender, max_batches: int | None = None) -> EvaluationResult:
        return self._ranks(model, self.split.test_targets, self.split.unseen_test_targets, max_batches)

    @cached_property
    def _item_counts(self) -> torch.Tensor:
        """``[V]`` training events."""
        columns = (self.dataset.items, self.dataset.offsets, self.split.train_stops)
        return training_counts(*columns, self.dataset.num_items)

    def _lists(self, max_batches: int | None) -> TopLists | None:
        """An empty collector of lists for an evaluation of everyone."""
        k = self.settings.train.list_metrics_k
        if k is None or max_batches is not None:
            return None
        return TopLists(k, self.dataset.num_items, self._item_counts)

    def _ranks(
        self, model: SequenceRecommender, targets: np.ndarray, unseen: np.ndarray, max_batches: int | None
    ) -> EvaluationResult:
        t, world = self.settings.train, self.collectives
        training = model.training
        model.eval()
        score = catalogue_scores(model, torch.bfloat16 if t.eval_bf16 else None)
        batch_size = min(t.eval_batch_size, t.eval_user_max_batch_size or t.eval_batch_size)
        max_users = None if max_batches is None else max_batches * batch_size
        loader = EvaluationLoader(
            self.dataset, targets, t.max_sequence_length, batch_size, world.rank, world.world_size, max_users
        )
        evaluator = Evaluator(
            loader, self.dataset.num_items, t.seen_filter, world, torch.from_numpy(unseen), t.rating_threshold,
            partial(with_progress, total=len(loader), description="evaluation", enabled=world.is_main),
        )  # fmt: skip
        result = evaluator(score, self._lists(max_batches))
        model.train(training)
        return result


@torch.inference_mode()
def catalogue_scores(model: SequenceRecommender, autocast: torch.dtype | None = None) -> Score:
    """Scores ``[n, V]`` of evaluation batches by the model as it is now. autocast: the dtype of its encoder's products."""
    snapshot = model.catalogue()

    @torch.inference_mode()
    def score(batch: Batch) -> torch.Tensor:
        with dispatch.autocast(snapshot.embeddings.device, autocast):
            queries = model.encode_query(batch)
        return model.score(queries, snapshot)

    return score
