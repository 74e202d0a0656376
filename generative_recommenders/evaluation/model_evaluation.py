"""Exact evaluation of models and baselines under a run's settings, and the conditions to read its numbers with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl import logging

from generative_recommenders.build.registered import build_part
from generative_recommenders.config.registry import SEEN_FILTERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import Split, training_counts
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.progress import progress_bar
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.baselines import BASELINES
from generative_recommenders.evaluation.evaluator import (
    EvaluationResult,
    Evaluator,
    ProductScores,
    RankedUsers,
    Score,
    never,
)
from generative_recommenders.evaluation.list_metrics import TopLists
from generative_recommenders.evaluation.progress import EvaluationProgress, fingerprint
from generative_recommenders.evaluation.ranks import Ranks, user_ranks
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops import dispatch
from generative_recommenders.types import Batch

TOLERATED_REMOVED = 0.01
"""Share of targets that a seen filter may take out without a warning."""
PROGRESS_FILE = "evaluation-under-way.safetensors"

PROGRESS_MINUTES = 5.0
"""Longest time from one save of an evaluation under way to the next."""
KEPT_BYTES = 1 << 30
"""Largest size of an evaluation's batches that stay on an accelerator."""


class ModelEvaluation:
    """Scores the validation or test targets of a split by a model as it is; UserError where there are no test targets.

    An evaluation of everyone has the metrics of top-k lists too, where ``train_fn.list_metrics_k`` asks for them.
    Targets that training never saw are misses; in protocol "paper" they rank as they are scored, as in the published
    program.

    folder: of the run, where an evaluation that is stopped keeps its ranks, so that the next one of the same weights
    resumes from them to the same numbers; one that makes lists begins anew.
    """

    folder: Path | None = None

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
                f"{settings.data.dataset_name} has no test targets under protocol {settings.data.protocol!r}: its "
                f"longest history has {max(dataset.lengths, default=0)} events; there is nothing to measure a model by"
            )

    def validation(
        self,
        model: SequenceRecommender,
        max_batches: int | None = None,
        stop: Callable[[], bool] = never,
        draw: int = 0,
    ) -> EvaluationResult:
        """The split's validation targets; in protocol "paper" there are none and the test targets are taken.

        max_batches: of all processes together, for a partial evaluation of users drawn by (seed, draw). stop: see
        `Evaluator`.
        """
        sample = None if max_batches is None else (max_batches, draw)
        return self._of_model(model, self.settings.measured_part, sample, stop)

    def test(self, model: SequenceRecommender, stop: Callable[[], bool] = never) -> EvaluationResult:
        """The split's test targets. stop: see `Evaluator`."""
        return self._of_model(model, "test", None, stop)

    def baselines(self, ranks: dict[str, Ranks] | None = None) -> dict[str, dict[str, float]]:
        """Test metrics of the most popular items and of the last item's most frequent successor, fitted on training
        events.

        ranks: an empty mapping, which gets those of single users by baseline.
        """
        columns = (self.dataset.items, self.dataset.offsets, self.split.train_stops, self.dataset.num_items)
        evaluate, rows = self._evaluator("test", None), {}
        for name, kind in BASELINES.items():
            result = evaluate(kind(*columns))
            rows[name] = result.metrics()
            if ranks is not None:
                ranks[name] = user_ranks(self.dataset, self.split, result.ranks)
        return rows

    def standard_errors(self, result: EvaluationResult, part: str = "test") -> dict[str, float]:
        """Standard errors of the metrics of a part, "validation" or "test", of which users were left out; else none."""
        population = self._population(part)
        return {} if result.targets >= population else result.histogram.standard_errors(population)

    def standard_error_row(self, result: EvaluationResult) -> dict[str, dict[str, float]]:
        """A row of standard errors of test metrics, where ``train_fn.eval_users`` leaves users out; else no row."""
        errors = self.standard_errors(result)
        name = f"standard error, {result.targets:,} of {self._population('test'):,} users"
        return {name: errors} if errors else {}

    def _population(self, part: str) -> int:
        targets = self.split.validation_targets if part == "validation" else self.split.test_targets
        return int((targets >= 0).sum())

    def conditions(self, result: EvaluationResult) -> str:
        """The conditions of test numbers: what became of targets that repeat or that training never saw, and next_time
        where the encoder has a time bias."""
        unseen = int(self.split.unseen_test_targets[result.ranks.numpy() > 0].sum())
        shown = f"seen filter {self.settings.evaluation.seen_filter!r}"
        if self.settings.evaluation.seen_filter != "none":
            shown += f" (targets among the seen items, misses: {result.removed_targets:,} of {result.targets:,})"
        rank = "as scored" if self.settings.data.protocol == "paper" else "misses"
        shown += f", targets unseen in training, {rank}: {unseen:,}"
        population = self._population("test")
        if result.targets < population:
            seed = self.settings.schedule.random_seed
            shown += f", a sample of {result.targets:,} of {population:,} users drawn by train_fn.random_seed = {seed}"
        if self.settings.uses_times and self.dataset.timestamps is not None:
            shown += f", next_time {self.settings.value('train_fn.next_time')!r}"
        return shown

    def _evaluator(self, part: str, sample: tuple[int, int] | None, stop: Callable[[], bool] = never) -> Evaluator:
        """part: "validation" or "test". sample: number of batches to draw users for, and of the draw; None for
        everyone."""
        world, settings = self.collectives, self.settings
        targets, missed = measured_targets(settings, self.split, part)
        batch_size = evaluation_batch_size(settings)
        users = np.flatnonzero(targets >= 0)
        if sample is not None and sample[0] * batch_size < len(users):
            # Another sample for each validation, the same on all processes and after a resume.
            seeds = np.random.SeedSequence([settings.schedule.random_seed, sample[1]])
            drawn = np.random.Generator(np.random.Philox(seeds)).permutation(users)
            users = np.sort(drawn[: sample[0] * batch_size])
        window = settings.data.max_sequence_length
        loader = EvaluationLoader(self.dataset, targets, window, batch_size, world.rank, world.world_size, users)
        total = len(loader)

        def shown(left: EvaluationLoader) -> Iterable[dict[str, torch.Tensor]]:
            """A bar on which the batches that a resumed evaluation leaves out are done, and tell nothing of its
            speed."""
            return progress_bar(left, total, "evaluation", total - len(left), world.is_main)

        return Evaluator(
            loader, self.dataset.num_items, self.seen_filter, world, torch.from_numpy(missed),
            settings.evaluation.rating_threshold, shown, stop,
        )  # fmt: skip

    def _of_model(
        self, model: SequenceRecommender, part: str, sample: tuple[int, int] | None, stop: Callable[[], bool]
    ) -> EvaluationResult:
        dataset, settings = self.dataset, self.settings
        evaluator = self._evaluator(part, sample, stop)
        # An accelerator keeps its batches for the next evaluation: it ranks them faster than a host makes them.
        columns = 3 + len(dataset.manifest.kinds)
        window = dataset.num_users * columns * settings.data.max_sequence_length
        small = 8 * (window + 2 * dataset.num_events) <= KEPT_BYTES
        keeps_batches = dispatch.waits(model.items.table) and small and not model.objective.uses_mask
        lists = progress = None
        if sample is None and settings.evaluation.list_metrics_k is not None:
            counts = training_counts(dataset.items, dataset.offsets, self.split.train_stops, dataset.num_items)
            users = torch.from_numpy(evaluator.loader.users) + 1
            lists = TopLists(settings.evaluation.list_metrics_k, dataset.num_items, users, torch.from_numpy(counts))
        elif sample is None and keeps_batches:
            if part not in self.kept:
                self.kept[part] = [users.to(self.collectives.device) for users in evaluator.prepared()]
            evaluator.kept = self.kept[part]
        elif sample is None and self.folder is not None:
            # All that ranks depend on beside the weights.
            hashes = self.split.hash, dataset.manifest.features_hash, dataset.manifest.columns_hash
            facts = part, *hashes, repr(settings.to_json())
            minutes = min(PROGRESS_MINUTES, settings.checkpoints.checkpoint_minutes)
            key = partial(fingerprint, model.state_dict(), facts)
            progress = EvaluationProgress(self.folder / PROGRESS_FILE, key, self.collectives, minutes)
        training = model.training
        model.eval()
        try:
            score = catalogue_scores(model, torch.bfloat16 if settings.evaluation.eval_bf16 else None)
            result = evaluator(score, lists, progress)
        finally:
            model.train(training)
        if sample is None:
            self._warn_of_removed(result)
        return result

    def _warn_of_removed(self, result: EvaluationResult) -> None:
        """Once a run: data whose users come back to items are to be measured by a filter that leaves items in."""
        share = result.removed_targets / max(result.targets, 1)
        if share > TOLERATED_REMOVED and self.collectives.is_main and not self.warned_removed:
            logging.warning(
                "%.1f %% of the targets are items that seen filter %r takes out, and count as misses: where such "
                'repeats are to be predicted, set train_fn.seen_filter = "none"',
                100 * share,
                self.settings.evaluation.seen_filter,
            )
            self.warned_removed = True


@torch.inference_mode()
def catalogue_scores(model: SequenceRecommender, autocast: torch.dtype | None = None) -> Score:
    """Scores ``[n, V]`` of evaluation batches by the model as it is now. autocast: the dtype of its encoder's
    products."""
    snapshot, similarity = model.catalogue(), model.similarity
    embeddings = snapshot.embeddings

    def encode(batch: Batch) -> Queries:
        with dispatch.autocast(embeddings.device, autocast):
            return model.encode_query(batch)

    operands = similarity.operands(embeddings[:0], embeddings)
    if operands is None:
        return torch.inference_mode()(lambda batch: model.score(encode(batch), snapshot))

    @torch.inference_mode()
    def queries(batch: Batch) -> torch.Tensor:
        if batch:
            states = encode(batch).states
        else:  # no users, while other processes ask this one for rows
            model.items.rows(torch.zeros(0, dtype=torch.int64, device=embeddings.device))
            states = embeddings[:0].float()
        operands = similarity.operands(states, embeddings[:0])
        assert operands is not None
        return operands[0]

    return ProductScores(queries, operands[1], model.items.shard, similarity.score_dtype)


def measured_targets(settings: RunSettings, split: Split, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the targets of a part, "validation" or "test", ``[U]``, -1 for users without one or outside the
    sample of ``train_fn.eval_users``; and ``[U]`` bool, which are misses whatever their score."""
    targets, unseen = split.test_targets, split.unseen_test_targets
    if part == "validation":
        targets, unseen = split.validation_targets, split.unseen_validation_targets
    if settings.evaluation.eval_users is not None:
        targets = of_sample(targets, settings.evaluation.eval_users, settings.schedule.random_seed)
    # In protocol "paper" targets that training never saw rank as they are scored.
    return targets, unseen & (settings.data.protocol != "paper")


def evaluation_batch_size(settings: RunSettings) -> int:
    """Users encoded together."""
    size = settings.evaluation.eval_batch_size
    return min(size, settings.evaluation.eval_user_max_batch_size or size)


def of_sample(targets: np.ndarray, users: int, seed: int) -> np.ndarray:
    """``targets [U]`` with -1 for all users but so many of those that have one, the same ones for a seed."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(targets))
    chosen = order[targets[order] >= 0][:users]
    sample = np.full_like(targets, -1)
    sample[chosen] = targets[chosen]
    return sample
