"""Common set-up of a run's processes: options, prepared data, and settings that all agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config import published_runs
from generative_recommenders.config.lint import log_notices
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.registry import ENCODERS, ITEM_EMBEDDINGS, named_top_k
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.preparation.folder import locked
from generative_recommenders.data.preparation.prepare import find_prepared, prepare, prepared_path
from generative_recommenders.data.readers.events import RawRatings
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
from generative_recommenders.distributed.sync import from_main, raise_on_all_ranks
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import set_up_logging

EMBEDDED = "synthetic-books"
DEFAULT_CONFIG = f"configs/{EMBEDDED}/sasrec.gin"


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, for every process of a run."""

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    data_root: Path
    run_dir: str | None = None
    resume: bool = False
    max_steps: int | None = None
    profile: bool = False
    auto_resume: bool = False
    verbosity: int = logging.INFO
    meta_checkpoint: str | None = None
    plugins: tuple[str, ...] = ()
    users_metrics: str | None = None
    report: bool = True
    compare: str | None = None


def begin(rank: int, options: Options) -> Collectives:
    """Logging, plug-ins and memory of one process of a run; returns how it talks to the others."""
    set_up_logging(rank == 0, options.verbosity)
    load_plugins(options.plugins)
    keep_freed_memory()
    return process_collectives(process_device())


def prepared_dataset(name: str, data_root: Path) -> SequenceDataset:
    """The prepared data set of a name or path, read once against its hash; the embedded one is made on first use, any
    other must have been prepared.
    """
    folder = prepared_path(data_root, EMBEDDED)
    if name == EMBEDDED and not folder.exists():  # else nothing is written: the disk may be read-only
        with locked(data_root / "raw" / EMBEDDED):  # see `commands.preprocess`
            prepare_once(folder, lambda: resolve(name, data_root=data_root))
    dataset = SequenceDataset.open(find_prepared(name, data_root))
    dataset.verify()
    return dataset


def prepare_once(folder: Path, raw: Callable[[], RawRatings]) -> None:
    """Prepares a folder where there is none yet."""
    if folder.exists():
        return
    with locked(folder):
        if not folder.exists():  # another process may have made it meanwhile
            logging.info("preparing %s", folder)
            logging.info("%s", summary(prepare(raw(), folder)))


def shared_dataset(settings: RunSettings, data_root: Path, collectives: Collectives) -> SequenceDataset:
    """`prepared_dataset` for all processes of a run: made and read against its hash once a host."""
    name = settings.data.dataset_name
    # The others of a host wait in this exchange, and then find what the first one has made and verified.
    raise_on_all_ranks(collectives, lambda: prepared_dataset(name, data_root) if is_first_on_host() else None)
    return SequenceDataset.open(find_prepared(name, data_root)).with_catalogue(settings.data.catalogue)


def run_settings(options: Options, collectives: Collectives) -> RunSettings:
    """The settings of the gin files; of a resumed run without any, those of its newest checkpoint; bindings go over
    both."""
    saved = None

    def newest() -> dict[str, Any] | None:
        found = CheckpointStore(checkpoints_of(options), read_only=True).newest_settings()
        if found is None and not options.auto_resume:
            raise UserError(
                f"there is no whole checkpoint in {checkpoints_of(options)}: give --gin_config_file to start over"
            )
        return found

    if options.resume and not options.gin_files:
        saved = from_main(collectives, newest)

    def settings() -> RunSettings:
        if saved is None:
            given = gin_registry.load_settings(options.gin_files or (DEFAULT_CONFIG,), options.bindings)
        else:
            given = gin_registry.override(RunSettings.from_json(saved), options.bindings)
        # An unknown name, or an option without a value, is told before data are read.
        named_top_k(given.model.top_k_method)
        if given.encoder_name != given.model.main_module:
            ENCODERS.named(given.encoder_name, "item_tower.query_module")
        ITEM_EMBEDDINGS[given.items.embedding_module_type]  # which an encoder that brings its own does not choose
        for registry, name in given.named_parts().items():
            registry[name]
        for part in given.chosen_parts():
            part.option_values(given.part_options(part))
        return given

    return raise_on_all_ranks(collectives, settings)


def settings_and_data(options: Options, collectives: Collectives) -> tuple[RunSettings, SequenceDataset, Split]:
    """Settings and data of a run, the same on every process."""
    settings = run_settings(options, collectives)
    log_notices(settings)
    dataset = shared_dataset(settings, options.data_root, collectives)
    split = make_split(dataset, settings.data.protocol)
    check_same_everywhere(settings, dataset, split, options, collectives)
    return settings, dataset, split


def unlike_published_run(settings: RunSettings, dataset: SequenceDataset) -> str | None:
    """`config.published_runs.differences` of a run on these data."""
    manifest = dataset.manifest
    tie_order = manifest.choices.get("tie_order") if manifest.statistics.get("tied_events") else None
    unknown = int(bool(dataset.feature_specs("item")))  # of a folder that does not say
    return published_runs.differences(settings, tie_order, manifest.counts.get("unrated_items", unknown) > 0)


def check_same_everywhere(
    settings: RunSettings, dataset: SequenceDataset, split: Split, options: Options, collectives: Collectives
) -> None:
    """UserError on every process where one has other data, settings or flags than the main one."""
    manifest = dataset.manifest
    hashes = {
        "split hash": split.hash, "features hash": manifest.features_hash, "columns hash": manifest.columns_hash,
    }  # fmt: skip
    own = {"settings": settings.to_json(), "hashes": hashes, "max_steps": options.max_steps}
    main = collectives.broadcast_object_json(own)
    mine = f"rank {collectives.rank} of {collectives.world_size}"

    def compare() -> None:
        for name, there, here in gin_registry.differences(RunSettings.from_json(main["settings"]), settings):
            raise UserError(f"{mine} has {name} = {here!r}, rank 0 has {there!r}: start all with one configuration")
        if main["max_steps"] != options.max_steps:
            raise UserError(f"{mine} has --max_steps={options.max_steps}, rank 0 has {main['max_steps']}")
        for name, here in hashes.items():
            if here != main["hashes"][name]:
                raise UserError(
                    f"{mine} has other prepared data than rank 0 ({name} {here}, there {main['hashes'][name]}): give "
                    "every host the same"
                )

    raise_on_all_ranks(collectives, compare)


def checkpoints_of(options: Options) -> Path:
    """The checkpoints of --run_dir; UserError without it."""
    if options.run_dir is None:
        raise UserError("--resume, --auto_resume and --mode=evaluate need --run_dir, the folder of the run")
    return Path(options.run_dir) / "checkpoints"
