"""Evaluation of a run's checkpoint: what one process does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from generative_recommenders.data.preparation.folder import check_file, new_file, write_text
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
from generative_recommenders.training.state import check_same_data, check_same_part
from generative_recommenders.training.step import TABLE
from generative_recommenders.training.trainer import set_precision


class OpenedRun(NamedTuple):
    """A run's checkpoint, and the settings and data that it is scored with."""

    folder: Path
    checkpoint: Checkpoint
    settings: RunSettings
    dataset: SequenceDataset
    split: Split


def open_run(options: Options, collectives: Collectives) -> OpenedRun:
    """The best (else the newest) checkpoint of ``--run_dir``, with its settings under the bindings.

    UserError for data other than those it was trained on.
    """
    alone = collectives.world_size == 1
    store = CheckpointStore(checkpoints_of(options), read_only=True, joins_rows=alone)
    checkpoint = checkpoint_from_main(collectives, store.load_best_or_newest)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {store.folder}")
    # At once: a training that goes on beside may remove the checkpoint while the data are read.
    saved = RunSettings.from_json(from_main(collectives, checkpoint.settings))
    item_ids = on_main(collectives, checkpoint.item_ids)
    settings = gin_registry.override(saved, options.bindings) if options.bindings else saved
    log_notices(settings)
    dataset = shared_dataset(settings, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    check_same_everywhere(settings, dataset, split, options, collectives)

    def check_data() -> None:  # another protocol than in training may be asked for, not other data
        same_split = saved.data.protocol == settings.data.protocol
        then = str(checkpoint.state.get("split_hash" if same_split else "data_hash"))
        check_same_data(then, split.hash if same_split else dataset.manifest.data_hash)
        if settings.data.event_features:
            check_same_part(checkpoint, dataset, "columns_hash")
        if settings.uses_item_tower or settings.queries.query_features:
            check_same_part(checkpoint, dataset, "features_hash")
        items = dataset.original_item_ids().combine_chunks()
        if item_ids is not None and not item_ids.cast(items.type).equals(items):
            raise UserError(f"{checkpoint.path} was trained on other items than {dataset.folder} holds")

    on_main(collectives, check_data)
    if collectives.is_main and saved.data.protocol != settings.data.protocol:
        stops = make_split(dataset, saved.data.protocol).train_stops
        if learned := int(((split.test_targets >= 0) & (split.test_targets < stops)).sum()):
            logging.warning(
                "%s was trained under protocol %r, on %d of the %d test targets of %r: its numbers are too good",
                store.folder.parent, saved.data.protocol, learned, split.counts["test_users"], settings.data.protocol,
            )  # fmt: skip
    return OpenedRun(store.folder.parent, checkpoint, settings, dataset, split)


def score_run(run: OpenedRun, collectives: Collectives) -> tuple[ModelEvaluation, EvaluationResult]:
    """Scores the model, rebuilt from its settings, on the test targets. StopRequested where it was asked to stop."""
    folder, checkpoint, settings, dataset, split = run
    set_precision(settings, collectives.device)
    catalogue = Catalogue.of(dataset, split.train_stops, settings.items.category_feature)
    model = build_model(settings, catalogue, collectives).to(collectives.device)
    by_rows = [name for name in checkpoint.row_shapes if name.startswith("model.")]
    load_model(model, with_rows(collectives, checkpoint, {TABLE, *by_rows}, model.items.shard))
    evaluation = ModelEvaluation(settings, dataset, split, collectives)
    evaluation.folder = folder
    # Opened for the long part alone: a signal before it ends the process at once, and nothing is lost.
    with StopRequest() as stop:
        return evaluation, evaluation.test(model, lambda: stop.requested)


def check_comparable(first: OpenedRun, second: OpenedRun) -> None:
    """UserError where the runs rank their targets among other candidates."""
    one, other = (each.dataset.original_item_ids().cast(pa.large_string()) for each in (first, second))
    if not one.equals(other):
        raise UserError(
            f"{second.folder} ranks {len(other):,} items, {first.folder} {len(one):,}, not all of them the same: their "
            "numbers do not compare"
        )
    seen_filter, there = (each.settings.evaluation.seen_filter for each in (first, second))
    if seen_filter != there:
        raise UserError(
            f"{second.folder} has seen filter {there!r}, {first.folder} {seen_filter!r}: their numbers do not compare; "
            "--gin_bindings='train_fn.seen_filter = ...' sets one for both"
        )


def evaluate_worker(rank: int, world_size: int, options: Options) -> int:
    """Scores a run, see `score_run`, and another one to compare with where ``--compare`` names it.

    The numbers are shown and go into the run's ``evaluation.json``; each user's rank into ``--users_metrics``. A long
    evaluation that is stopped resumes when it is asked for again.
    """
    collectives = begin(rank, options)
    on_main(collectives, lambda: check_users_metrics(options))
    opened, other = open_run(options, collectives), None
    if options.compare:
        try:
            other = open_run(dataclasses.replace(options, run_dir=options.compare), collectives)
        except UserError as error:  # which speaks of this run
            raise UserError(f"--compare={options.compare}: {error}") from error
        check_comparable(opened, other)
    try:
        evaluation, test = score_run(opened, collectives)
        tested_other = None if other is None else score_run(other, collectives)[1]
    except StopRequested:
        logging.info(
            "stopped on request; the same command resumes with the remaining users of the run that was being scored"
        )
        return INTERRUPTED
    run, checkpoint, settings, dataset, split = opened
    of_model = user_ranks(dataset, split, test.ranks)
    of_baselines: dict[str, Ranks] = {}
    rows = {
        **evaluation.baselines(of_baselines),
        **report.model_rows(settings, test.metrics(), test.high_rated_metrics()),
        **evaluation.standard_error_row(test),
    }
    if collectives.is_main:
        conditions = evaluation.conditions(test)
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
            write_text(run / "evaluation.json", json.dumps(record, indent=2) + "\n")
        except UserError as error:  # a folder that may only be read can be evaluated, too
            logging.warning("%s", error)
        write_users_metrics(options, dataset, of_model)
        if other is not None and tested_other is not None:
            of_other = user_ranks(other.dataset, other.split, tested_other.ranks)
            frames = users_frame(dataset, *of_model), users_frame(other.dataset, *of_other)
            show("\n" + comparison_table(*frames, (str(run), str(other.folder)), dataset.num_items))
        if not options.bindings:  # the report shows the run as it was trained
            ranks = {settings.model.main_module: of_model, **of_baselines}
            with report_is_optional(run):
                write_facts(run, dataset, split, ranks, checkpoint.path.name)
    return 0


@contextmanager
def report_is_optional(run: Path) -> Iterator[None]:
    """What fails in the block is one warning: the numbers of the run stand without its report."""
    try:
        yield
    except Exception as error:  # whatever a picture fails at, the trained run stands
        logging.debug("the report's fault came from here", exc_info=True)
        logging.warning("the report of %s cannot be written: %s: %s", run, type(error).__name__, first_line(error))


def users_frame(
    dataset: SequenceDataset, users: torch.Tensor, targets: torch.Tensor, ranks: torch.Tensor
) -> pl.DataFrame:
    """``user_id, item_id, rank`` of every test target, by user: for tests of significance between runs.

    users, targets, ranks: ``[n]`` int64, internal ids from 1. The rank counts from 1 and is empty for a miss (a target
    that is no candidate).
    """
    order = users.argsort().numpy()
    of_users, of_items = (pa.array(each.numpy()[order] - 1) for each in (users, targets))
    names = pl.Series("user_id", dataset.original_user_ids().take(of_users).cast(pa.large_string()))
    items = pl.Series("item_id", dataset.original_item_ids().take(of_items).cast(pa.large_string()))
    return pl.DataFrame([names, items, pl.Series("rank", ranks.numpy()[order])]).with_columns(
        pl.when(pl.col("rank") <= dataset.num_items).then(pl.col("rank"))
    )


def check_users_metrics(options: Options) -> None:
    """UserError for a name that does not say how the file is written, and for a place where none can be."""
    if options.users_metrics is None:
        return
    if Path(options.users_metrics).suffix not in _WRITERS:
        raise UserError(f"--users_metrics={options.users_metrics}: the name must end in {', '.join(_WRITERS)}")
    check_file(options.users_metrics, "--users_metrics=")


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
