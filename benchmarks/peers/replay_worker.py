"""RePlay's models under its own Lightning module and Parquet data, started by `compare_peers.py` (replay-rec 0.22)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning as L
import torch
from common import Clock, arguments
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.agg import SumAggregator
from replay.nn.embedding import SequenceEmbedding
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.loss import CE
from replay.nn.mask import DefaultAttentionMask
from replay.nn.sequential import (
    DiffTransformerLayer,
    PositionAwareAggregator,
    SasRec,
    SasRecBody,
    SasRecTransformerLayer,
    TwoTower,
)
from replay.nn.sequential.twotower import FeaturesReader
from replay.nn.transform.template import make_default_sasrec_transforms

flags = arguments()
clock = Clock(flags.started)


class Ticks(L.Callback):
    def on_train_epoch_start(self, trainer, module) -> None:
        clock.begin_epoch()

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        clock.step()

    def on_train_epoch_end(self, trainer, module) -> None:
        clock.end_epoch()


def schema_of(num_items: int) -> TensorSchema:
    sources = [TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")]
    item = TensorFeatureInfo(
        "item_id", is_seq=True, feature_type=FeatureType.CATEGORICAL, embedding_dim=flags.width,
        padding_value=num_items, cardinality=num_items, feature_hint=FeatureHint.ITEM_ID, feature_sources=sources,
    )  # fmt: skip
    return TensorSchema([item])


def model_of(schema: TensorSchema, folder: Path, num_items: int) -> torch.nn.Module:
    sizes = {"embedding_dim": flags.width, "num_heads": 1, "num_blocks": flags.blocks}
    if flags.encoder == "TwoTower":
        reader = FeaturesReader(schema, {"item_id": {}}, str(folder / "items.parquet"))
        return TwoTower.from_params(
            schema, reader, **sizes, max_sequence_length=flags.length, dropout=0.2, hidden_dim=flags.width
        )
    encoder = (
        DiffTransformerLayer(**sizes)
        if flags.encoder == "DiffTransformer"
        else SasRecTransformerLayer(**sizes, dropout=0.2, activation="relu")
    )
    body = SasRecBody(
        embedder=SequenceEmbedding(schema=schema),
        embedding_aggregator=PositionAwareAggregator(
            embedding_aggregator=SumAggregator(embedding_dim=flags.width),
            max_sequence_length=flags.length,
            dropout=0.2,
        ),
        attn_mask_builder=DefaultAttentionMask(reference_feature_name="item_id", num_heads=1),
        encoder=encoder,
        output_normalization=torch.nn.LayerNorm(flags.width),
    )
    return SasRec(body=body, loss=CE(ignore_index=num_items))


def main() -> None:
    folder = flags.folder / "replay"
    num_items = json.loads((folder / "facts.json").read_text())["items"]
    schema = schema_of(num_items)
    history = {"query_id": {}, "item_id": {"shape": flags.length, "padding": num_items}}
    seen = {"train": {"shape": flags.length, "padding": -1}}
    data = ParquetModule(
        batch_size=flags.batch,
        metadata={
            "train": {**history, "item_id": {"shape": flags.length + 1, "padding": num_items}},
            "validate": {**history, **seen},
            "predict": {**history, **seen},
        },
        transforms=make_default_sasrec_transforms(schema),
        train_path=str(folder / "train.parquet"),
        validate_path=str(folder / "predict.parquet"),  # it asks for one; nothing is validated
        predict_path=str(folder / "predict.parquet"),
    )
    model = LightningModule(model_of(schema, folder, num_items), OptimizerFactory(learning_rate=1e-3))
    top = PandasTopItemsCallback(
        10, "query_id", "item_id", postprocessors=[SeenItemsFilter(num_items, seen_items_column="train")]
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    trainer = L.Trainer(max_epochs=2, callbacks=[Ticks(), top], accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=data)
    begun = time.perf_counter()
    trainer.predict(model, datamodule=data, return_predictions=False)
    found = top.get_result()
    clock.report(evaluation=time.perf_counter() - begun, answers=len(found))


if __name__ == "__main__":
    main()
