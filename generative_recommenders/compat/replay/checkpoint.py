"""RePlay's checkpoints, and runs of this program made of RePlay's models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from generative_recommenders.compat.meta.checkpoint import read_state
from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator, SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.ffn import PointWiseFeedForward, SwiGLUEncoder
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.sequential import QueryTower, SasRec, SasRecTransformerLayer, TwoTower
from generative_recommenders.compat.run import save_model
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.training.trainer import Trainer

_DERIVED = re.compile(r".*\.(scaling|_weight)")
"""RePlay's buffers that follow from sizes."""
_BLOCKS = (
    (r"attention_layers\.(\d+)\.(in|out)_proj[_.](weight|bias)", r"blocks.\1.\2_proj.\3"),
    (r"attention_layernorms\.(\d+)\.(weight|bias)", r"blocks.\1.query_norm.\2"),
    (r"forward_layers\.(\d+)\.linear1\.(weight|bias)", r"blocks.\1.ffn_in.\2"),
    (r"forward_layers\.(\d+)\.linear2\.(weight|bias)", r"blocks.\1.ffn_out.\2"),
    (r"forward_layernorms\.(\d+)\.(weight|bias)", r"blocks.\1.ffn_norm.\2"),
)
"""Parameters of `SasRecTransformerLayer` and their names in the program's SASRec."""


def load_replay_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fills a model of RePlay's form from a checkpoint of RePlay's Lightning module, or of ours.

    RePlay's 1x1 convolutions become linear layers. UserError where names or shapes do not fit the model.
    """
    state = read_state(path, "state_dict", "a checkpoint that Lightning saved")
    renamed = {}
    for key, value in state.items():
        name, convolutions = re.subn(r"\.conv([12])\.", r".linear\1.", re.sub(r"^_?model\.", "", key))
        if not _DERIVED.fullmatch(name):
            renamed[name] = value.squeeze(-1) if convolutions and value.dim() == 3 else value
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error


def save_as_run(
    model: SasRec | TwoTower,
    folder: str | Path,
    run_dir: str | Path,
    item_ids: Sequence[str] | None = None,
    settings: RunSettings | None = None,
) -> Path:
    """Makes the model a run that main.py evaluates, predicts from and trains on; returns the run's folder.

    folder: the prepared data. item_ids: the original id of the model's item 0, 1, ...; by default those in the prepared
    order, as ``ParquetModule(prepared_folder=...)`` numbers them. settings: of everything but the model. UserError for
    a model with further features or custom blocks, which have no counterpart.
    """
    settings = settings or RunSettings()
    dataset = SequenceDataset.open(Path(folder)).with_catalogue(settings.data.catalogue)
    body = model.body.query_tower if isinstance(model, TwoTower) else model.body
    if not _has_counterpart(model, body):
        raise UserError(
            "only a SasRec or TwoTower over item ids alone, of SumAggregator, PositionAwareAggregator, "
            "DefaultAttentionMask, SasRecTransformerLayer, LayerNorm and SwiGLUEncoder(D, 2 D), can become a run"
        )
    embedder: Any = body.embedder
    aggregator: Any = body.embedding_aggregator
    layer: Any = body.encoder
    table = embedder.get_item_weights()
    rows = _rows_of_items(dataset, len(table), item_ids)
    bound = {"train_fn.dataset_name": dataset.manifest.name, "train_fn.item_embedding_dim": table.shape[1]}
    settings = settings.bind(bound | _bindings(model, aggregator, layer))
    trainer = Trainer(settings, dataset, make_split(dataset, settings.data.protocol), Collectives())
    own = trainer.model.state_dict()
    own["items.table"][1:] = table[rows]
    # One row more than events: the table has room for the event to predict, which causal models do not read.
    own["sequence.preprocessor.position"][-len(aggregator.pe.weight) :] = aggregator.pe.weight
    for name, value in body.output_normalization.state_dict().items():  # type: ignore[attr-defined]
        own[f"sequence.encoder.final_norm.{name}"].copy_(value)
    for name, value in layer.state_dict().items():
        (ours,) = (re.sub(theirs, to, name) for theirs, to in _BLOCKS if re.fullmatch(theirs, name))
        own[f"sequence.encoder.{ours}"].copy_(value)
    if isinstance(model, TwoTower):
        # Ours reads ids scaled by sqrt(D), RePlay's as they are: the first layer is scaled with its input, which the
        # RMS norm after it takes out again.
        scale = table.shape[1] ** 0.5
        first = {"WG.weight": 1 / scale, "W1.weight": 1 / scale, "W2.weight": scale, "W2.bias": scale}
        for name, value in model.body.item_tower.encoder.state_dict().items():  # type: ignore[attr-defined]
            factor = first.get(name.removeprefix("sw1."), 1.0)
            own[f"items.tower.encoder.0.{name}"].copy_(value * factor)
    name = f"{dataset.manifest.name}-{type(model).__name__}"
    with RunFolder.create_or_open(str(run_dir), name=name) as run:
        save_model(trainer, run)
        return run.path


def _has_counterpart(model: SasRec | TwoTower, body: QueryTower) -> bool:
    """Whether the program's encoder computes what the model does."""
    aggregator, norm = body.embedding_aggregator, body.output_normalization
    queries = (
        isinstance(body.embedder, SequenceEmbedding)
        and len(body.embedder.feature_embedders) == 1
        and isinstance(aggregator, PositionAwareAggregator)
        and isinstance(aggregator.embedding_aggregator, SumAggregator)
        and isinstance(body.attn_mask_builder, DefaultAttentionMask)
        and isinstance(body.encoder, SasRecTransformerLayer)
        and isinstance(norm, nn.LayerNorm)
        and norm.eps == nn.LayerNorm(1).eps
    )
    if not isinstance(model, TwoTower):
        return queries
    tower = model.body.item_tower
    return (
        queries
        and model.context_merger is None
        and isinstance(tower.encoder, SwiGLUEncoder)
        and tower.encoder.sw1.W2.in_features == 2 * tower.encoder.sw1.W2.out_features
        and isinstance(tower.embedding_aggregator, SumAggregator)
        # Its features are the items' own ids.
        and all(torch.equal(ids.cpu(), torch.arange(len(ids))) for ids in tower.buffers(recurse=False))
    )


def _bindings(
    model: SasRec | TwoTower, aggregator: PositionAwareAggregator, layer: SasRecTransformerLayer
) -> dict[str, Any]:
    """The model as settings."""
    feed_forward: PointWiseFeedForward = layer.forward_layers[0]  # type: ignore[assignment]
    bound = {
        "train_fn.main_module": "SASRec",
        "train_fn.objective": "causal",
        "train_fn.max_sequence_length": len(aggregator.pe.weight),
        "train_fn.gr_output_length": 0,
        "train_fn.dropout_rate": aggregator.dropout.rate,
        "train_fn.input_preprocessor": "LearnablePositionalEmbeddingFromEnd",
        "train_fn.user_embedding_norm": "none",
        "train_fn.item_l2_norm": False,
        "train_fn.interaction_module_type": "DotProduct",
        "train_fn.temperature": 1.0,
        "sasrec_encoder.num_blocks": len(layer.forward_layers),
        "sasrec_encoder.num_heads": layer.num_heads,
        "sasrec_encoder.ffn_hidden_dim": feed_forward.linear1.out_features,
        "sasrec_encoder.ffn_activation_fn": feed_forward.activation.__name__,
        "sasrec_encoder.ffn_dropout_rate": feed_forward.dropout.rate,
        "sasrec_encoder.norm_weights": True,
        "sasrec_encoder.final_norm": True,
    }
    if isinstance(model, TwoTower):
        bound |= {"train_fn.main_module": "TwoTower", "train_fn.negatives_sharing": "block"}
        bound |= {"item_tower.features": ("item_id",), "item_tower.num_blocks": 1}
    return bound


def _rows_of_items(dataset: SequenceDataset, num_rows: int, item_ids: Sequence[str] | None) -> list[int]:
    """The row of each prepared item in the model's table; UserError where the model does not have it."""
    if item_ids is None:
        if num_rows < dataset.num_items:
            raise UserError(f"the model has {num_rows} items, {dataset.folder} {dataset.num_items}: give item_ids")
        return [*range(dataset.num_items)]
    if len(item_ids) > num_rows:
        raise UserError(f"item_ids name {len(item_ids)} items, the model has {num_rows}")
    places = {str(name): row for row, name in enumerate(item_ids)}
    if len(places) < len(item_ids):
        raise UserError(f"item_ids name {len(item_ids)} items, of which {len(places)} differ: give each item one row")
    wanted = dataset.original_item_ids().to_pylist()
    missing = [name for name in wanted if name not in places]
    if missing:
        raise UserError(f"item_ids lack {missing[0]!r} and {len(missing) - 1} more items of {dataset.folder}")
    return [places[name] for name in wanted]
