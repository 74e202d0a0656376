"""Runs of models that another program trained."""

from __future__ import annotations

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.gin import resolved_text
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.training.trainer import Trainer


def save_model(trainer: Trainer, run: RunFolder) -> None:
    """Makes the trainer's model, as it is, the one checkpoint of a new run."""
    resolved = resolved_text(trainer.settings)
    run.save_resolved_gin(resolved)
    store = CheckpointStore(run.checkpoints)
    item_ids = trainer.dataset.original_item_ids().combine_chunks()
    store.attach(item_ids, trainer.settings.to_json(), resolved)
    trainer.save(store)
