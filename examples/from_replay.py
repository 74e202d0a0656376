"""A RePlay script with ``replay`` replaced in its imports: a SasRec on MovieLens-100K, under Lightning's trainer.

    python -m examples.from_replay [FOLDER_OR_ARCHIVE_OF_ML_100K]

Without an argument the data set is downloaded. Needs the extra ``lightning``: pip install '.[lightning]'
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import pandas as pd
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from generative_recommenders.compat.replay.data import FeatureHint, FeatureSource, FeatureType
from generative_recommenders.compat.replay.data.nn import (
    ParquetModule,
    TensorFeatureInfo,
    TensorFeatureSource,
    TensorSchema,
)
from generative_recommenders.compat.replay.nn.agg import SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.lightning import LightningModule
from generative_recommenders.compat.replay.nn.lightning.callback import (
    ComputeMetricsCallback,
    PandasTopItemsCallback,
)
from generative_recommenders.compat.replay.nn.lightning.optimizer import OptimizerFactory
from generative_recommenders.compat.replay.nn.lightning.postprocessor import SeenItemsFilter
from generative_recommenders.compat.replay.nn.lightning.scheduler import LRSchedulerFactory
from generative_recommenders.compat.replay.nn.loss import CE
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.sequential import (
    PositionAwareAggregator,
    SasRec,
    SasRecBody,
    SasRecTransformerLayer,
)
from generative_recommenders.compat.replay.nn.transform.template import make_default_sasrec_transforms
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.lightning.parquet import prepared_tables

WIDTH, LENGTH, HEADS = 64, 50, 2


def encoded_parquet(folder: Path, raw: Path | None) -> tuple[dict[str, Path], int]:
    """What RePlay's own preparation would have written: encoded sequences by split, and the number of items."""
    data = folder / "ml-100k"
    if not data.exists():
        prepare(resolve("ml-100k", raw_path=raw, data_root=folder), data)
    dataset, paths = SequenceDataset.open(data), {}
    for split, table in prepared_tables(dataset, "leave_one_out").items():
        paths[split] = folder / f"{split}.parquet"
        pq.write_table(table, paths[split])
    return paths, dataset.num_items


def item_schema(num_items: int) -> TensorSchema:
    return TensorSchema(
        [
            TensorFeatureInfo(
                "item_id",
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=WIDTH,
                padding_value=num_items,
                cardinality=num_items,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            )
        ]
    )


def sasrec_body(schema: TensorSchema) -> SasRecBody:
    return SasRecBody(
        embedder=SequenceEmbedding(schema=schema),
        embedding_aggregator=PositionAwareAggregator(
            embedding_aggregator=SumAggregator(embedding_dim=WIDTH), max_sequence_length=LENGTH, dropout=0.2
        ),
        attn_mask_builder=DefaultAttentionMask(reference_feature_name=schema.item_id_feature_name, num_heads=HEADS),
        encoder=SasRecTransformerLayer(
            embedding_dim=WIDTH, num_heads=HEADS, num_blocks=2, dropout=0.2, activation="relu"
        ),
        output_normalization=torch.nn.LayerNorm(WIDTH),
    )


def main(
    folder: Path, raw: Path | None = None, max_epochs: int = 4, limit: int | None = None
) -> tuple[dict[str, float], pd.DataFrame]:
    """Test metrics and recommendations. raw: MovieLens-100K. limit: batches of each stage, None for all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, num_items = encoded_parquet(folder, raw)
    schema = item_schema(num_items)
    history = {"query_id": {}, "item_id": {"shape": LENGTH, "padding": num_items}}
    seen = {"train": {"shape": 200, "padding": -1}}
    evaluated = {**history, **seen, "ground_truth": {"shape": 1, "padding": -1}}
    data = ParquetModule(
        batch_size=128,
        metadata={
            "train": {**history, "item_id": {"shape": LENGTH + 1, "padding": num_items}},
            "validate": evaluated,
            "test": evaluated,
            "predict": {**history, **seen},
        },
        transforms=make_default_sasrec_transforms(schema),
        train_path=paths["train"],
        validate_path=paths["validate"],
        test_path=paths["test"],
        predict_path=paths["predict"],
    )
    L.seed_everything(42, verbose=False)
    model = LightningModule(
        SasRec(body=sasrec_body(schema), loss=CE(ignore_index=num_items)),
        optimizer_factory=OptimizerFactory(learning_rate=1e-3),
        lr_scheduler_factory=LRSchedulerFactory(decay_step=10, gamma=0.5),
    )
    postprocessors = [SeenItemsFilter(num_items, seen_items_column="train")]
    metrics = ComputeMetricsCallback(["ndcg", "recall", "coverage"], [10], postprocessors, num_items)
    best = ModelCheckpoint(folder / "checkpoints", monitor="ndcg@10", mode="max")
    top = PandasTopItemsCallback(10, "query_id", "item_id", postprocessors=postprocessors)
    stages = ("train", "val", "test", "predict")
    limits = {} if limit is None else {f"limit_{stage}_batches": limit for stage in stages}
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[metrics, best, top], logger=False, **limits)
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, ckpt_path=best.best_model_path)
    trainer.predict(model, datamodule=data, return_predictions=False, ckpt_path=best.best_model_path)
    return tested, top.get_result()


if __name__ == "__main__":
    metrics, recommendations = main(Path("tmp/from_replay"), Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(metrics, recommendations.head(10), sep="\n")
