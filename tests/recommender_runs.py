"""Runs of untrained models of every kind, that tests of answers share."""

from __future__ import annotations

from pathlib import Path

import torch

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings

MOL = {
    "interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK", "user_embedding_norm": "layer_norm",
    "mol.query_dot_product_groups": 3, "mol.uid_embedding_hash_sizes": (57,),
}  # fmt: skip
CHOICES: dict[str, dict] = {
    **{name: {"main_module": name} for name in ENCODERS.names() if name != "GRU4Rec"},
    "TwoTower": {"main_module": "TwoTower", "item_tower.features": ("item_id", "genres", "year")},
    "MoL with users": MOL,
    "masked": {"objective": "masked"},
    "permuted": {"objective": "permuted"},
    "ratings": {"input_preprocessor": "CombinedItemAndRating"},
    "event features": {"event_features": ("rating", "timestamp")},
    "item norm": {"item_l2_norm": True},
}


def make_run(folder: Path, dataset: SequenceDataset, choice: dict) -> tuple[Path, torch.nn.Module, object]:
    """A run's folder with the checkpoint that a trainer writes of an untrained model."""
    chosen = settings(**{"seen_filter": "history", "negatives_sharing": "block", **choice})
    trainer = Trainer(chosen, dataset, make_split(dataset, "leave_one_out"), Collectives())
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(folder / "run" / "checkpoints")
    store.attach(dataset.original_item_ids().combine_chunks(), chosen.to_json(), "")
    trainer.save(store)
    return folder / "run", trainer.model.eval(), chosen
