"""What one process of a run does: train, evaluate, import a checkpoint, or build and say what was built.

``main.py`` launches these functions, one a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from generative_recommenders.build.parts import Catalogue, build_model
from generative_recommenders.checkpoint.broadcast import checkpoint_from_main
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import load_model
from generative_recommenders.compat.meta.checkpoint import are_numbers, load_meta_checkpoint
from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config.lint import log_notices
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.preparation.folder import locked
from generative_recommenders.data.preparation.prepare import prepare, prepared_path
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.distributed.process_group import (
    is_first_on_host,
    process_collectives,
    process_device,
)
from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest
from generative_recommenders.distributed.sync import from_main, together
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.run import summary as report
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.run.logging import set_up_logging, show
from generative_recommenders.run.model_summary import model_summary
from generative_recommenders.run.plots import plot_curves
from generative_recommenders.training.debug import step_profiler
from generative_recommenders.training.state import check_same_data
from generative_recommenders.training.trainer import Trainer, TrainResult, set_precision

EMBEDDED = "synthetic-books"


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, for every process of a run; default_gin_files act where no gin_files are given."""

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    data_root: Path
    run_dir: str | None
    resume: bool
    max_steps: int | None
    profile: bool
    auto_resume: bool = False
    verbosity: int = logging.INFO
    meta_checkpoint: str | None = None
    default_gin_files: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


def prepared_dataset(name: str, data_root: Path) -> SequenceDataset:
    """The prepared data set, read once against its hash; the embedded one is made on first use, any other must have been
    prepared.
    """
    folder = prepared_path(data_root, name)
    if not folder.exists():
        if name != EMBEDDED:
            raise UserError(
                f"{name} is not prepared in {folder}: run python preprocess_public_data.py --dataset={name}"
            )
        with locked(folder):
            if not folder.exists():  # another process may have made it meanwhile
                logging.info("making the embedded data set %s in %s", name, folder)
                manifest = prepare(resolve(name, raw_path=None, data_root=data_root), folder)
                logging.info("%s", summary(manifest))
    dataset = SequenceDataset.open(folder)
    dataset.verify()
    return dataset


def goes_on(options: Options) -> bool:
    """Whether the run began before; the main process looks."""
    return options.resume or (options.auto_resume and checkpoints_of(options).parent.is_dir())


def shared_dataset(name: str, data_root: Path, collectives: Collectives) -> SequenceDataset:
    """`prepared_dataset` for all processes of a run: made and read against its hash once a host."""
    together(collectives, lambda: prepared_dataset(name, data_root) if is_first_on_host() else None)
    return SequenceDataset.open(prepared_path(data_root, name))


def run_settings(options: Options, collectives: Collectives) -> RunSettings:
    """The settings of the gin files; of a resumed run without any, those of its newest checkpoint; bindings go over both."""
    saved = None
    if options.resume and not options.gin_files:
        saved = from_main(collectives, lambda: saved_settings(options))
    if saved is None:
        files = options.gin_files or options.default_gin_files
        return together(collectives, lambda: gin_registry.load_settings(files, options.bindings)[0])
    return together(
        collectives, lambda: gin_registry.override(RunSettings.from_json(saved), options.bindings)
    )


def check_same_everywhere(
    settings: RunSettings, split: Split, options: Options, collectives: Collectives
) -> None:
    """UserError on every process where one has other data, settings or flags than the main one."""
    own = {"settings": settings.to_json(), "split": split.hash, "max_steps": options.max_steps}
    main = collectives.broadcast_object_json(own)
    mine = f"rank {collectives.rank} of {collectives.world_size}"

    def compare() -> None:
        for name, there, here in gin_registry.differences(RunSettings.from_json(main["settings"]), settings):
            raise UserError(
                f"{mine} has {name} = {here!r}, rank 0 has {there!r}: start all with one configuration"
            )
        if main["max_steps"] != options.max_steps:
            raise UserError(f"{mine} has --max_steps={options.max_steps}, rank 0 has {main['max_steps']}")
        if main["split"] != split.hash:
            raise UserError(
                f"{mine} has other prepared data than rank 0 (split hash {split.hash}, there {main['split']}): "
                "give every host the same"
            )

    together(collectives, compare)


def saved_settings(options: Options) -> dict[str, Any] | None:
    """The settings of the newest checkpoint in --run_dir; None where there is none and --auto_resume allows that."""
    checkpoint = CheckpointStore(checkpoints_of(options), read_only=True).load_newest()
    if checkpoint is None and options.auto_resume:
        return None
    if checkpoint is None:
        raise UserError(
            f"there is no whole checkpoint in {checkpoints_of(options)}: give --gin_config_file to start over"
        )
    return checkpoint.settings()


def checkpoints_of(options: Options) -> Path:
    """The checkpoints of --run_dir; UserError without it."""
    if options.run_dir is None:
        raise UserError("--resume, --auto_resume and --mode=evaluate need --run_dir, the folder of the run")
    return Path(options.run_dir) / "checkpoints"


def train_worker(rank: int, world_size: int, options: Options) -> int:
    """One process of a training run; returns its exit code."""
    set_up_logging(rank == 0, options.verbosity)
    load_plugins(options.plugins)
    keep_freed_memory()
    collectives = process_collectives(process_device())
    options = dataclasses.replace(options, resume=from_main(collectives, lambda: goes_on(options)))
    settings = run_settings(options, collectives)
    resolved = gin_registry.resolved_text(settings)
    log_notices(settings)
    dataset = shared_dataset(settings.data.dataset_name, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    check_same_everywhere(settings, split, options, collectives)
    name = f"{settings.data.dataset_name}-{settings.model.main_module}"
    run = together(
        collectives,
        lambda: (
            RunFolder.create_or_open(options.run_dir, options.resume, name) if collectives.is_main else None
        ),
    )
    with run or contextlib.nullcontext():
        folder = Path(collectives.broadcast_object_json(str(run.path) if run else None))
        store = CheckpointStore(
            folder / "checkpoints", settings.checkpoints.keep_checkpoints, read_only=run is None
        )
        if run is not None:
            logging.info("run folder %s\n%s", folder, report.data_summary(dataset, split))
        trainer = Trainer(settings, dataset, split, collectives, EpochLog.of(run, settings))
        if options.resume:
            resume(trainer, store)
        if run is not None:  # only now: a resume that is refused leaves the folder's configuration alone
            run.save_resolved_gin(resolved)
            store.attach(dataset.original_item_ids().combine_chunks(), settings.to_json(), resolved)
        with StopRequest() as stop, step_profiler(folder if options.profile and run else None) as on_step:
            result = trainer.train(store, options.max_steps, lambda: stop.requested, on_step)
        go_on = f"go on with --resume --run_dir={folder}"
        if not result.finished:
            logging.info("stopped on request after step %d; %s", result.progress.step, go_on)
            return INTERRUPTED
        try:
            rows = trainer.evaluation.baselines()
            if run is not None:
                finish(settings, dataset, split, run, store, result, rows)
        except KeyboardInterrupt:
            logging.info("interrupted before the final report, which the checkpoint is kept for; %s", go_on)
            raise
        return 0


def resume(trainer: Trainer, store: CheckpointStore) -> None:
    before = from_main(trainer.collectives, lambda: len(store.paths()))
    checkpoint = checkpoint_from_main(trainer.collectives, store.load_newest)
    if checkpoint is None and before:
        raise UserError(
            f"none of the {before} checkpoints in {store.folder} is whole: move the run's folder away to start over"
        )
    if checkpoint is None:
        logging.warning("there is no whole checkpoint in %s: the run starts from its beginning", store.folder)
        trainer.log.truncate_after(0)
        return
    saved = RunSettings.from_json(from_main(trainer.collectives, checkpoint.settings))
    for name, was, now in gin_registry.differences(saved, trainer.settings):
        logging.warning("resuming with %s = %r, which was %r", name, now, was)
    trainer.restore(checkpoint)
    logging.info("resumed %s", checkpoint.path)


def finish(
    settings: RunSettings,
    dataset: SequenceDataset,
    split: Split,
    run: RunFolder,
    store: CheckpointStore,
    result: TrainResult,
    rows: Mapping[str, Mapping[str, float]],
) -> None:
    """The final record, the curves, and the table."""
    rows = {**rows, **report.model_rows(settings, result.test, result.high_rated)}
    final = {
        "part": "final",
        "seconds": result.progress.seconds,
        "model": settings.model.main_module,
        "results": rows,
        "conditions": result.conditions,
        "split_hash": split.hash,
        **report.peak_memory(),
    }
    if result.lists:
        final["list_metrics"] = result.lists
    run.write_metrics(result.progress.step, final)
    try:
        part = "test" if settings.data.protocol == "paper" else "validation"
        plot_curves(report.curve_rows(result.progress.history), run.path / "curves.png", part)
    except OSError as error:  # the numbers are written already
        logging.warning("cannot write %s: %s", run.path / "curves.png", error.strerror)
    best = store.load_best()
    checkpoint = best.path if best is not None else next(iter(store.paths()[::-1]), None)
    show(
        report.final_report(
            rows,
            dataset,
            split,
            result.conditions,
            result.progress.best_epoch,
            run.path,
            checkpoint,
            result.lists,
        )
    )


def check_evaluated(
    checkpoint: Checkpoint, settings: RunSettings, dataset: SequenceDataset, split: Split
) -> None:
    """Refuses to score a checkpoint on data other than it was trained on; another protocol may be asked for."""
    trained = RunSettings.from_json(checkpoint.settings())
    same_split = trained.data.protocol == settings.data.protocol
    saved = str(checkpoint.state.get("split_hash" if same_split else "data_hash"))
    check_same_data(saved, split.hash if same_split else dataset.manifest.data_hash)
    items = dataset.original_item_ids().combine_chunks()
    if not checkpoint.item_ids().cast(items.type).equals(items):
        raise UserError(f"{checkpoint.path} was trained on other items than {dataset.folder} holds")


def evaluate_worker(rank: int, world_size: int, options: Options) -> int:
    """Scores the best (else the newest) checkpoint of a run on the test targets; the model is rebuilt from its settings."""
    set_up_logging(rank == 0, options.verbosity)
    load_plugins(options.plugins)
    collectives = process_collectives(process_device())
    store = CheckpointStore(checkpoints_of(options), read_only=True)
    checkpoint = checkpoint_from_main(  # twice: a run that goes on may replace its best one meanwhile
        collectives, lambda: store.load_best() or store.load_best() or store.load_newest()
    )
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {store.folder}")
    settings = RunSettings.from_json(from_main(collectives, checkpoint.settings))
    if options.bindings:
        settings = gin_registry.override(settings, options.bindings)
    log_notices(settings)
    set_precision(settings, collectives.device)
    dataset = shared_dataset(settings.data.dataset_name, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    check_same_everywhere(settings, split, options, collectives)
    together(
        collectives,
        lambda: check_evaluated(checkpoint, settings, dataset, split) if collectives.is_main else None,
    )
    catalogue = Catalogue.of(dataset, split.train_stops, settings.items.category_feature)
    model = build_model(settings, catalogue).to(collectives.device)
    load_model(model, checkpoint)
    evaluation = ModelEvaluation(settings, dataset, split, collectives)
    test = evaluation.test(model)
    rows = {
        **evaluation.baselines(),
        **report.model_rows(settings, test.metrics(), test.high_rated_metrics()),
    }
    if collectives.is_main:
        show(f"{checkpoint.path}, test, full catalogue, {evaluation.conditions(test)}")
        lines = [report.results_table(rows), *report.list_metrics_lines(test.lists)]
        show("\n".join([*lines, "", report.data_summary(dataset, split)]))
    return 0


def import_worker(rank: int, world_size: int, options: Options) -> int:
    """Makes a run whose one checkpoint holds the weights of --meta_checkpoint, under the gin files' settings."""
    set_up_logging(rank == 0, options.verbosity)
    load_plugins(options.plugins)
    if options.meta_checkpoint is None:
        raise UserError("--mode=import needs --meta_checkpoint, a checkpoint of the HSTU authors' program")
    collectives = process_collectives(process_device())
    settings = run_settings(options, collectives)
    dataset = shared_dataset(settings.data.dataset_name, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    trainer = Trainer(settings, dataset, split, collectives)
    item_ids = dataset.original_item_ids().combine_chunks()
    load_meta_checkpoint(trainer.model, options.meta_checkpoint, item_ids if are_numbers(item_ids) else None)
    name = f"{settings.data.dataset_name}-{settings.model.main_module}"
    with RunFolder.create_or_open(options.run_dir, name=name) as run:
        resolved = gin_registry.resolved_text(settings)
        run.save_resolved_gin(resolved)
        store = CheckpointStore(run.checkpoints)
        store.attach(item_ids, settings.to_json(), resolved)
        trainer.save(store)
        show(f"{run.path}: score it with --mode=evaluate, or train on with --resume")
    return 0


def dry_run_worker(rank: int, world_size: int, options: Options) -> int:
    """Builds all that training builds, and prints parts, parameter counts and an estimate of memory."""
    set_up_logging(rank == 0, options.verbosity)
    load_plugins(options.plugins)
    collectives = process_collectives(process_device())
    settings = run_settings(options, collectives)
    log_notices(settings)
    dataset = shared_dataset(settings.data.dataset_name, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    trainer = Trainer(settings, dataset, split, collectives)
    summary_of_parts = model_summary(trainer)
    if rank == 0:
        show(summary_of_parts)
        show(report.data_summary(dataset, split))
    return 0
