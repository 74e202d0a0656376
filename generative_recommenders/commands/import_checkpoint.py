"""Import of a checkpoint of the HSTU authors' program as a run."""

from __future__ import annotations

from pathlib import Path

from generative_recommenders.commands.setup import Options, begin, settings_and_data
from generative_recommenders.compat.meta.checkpoint import are_numbers, load_meta_checkpoint
from generative_recommenders.compat.run import save_model
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.logging import show
from generative_recommenders.training.trainer import Trainer


def import_worker(rank: int, world_size: int, options: Options) -> int:
    """Makes a run whose one checkpoint holds the weights of --meta_checkpoint, under the gin files' settings."""
    collectives = begin(rank, options)
    if options.meta_checkpoint is None:
        raise UserError("--mode=import needs --meta_checkpoint, a checkpoint of the HSTU authors' program")
    if world_size > 1:
        raise UserError("--mode=import runs in one process: start it without torchrun and srun")
    settings, dataset, split = settings_and_data(options, collectives)
    trainer = Trainer(settings, dataset, split, collectives)
    item_ids = dataset.original_item_ids().combine_chunks()
    load_meta_checkpoint(trainer.model, options.meta_checkpoint, item_ids if are_numbers(item_ids) else None)
    name = f"{Path(settings.data.dataset_name).name}-{settings.model.main_module}"
    with RunFolder.create_or_open(options.run_dir, name=name) as run:
        save_model(trainer, run)
        show(f"{run.path}: score it with --mode=evaluate, or train on with --resume")
    return 0
