"""Runs of untrained models of every kind, that tests of answers share."""

from __future__ import annotations

from pathlib import Path

import torch

from generative_recommenders.build.catalogue import reads_users
from generative_recommenders.build.model import build_model
from generative_recommenders.build.parts import Catalogue
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.checkpoint.weights import data_tensors
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
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
    """A run's folder with one checkpoint of an untrained model."""
    chosen = settings(seen_filter="history", **choice)
    data = Catalogue.of(dataset, make_split(dataset, "leave_one_out").train_stops)
    torch.manual_seed(0)
    model = build_model(chosen, data).eval()
    store = CheckpointStore(folder / "run" / "checkpoints") if (folder / "run").mkdir() is None else None
    assert store is not None
    store.attach(dataset.original_item_ids().combine_chunks(), chosen.to_json(), "")
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    users = dataset.original_user_ids() if reads_users(model) else None
    tensors.update(data_tensors(data.counts, users))
    store.save((0, 0), tensors, {"data": data.facts(model, dataset)})
    return folder / "run", model, chosen
