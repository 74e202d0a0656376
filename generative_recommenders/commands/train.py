"""Training, and the dry run that builds what training builds: what one process does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from generative_recommenders.checkpoint.broadcast import checkpoint_from_main
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.evaluate import (
    check_users_metrics,
    report_is_optional,
    write_users_metrics,
)
from generative_recommenders.commands.setup import (
    Options,
    begin,
    checkpoints_of,
    settings_and_data,
    unlike_published_run,
)
from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.launch import launch, log_failures_to
from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest
from generative_recommenders.distributed.sync import from_main, on_main
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.evaluator import EvaluationResult
from generative_recommenders.evaluation.ranks import Ranks, user_ranks
from generative_recommenders.run import summary as report
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.run.logging import show
from generative_recommenders.run.model_summary import model_summary
from generative_recommenders.run.report.facts import write_facts
from generative_recommenders.run.report.records import read_records
from generative_recommenders.training.debug import step_profiler
from generative_recommenders.training.fine_tuning import initialize
from generative_recommenders.training.trainer import Trainer


def train(
    run_dir: str | Path,
    bindings: str | Sequence[str] = (),
    gin_files: str | Sequence[str] = (),
    data_root: str | Path = "data",
    plugins: str | Sequence[str] = (),
    report: bool = False,
    auto_resume: bool = False,
) -> Path:
    """Trains in this process as ``main.py`` does, and returns the run's folder.

    bindings, gin_files, plugins: as ``--gin_bindings``, ``--gin_config_file`` and ``--plugin``, one or several.
    report: writes ``report.html``. auto_resume: resumes a run that is in the folder, which is refused otherwise; one
    that is finished is left as it is. UserError where training does not end well, with the line printed before.
    """
    given = [(each,) if isinstance(each, str) else tuple(each) for each in (gin_files, bindings, plugins)]
    options = Options(
        given[0], given[1], Path(data_root), str(run_dir), plugins=given[2], report=report,
        verbosity=logging.get_verbosity(), auto_resume=auto_resume,
    )  # fmt: skip
    code = launch(train_worker, (options,), 1)
    if code:
        raise UserError(f"training in {run_dir} ended with exit code {code}")
    return Path(run_dir)


def is_resumed(options: Options) -> bool:
    """Whether an earlier run is resumed; the main process looks."""
    return options.resume or (options.auto_resume and checkpoints_of(options).parent.is_dir())


def train_worker(rank: int, world_size: int, options: Options) -> int:
    """One process of a training run; returns its exit code."""
    collectives = begin(rank, options)
    on_main(collectives, lambda: check_users_metrics(options))
    options = dataclasses.replace(options, resume=from_main(collectives, lambda: is_resumed(options)))
    settings, dataset, split = settings_and_data(options, collectives)
    name = f"{Path(settings.data.dataset_name).name}-{settings.model.main_module}"
    run = on_main(collectives, lambda: RunFolder.create_or_open(options.run_dir, options.resume, name))
    # Hosts share no disk: the other processes know the folder by its name alone.
    with run or contextlib.nullcontext():
        folder = Path(collectives.broadcast_object_json(str(run.path) if run else None))
        store = CheckpointStore(
            folder / "checkpoints", settings.checkpoints.keep_checkpoints, read_only=run is None,
            joins_rows=collectives.world_size == 1,
        )  # fmt: skip
        if run is not None:
            log_failures_to(folder / "train.log")
            logging.info("run folder %s\n%s", folder, report.data_summary(dataset, split))
        trainer = Trainer(settings, dataset, split, collectives, EpochLog.of(run, settings))
        trainer.evaluation.folder = folder
        if options.resume and resume(trainer, store):
            final = from_main(collectives, lambda: final_record(trainer, folder, options))
            if final is not None:
                on_main(collectives, lambda: show_results(trainer, folder, store, final))
                return 0
            trainer.log.truncate_after(trainer.progress.step, trainer.progress.epoch)
        else:
            initialize(settings, trainer.task, trainer.catalogue, dataset, collectives)
        if run is not None:  # only now: a resume that is refused leaves the folder's configuration alone
            resolved = gin_registry.resolved_text(settings)
            run.save_resolved_gin(resolved)
            store.attach(dataset.original_item_ids().combine_chunks(), settings.to_json(), resolved)
        with StopRequest() as stop, step_profiler(folder if options.profile and run else None) as on_step:
            result = trainer.train(store, options.max_steps, lambda: stop.requested, on_step)
        how_to_resume = f"resume with --resume --run_dir={folder}"
        if result is None:
            logging.info("stopped on request after step %d; %s", trainer.progress.step, how_to_resume)
            return INTERRUPTED
        try:
            ranks: dict[str, Ranks] = {}
            with trainer.log.timed("baselines"):
                rows = trainer.evaluation.baselines(ranks)
            if run is not None:
                tested = finish(trainer, run, store, result, rows)
                of_model = user_ranks(dataset, split, result.ranks)
                write_users_metrics(options, dataset, of_model)
                if options.report:
                    write_page(run.path, dataset, split, {settings.model.main_module: of_model, **ranks}, tested)
        except KeyboardInterrupt:
            logging.info("interrupted before the final report; the checkpoint is kept: %s", how_to_resume)
            raise
        return 0


def resume(trainer: Trainer, store: CheckpointStore) -> bool:
    """Resumes from the newest checkpoint; False, and the run starts from its beginning, where there is none."""
    before = from_main(trainer.collectives, lambda: len(store.paths()))
    checkpoint = checkpoint_from_main(trainer.collectives, store.load_newest)
    if checkpoint is None and before:
        raise UserError(
            f"none of the {before} checkpoints in {store.folder} is whole: move the run's folder away to start over"
        )
    if checkpoint is None:
        logging.warning("there is no whole checkpoint in %s: the run starts from its beginning", store.folder)
        trainer.log.truncate_after(0)
        return False
    saved = RunSettings.from_json(from_main(trainer.collectives, checkpoint.settings))
    changed = gin_registry.differences(saved, trainer.settings)
    for name, was, now in changed:
        if name == "train_fn.initialize_from":
            raise UserError(
                f"{name} is {now!r}, and this run began with {was!r}: keep that, or give a new run another --run_dir"
            )
        logging.warning("resuming with %s = %r, which was %r", name, now, was)
    trainer.restore(checkpoint)
    if not changed:  # else the new settings are saved, though no step be left
        trainer.saved_position = checkpoint.position
    logging.info("resumed %s", checkpoint.path)
    return True


def final_record(trainer: Trainer, folder: Path, options: Options) -> dict[str, Any] | None:
    """The results of a resumed run that is finished, where it has all that it is asked for; else None."""
    progress = trainer.progress
    if not trainer.is_done(options.max_steps) or trainer.saved_position != (progress.epoch, progress.step):
        return None
    if options.users_metrics or (options.report and not (folder / "report.html").exists()):
        return None
    last = next(iter(read_records(folder / "metrics.jsonl")[::-1]), {})
    # Releases before 0.2.0 kept no conditions: their runs are scored again.
    whole = last.get("part") == "final" and "conditions" in last
    return last if whole and last.get("step") == progress.step else None


def finish(
    trainer: Trainer,
    run: RunFolder,
    store: CheckpointStore,
    result: EvaluationResult,
    baselines: Mapping[str, Mapping[str, float]],
) -> Path | None:
    """The final record, which makes a run a finished one, the curves, and the table; returns the checkpoint that was
    tested, where one is kept."""
    from generative_recommenders.run.report.pictures import plot_curves  # brings matplotlib

    settings, dataset, progress = trainer.settings, trainer.dataset, trainer.progress
    metrics, conditions = result.metrics(), trainer.evaluation.conditions(result)
    of_model = report.model_rows(settings, metrics, result.high_rated_metrics())
    rows = {**baselines, **of_model, **trainer.evaluation.standard_error_row(result)}
    final = {
        "part": "final",
        "seconds": progress.seconds,
        "model": settings.model.main_module,
        "results": rows,
        "conditions": conditions,
        "split_hash": trainer.split.hash,
        "num_items": dataset.num_items,
        "spent": dict(trainer.log.spent),
        "environment": report.environment(trainer.collectives),
        **report.peak_memory(),
    }
    if result.lists:
        final["list_metrics"] = result.lists
    test = {f"test/{name}": value for name, value in {**metrics, **result.lists}.items()}
    run.write_result(progress.step, test, gin_registry.resolved_values(settings))
    run.flush()  # a finished run that is resumed writes nothing of this again
    run.write_metrics(progress.step, final)
    curves, best = run.path / "curves.png", progress.best_epoch
    try:
        plot_curves(
            report.curve_rows(progress.history), curves, settings.measured_part, run.path.name,
            None if best is None else best + 1,
        )  # fmt: skip
    except UserError as error:  # the numbers are written already
        logging.warning("%s", error)
    return show_results(trainer, run.path, store, final)


def show_results(trainer: Trainer, folder: Path, store: CheckpointStore, final: Mapping[str, Any]) -> Path | None:
    """The table of a run's final record, and where its files are; returns the checkpoint that was tested."""
    checkpoint = store.best_path() or next(iter(store.paths()[::-1]), None)
    show(
        report.final_report(
            final["results"], trainer.dataset, trainer.split, final["conditions"], trainer.progress.best_epoch, folder,
            checkpoint, final.get("list_metrics", {}),
        )
    )  # fmt: skip
    if line := unlike_published_run(trainer.settings, trainer.dataset):
        show(line)
    return checkpoint


def write_page(
    run: Path, dataset: SequenceDataset, split: Split, ranks: Mapping[str, Ranks], checkpoint: Path | None
) -> None:
    """The run's report, and the facts that it is made of."""
    from generative_recommenders.run.report.page import write_report  # brings matplotlib and jinja2

    with report_is_optional(run):
        write_facts(run, dataset, split, ranks, None if checkpoint is None else checkpoint.name)
        logging.info("report: %s", write_report(run))


def dry_run_worker(rank: int, world_size: int, options: Options) -> int:
    """Builds all that training builds, and prints parts, parameter counts and an estimate of memory."""
    collectives = begin(rank, options)
    options = dataclasses.replace(options, resume=from_main(collectives, lambda: is_resumed(options)))
    settings, dataset, split = settings_and_data(options, collectives)
    trainer = Trainer(settings, dataset, split, collectives)
    initialize(settings, trainer.task, trainer.catalogue, dataset, collectives)
    summary_of_parts = model_summary(trainer)
    if rank == 0:
        show(summary_of_parts)
        show(report.data_summary(dataset, split))
    return 0
