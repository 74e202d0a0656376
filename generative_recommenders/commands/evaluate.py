"""Evaluation of a run's checkpoint: what one process does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import torch
from absl import logging

from generative_recommenders.build.parts import Catalogue, build_model
from generative_recommenders.checkpoint.broadcast import checkpoint_from_main, with_rows
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import load_model
from generative_recommenders.commands.comparison import comparison_table
from generative_recommenders.commands.setup import (
    Options,
    begin,
    check_same_everywhere,
    checkpoints_of,
    shared_dataset,
    unlike_published_run,
)
from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config.lint import log_notices
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest, StopRequested
from generative_recommenders.distributed.sync import from_main, on_main
from generative_recommenders.errors import UserError, first_line
from generative_recommenders.evaluation.evaluator import EvaluationResult
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.evaluation.ranks import Ranks, user_ranks
from generative_recommenders.run import summary as report
from generative_recommenders.run.logging import show
from generative_recommenders.run.report.facts import write_facts
from generative_recommenders.training.state import check_same_data
from generative_recommenders.training.step import TABLE
from generative_recommenders.training.trainer import set_precision


class ScoredRun(NamedTuple):
    """A run's checkpoint, scored on the test targets."""

    checkpoint: Checkpoint
    settings: RunSettings
    dataset: SequenceDataset
    split: Split
    evaluation: ModelEvaluation
    test: EvaluationResult

    @property
    def ranks(self) -> Ranks:
        return user_ranks(self.dataset, self.split, self.test.ranks)


def score_run(options: Options, collectives: Collectives) -> ScoredRun:
    """Scores the best (else the newest) checkpoint of ``--run_dir``; the model is rebuilt from its settings.

    StopRequested where it was asked to stop.
    """
    alone = collectives.world_size == 1
    store = CheckpointStore(checkpoints_of(options), read_only=True, joins_rows=alone)
    checkpoint = checkpoint_from_main(collectives, store.load_best_or_newest)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {store.folder}")
    settings = RunSettings.from_json(from_main(collectives, checkpoint.settings))
    if options.bindings:
        settings = gin_registry.override(settings, options.bindings)
    log_notices(settings)
    set_precision(settings, collectives.device)
    dataset = shared_dataset(settings, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    check_same_everywhere(settings, split, options, collectives)

    def check_data() -> None:  # another protocol than in training may be asked for, not other data
        same_split = RunSettings.from_json(checkpoint.settings()).data.protocol == settings.data.protocol
        saved = str(checkpoint.state.get("split_hash" if same_split else "data_hash"))
        check_same_data(saved, split.hash if same_split else dataset.manifest.data_hash)
        items = dataset.original_item_ids().combine_chunks()
        if not checkpoint.item_ids().cast(items.type).equals(items):
            raise UserError(f"{checkpoint.path} was trained on other items than {dataset.folder} holds")

    on_main(collectives, check_data)
    catalogue = Catalogue.of(dataset, split.train_stops, settings.items.category_feature)
    model = build_model(settings, catalogue, collectives).to(collectives.device)
    by_rows = [name for name in checkpoint.row_shapes if name.startswith("model.")]
    load_model(model, with_rows(collectives, checkpoint, {TABLE, *by_rows}, model.items.shard))
    evaluation = ModelEvaluation(settings, dataset, split, collectives)
    evaluation.folder = checkpoints_of(options).parent
    # Opened for the long part alone: a signal before it ends the process at once, and nothing is lost.
    with StopRequest() as stop:
        test = evaluation.test(model, lambda: stop.requested)
    return ScoredRun(checkpoint, settings, dataset, split, evaluation, test)


def evaluate_worker(rank: int, world_size: int, options: Options) -> int:
    """Scores a run, see `score_run`, and another one to compare with where ``--compare`` names it.

    The numbers are shown and go into the run's ``evaluation.json``; each user's rank into ``--users_metrics``. A long
    evaluation that is stopped resumes when it is asked for again.
    """
    check_users_metrics(options)
    collectives = begin(rank, options)
    try:
        scored = score_run(options, collectives)
        other = None
        if options.compare:
            other = score_run(dataclasses.replace(options, run_dir=options.compare), collectives)
    except StopRequested:
        logging.info("stopped on request; the same command resumes with the remaining users")
        return INTERRUPTED
    checkpoint, settings, dataset, split, evaluation, test = scored
    of_baselines: dict[str, Ranks] = {}
    rows = {
        **evaluation.baselines(of_baselines),
        **report.model_rows(settings, test.metrics(), test.high_rated_metrics()),
        **evaluation.standard_errors(test),
    }
    ranks = {settings.model.main_module: scored.ranks, **of_baselines}
    if collectives.is_main:
        run, conditions = checkpoints_of(options).parent, evaluation.conditions(test)
        show(f"{checkpoint.path}, test, full catalogue, {conditions}")
        lines = [report.results_table(rows), *report.list_metrics_lines(test.lists)]
        show("\n".join([*lines, "", report.data_summary(dataset, split)]))
        if line := unlike_published_run(settings, dataset):
            show(line)
        record = {
            "checkpoint": checkpoint.path.name, "results": rows, "list_metrics": test.lists, "conditions": conditions,
            "split_hash": split.hash, "bindings": list(options.bindings),
        }  # fmt: skip
        try:
            with new_file(run / "evaluation.json") as scratch:
                scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except UserError as error:  # a folder that may only be read can be evaluated, too
            logging.warning("%s", error)
        write_users_metrics(options, dataset, scored.ranks)
        if other is not None:
            names = str(options.run_dir), str(options.compare)
            frames = users_frame(dataset, *scored.ranks), users_frame(other.dataset, *other.ranks)
            show("\n" + comparison_table(*frames, names))
        if not options.bindings:  # the report shows the run as it was trained
            keep_facts(run, dataset, split, ranks)
    return 0


def keep_facts(run: Path, dataset: SequenceDataset, split: Split, ranks: Mapping[str, Ranks]) -> bool:
    """Writes the data-set facts for the run's report; one warning, and False, where they cannot be written."""
    try:
        write_facts(run, dataset, split, ranks)
    except Exception as error:  # a report is worth no run
        logging.warning("nothing is kept for the report of %s: %s", run, fault_line(error))
        return False
    return True


def fault_line(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def users_frame(
    dataset: SequenceDataset, users: torch.Tensor, targets: torch.Tensor, ranks: torch.Tensor
) -> pl.DataFrame:
    """``user_id, item_id, rank`` of every test target, by user: for tests of significance between runs.

    users, targets, ranks: ``[n]`` int64, internal ids from 1. The rank counts from 1 and is empty for a miss (a target that is
    no candidate).
    """
    order = users.argsort().numpy()
    of_users, of_items = (pa.array(each.numpy()[order] - 1) for each in (users, targets))
    names = pl.Series("user_id", dataset.original_user_ids().take(of_users).cast(pa.large_string()))
    items = pl.Series("item_id", dataset.original_item_ids().take(of_items).cast(pa.large_string()))
    return pl.DataFrame([names, items, pl.Series("rank", ranks.numpy()[order])]).with_columns(
        pl.when(pl.col("rank") <= dataset.num_items).then(pl.col("rank"))
    )


def check_users_metrics(options: Options) -> None:
    """UserError for a name that does not say how the file is written."""
    if options.users_metrics and Path(options.users_metrics).suffix not in _WRITERS:
        raise UserError(
            f"--users_metrics={options.users_metrics}: the name must end in {', '.join(_WRITERS)}"
        )


def write_users_metrics(options: Options, dataset: SequenceDataset, ranks: Ranks) -> None:
    """Each user's rank into the file of ``--users_metrics``, where it is given."""
    if options.users_metrics:
        path, frame = Path(options.users_metrics), users_frame(dataset, *ranks)
        with new_file(path) as scratch:
            _WRITERS[path.suffix](frame, scratch)
        logging.info("ranks of %d users in %s", len(frame), path)


_WRITERS: dict[str, Callable[[pl.DataFrame, Path], Any]] = {
    ".csv": pl.DataFrame.write_csv,
    ".jsonl": pl.DataFrame.write_ndjson,
    ".parquet": pl.DataFrame.write_parquet,
}
