"""Exact evaluation of models and baselines under a run's settings, and the conditions to read its numbers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from absl import logging

from generative_recommenders.build.registered import build_part
from generative_recommenders.config.registry import SEEN_FILTERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.progress import progress_bar
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.baselines import MarkovSuccessor, MostPopular, training_counts
from generative_recommenders.evaluation.evaluator import (
    EvaluationResult,
    Evaluator,
    RankedUsers,
    Record,
    Score,
    never,
)
from generative_recommenders.evaluation.top_lists import TopLists
from generative_recommenders.evaluation.user_ranks import UserRanks
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops import dispatch
from generative_recommenders.types import Batch

TOLERATED_REMOVED = 0.01
"""Share of targets that a seen filter may take out without a warning."""

KEPT_BYTES = 1 << 30
"""Batches of an evaluation that stay on an accelerator, at most."""


class ModelEvaluation:
    """Scores the validation or test targets of a split by a model as it is; UserError where there are no test targets.

    An evaluation of everyone has the metrics of top-k lists too, where ``train_fn.list_metrics_k`` asks for them. Targets that
    training never saw are misses; in protocol "paper" they rank as they are scored, as in the published program.
    """

    def __init__(
        self,
        settings: RunSettings,
        dataset: SequenceDataset,
        split: Split,
        collectives: Collectives,
    ) -> None:
        self.settings, self.dataset, self.split, self.collectives = settings, dataset, split, collectives
        self.seen_filter = build_part(settings, SEEN_FILTERS, settings.evaluation.seen_filter, {})
        self.warned_removed = False
        self.kept: dict[str, list[RankedUsers]] = {}
        if not (split.test_targets >= 0).any():
            raise UserError(
                f"{settings.data.dataset_name} has no test targets under protocol {settings.data.protocol!r}: its longest "
                f"history has {max(dataset.lengths, default=0)} events; there is nothing to measure a model by"
            )

    def validation(
        self, model: SequenceRecommender, max_batches: int | None = None, stop: Callable[[], bool] = never
    ) -> EvaluationResult:
        """The split's validation targets; in protocol "paper" there are none and the test targets are taken.

        max_batches: of all processes together, for a partial evaluation. stop: see `Evaluator`.
        """
        part = "test" if self.settings.data.protocol == "paper" else "validation"
        return self._of_model(model, part, max_batches, stop)

    def test(
        self, model: SequenceRecommender, stop: Callable[[], bool] = never, record: Record | None = None
    ) -> EvaluationResult:
        """The split's test targets. stop, record: see `Evaluator`."""
        return self._of_model(model, "test", None, stop, record)

    def baselines(self, ranks: dict[str, UserRanks] | None = None) -> dict[str, dict[str, float]]:
        """Test metrics of the most popular items and of the last item's most frequent successor, fitted on training events.

        ranks: an empty mapping, which gets those of single users by baseline.
        """
        columns = (self.dataset.items, self.dataset.offsets, self.split.train_stops, self.dataset.num_items)
        evaluate, rows = self._evaluator("test", None), {}
        for name, kind in (("most popular", MostPopular), ("last item's successor", MarkovSuccessor)):
            baseline = kind.fit(*columns)

            def score(batch: Mapping[str, torch.Tensor], score_by: Any = baseline) -> torch.Tensor:
                return score_by.score(batch["item_ids"], batch["lengths"])

            own = UserRanks()
            rows[name] = evaluate(score, record=own.add).metrics()
            if ranks is not None:
                ranks[name] = own
        return rows

    def conditions(self, result: EvaluationResult) -> str:
        """The conditions of test numbers: what became of targets that repeat or that training never saw, and next_time
        where the encoder has a time bias."""
        unseen = int(self.split.unseen_test_targets.sum())
        shown = f"seen filter {self.settings.evaluation.seen_filter!r}"
        if self.settings.evaluation.seen_filter != "none":
            shown += (
                f" (targets among the seen items, misses: {result.removed_targets:,} of {result.targets:,})"
            )
        rank = "as scored" if self.settings.data.protocol == "paper" else "misses"
        shown += f", targets unseen in training, {rank}: {unseen:,}"
        if self.settings.uses_times and self.dataset.timestamps is not None:
            shown += f", next_time {self.settings.value('train_fn.next_time')!r}"
        return shown

    def _evaluator(self, part: str, max_batches: int | None, stop: Callable[[], bool] = never) -> Evaluator:
        """part: "validation" or "test"."""
        world, split = self.collectives, self.split
        targets, unseen = split.test_targets, split.unseen_test_targets
        if part == "validation":
            targets, unseen = split.validation_targets, split.unseen_validation_targets
        evaluation, data = self.settings.evaluation, self.settings.data
        batch_size = min(
            evaluation.eval_batch_size, evaluation.eval_user_max_batch_size or evaluation.eval_batch_size
        )
        max_users = None if max_batches is None else max_batches * batch_size
        loader = EvaluationLoader(
            self.dataset,
            targets,
            data.max_sequence_length,
            batch_size,
            world.rank,
            world.world_size,
            max_users,
        )
        return Evaluator(
            loader, self.dataset.num_items, self.seen_filter, world,
            None if data.protocol == "paper" else torch.from_numpy(unseen), evaluation.rating_threshold,
            partial(progress_bar, total=len(loader), description="evaluation", shown=world.is_main), stop,
        )  # fmt: skip

    def _of_model(
        self,
        model: SequenceRecommender,
        part: str,
        max_batches: int | None,
        stop: Callable[[], bool],
        record: Record | None = None,
    ) -> EvaluationResult:
        lists = None
        if self.settings.evaluation.list_metrics_k is not None and max_batches is None:
            columns = (self.dataset.items, self.dataset.offsets, self.split.train_stops)
            counts = training_counts(*columns, self.dataset.num_items)
            lists = TopLists(self.settings.evaluation.list_metrics_k, self.dataset.num_items, counts)
        training = model.training
        model.eval()
        score = catalogue_scores(model, torch.bfloat16 if self.settings.evaluation.eval_bf16 else None)
        evaluator = self._evaluator(part, max_batches, stop)
        if max_batches is None and lists is None and self._keeps(model):
            if part not in self.kept:
                self.kept[part] = [users.to(self.collectives.device) for users in evaluator.prepared()]
            evaluator.kept = self.kept[part]
        result = evaluator(score, lists, record)
        model.train(training)
        if max_batches is None:
            self._warn_of_removed(result)
        return result

    def _keeps(self, model: SequenceRecommender) -> bool:
        """Whether batches stay on an accelerator for the next evaluation: it ranks them faster than a host makes them."""
        columns = 2 + len(self.dataset.manifest.columns) + len(self.dataset.extra)
        window = self.dataset.num_users * columns * self.settings.data.max_sequence_length
        size = 8 * (window + 2 * self.dataset.num_events)
        return dispatch.waits(model.items.table) and size <= KEPT_BYTES and not model.objective.uses_mask

    def _warn_of_removed(self, result: EvaluationResult) -> None:
        """Once a run: data whose users come back to items are measured by a filter that leaves items in."""
        share = result.removed_targets / max(result.targets, 1)
        if share > TOLERATED_REMOVED and not self.warned_removed and self.collectives.is_main:
            logging.warning(
                "%.1f %% of the targets are items that seen filter %r takes out, and count as misses: where such repeats are "
                'to be predicted, set train_fn.seen_filter = "none"',
                100 * share, self.settings.evaluation.seen_filter,
            )  # fmt: skip
            self.warned_removed = True


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
