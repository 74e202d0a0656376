"""Tiny settings, histories and training loops that tests of models share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.registry import ENCODERS, Registry
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.batch_transforms import next_token_batch
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.training.optimizers import AdamW, Optimizer
from generative_recommenders.training.step import TrainingStep

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "plugins"
STEMS = ("gru4rec", "bpr", "future", "newest", "cooldown")
load_plugins([str(EXAMPLES / f"{stem}.py") for stem in STEMS])  # tested as the built-in parts are
NUM_ITEMS = 20
LENGTHS = torch.tensor([6, 1, 0, 4])


def contracted(registry: Registry) -> list[str]:
    """Names of the built-in parts of a kind, and of those of `examples/plugins`, which hold the same contract."""
    return [
        name
        for name in registry.names()
        if (plugin := registry[name].plugin) is None or Path(plugin.source).parent == EXAMPLES
    ]


OWNERS = {
    "": "train_fn", "sasrec": "sasrec_encoder", "hstu": "hstu_encoder", "fuxi": "fuxi_encoder",
    "ligr": "ligr_encoder", "transformer": "transformer_encoder",
    "diff_transformer": "diff_transformer_encoder", "item_tower": "item_tower", "sce": "sce",
    "mol": "create_mol_interaction_module", "similarity": "get_similarity_function", "loader": "create_data_loader",
    "weighted_loss": "get_weighted_loss",
}  # fmt: skip
"""Short names of gin's owners."""


def settings(**choices: Any) -> RunSettings:
    """Width 8, two blocks, two heads, no dropout, seven positions; ``owner.name``, see `OWNERS`, or a name of
    ``train_fn``."""
    values = {
        "max_sequence_length": 7,
        "gr_output_length": 2,
        "item_embedding_dim": 8,
        "rating_embedding_dim": 4,
        "dropout_rate": 0.0,
        "sasrec.num_heads": 2,
        "sasrec.ffn_hidden_dim": 8,
        "sasrec.ffn_dropout_rate": 0.0,
        "hstu.num_heads": 2,
        "hstu.dqk": 4,
        "hstu.dv": 4,
        "fuxi.num_heads": 2,
        "fuxi.dqk": 4,
        "fuxi.dv": 4,
        "ligr.num_heads": 2,
        "ligr.ffn_multiply": 2,
        "ligr.dropout_rate": 0.0,
        "diff_transformer.num_heads": 2,
        "transformer.num_heads": 2,
        "transformer.ffn_hidden_dim": 8,
        "transformer.dropout_rate": 0.0,
        "mol.query_dot_product_groups": 2,
        "mol.item_dot_product_groups": 2,
        "mol.dot_product_dimension": 4,
        "mol.query_hidden_dim": 8,
        "mol.gating_query_hidden_dim": 8,
        "mol.gating_item_hidden_dim": 8,
        "mol.gating_qi_hidden_dim": 8,
        **choices,
    }
    owned = {name.rpartition(".")[::2]: value for name, value in values.items()}
    return RunSettings().bind({f"{OWNERS[owner]}.{name}": value for (owner, name), value in owned.items()})


def catalogue(**changes: Any) -> Catalogue:
    return dataclasses.replace(Catalogue(NUM_ITEMS, True, True, torch.arange(1, NUM_ITEMS + 1)), **changes)


def histories() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """ids ``[4, 7]`` of `LENGTHS` and events; one row is empty, none fills its columns."""
    generator = torch.Generator().manual_seed(3)
    real = torch.arange(7) < LENGTHS[:, None]
    ids = torch.randint(1, NUM_ITEMS + 1, (4, 7), generator=generator) * real
    times = torch.randint(1, 10**6, (4, 7), generator=generator).sort(1).values * real
    ratings = torch.randint(1, 6, (4, 7), generator=generator) * real
    return ids, {"ratings": ratings, "timestamps": times, "next_timestamps": torch.full((4,), 2 * 10**6)}


CE = {"loss_module": "CE", "temperature": 0.1, "item_l2_norm": True}
SAMPLED = {"num_negatives": 16, "negatives_sharing": "block", "temperature": 0.1, "item_l2_norm": True}
EASY: dict[str, dict[str, Any]] = {
    **{name: {**CE, "main_module": name} for name in ENCODERS.names()},
    "TwoTower": {**SAMPLED, "main_module": "TwoTower", "sampling_strategy": "local"},
    "CombinedItemAndRating": {**CE, "input_preprocessor": "CombinedItemAndRating"},
    "MoL": {
        **SAMPLED,
        "sampling_strategy": "local",
        "interaction_module_type": "MoL",
        "top_k_method": "MoLBruteForceTopK",
        "user_embedding_norm": "layer_norm",
        "loss_weights": {"mi_loss": 0.001},
        "temperature": 1.0,
        "item_l2_norm": False,
    },
    "SCE": {**CE, "loss_module": "SCE", "sce.n_buckets": 8, "sce.bucket_size_x": 32, "sce.bucket_size_y": 16},
    "causal_last": {**CE, "objective": "causal_last"},
    "future": {**CE, "objective": "future"},
    "masked": {**CE, "objective": "masked", "mask_probability": 0.3},
    "permuted": {**CE, "objective": "permuted", "mask_probability": 0.3},
    "replaced": {**CE, "objective": "replaced", "mask_probability": 0.3, "discriminator_weight": 1.0},
    "replaced, tied": {
        **CE,
        "objective": "replaced",
        "mask_probability": 0.3,
        "discriminator_weight": 1.0,
        "tie_discriminator": True,
        "fakes_from": "catalogue",
    },
}
"""Configurations that learn ten histories by heart, by name."""


def ten_users() -> dict[str, torch.Tensor]:
    """Loader columns of ten users with 4 to 8 events; each history is a walk of its own through the items."""
    lengths = torch.tensor([8, 7, 6, 5, 4, 8, 7, 6, 5, 8])
    generator = torch.Generator().manual_seed(11)
    walks = torch.stack([torch.randperm(NUM_ITEMS, generator=generator)[:8] + 1 for _ in range(10)])
    real = torch.arange(8) < lengths[:, None]
    columns = {
        "item_ids": walks,
        "ratings": walks % 5 + 1,
        "timestamps": torch.arange(8).expand(10, 8) + 1000,
    }
    return {
        "user_ids": torch.arange(1, 11),
        "lengths": lengths,
        **{name: values * real for name, values in columns.items()},
    }


def training_step(chosen: RunSettings, data: Catalogue, seed: int = 0, learning_rate: float = 1e-2) -> TrainingStep:
    torch.manual_seed(seed)
    task = build_task(chosen, data)
    task.seed = seed
    table = task.model.items.table
    dense = [parameter for parameter in task.parameters() if parameter is not table]
    return TrainingStep(task, Optimizer(dense, table, AdamW(learning_rate, 0.0)), Collectives())


def loaded(columns: dict[str, torch.Tensor], first_row: int = 0, first_token: int = 0) -> LoadedBatch:
    """Columns as a loader's batch."""
    return LoadedBatch(columns, 0, first_row, first_token, int((columns["lengths"] - 1).sum()))


def overfit(name: str, steps: int, learning_rate: float) -> tuple[float, float]:
    """Share of the ten users whose last item comes first, before and after training on all of their events."""
    chosen = settings(**{"item_embedding_dim": 16, "sasrec.ffn_hidden_dim": 16, **EASY[name]})
    step, columns = training_step(chosen, catalogue(), learning_rate=learning_rate), ten_users()
    before = last_item_first(step.task.model, columns)
    for number in range(steps):
        step(loaded(columns), number)
    return before, last_item_first(step.task.model, columns)


def last_item_first(model: SequenceRecommender, columns: dict[str, torch.Tensor]) -> float:
    model.eval()
    batch = next_token_batch(columns)
    lengths = batch["past_lengths"]
    history = {
        "user_ids": columns["user_ids"],
        "lengths": lengths,
        "next_timestamps": batch["next_timestamps"],
        **{name: batch[f"past_{stem}"] for name, stem in (("item_ids", "ids"), ("ratings", "ratings"))},
        "timestamps": batch["past_timestamps"],
    }
    with torch.no_grad():
        best = model.score(model.encode_query(history), model.catalogue()).argmax(1) + 1
    model.train()
    last = columns["item_ids"].gather(1, columns["lengths"][:, None] - 1)[:, 0]
    return (best == last).float().mean().item()
