"""Callbacks that measure a model's lists and collect what it recommends, with RePlay's arguments.

Postprocessors change scores before they are ranked: ``on_validation(batch, logits)`` and
``on_prediction(batch, logits)`` return new ones; their attribute ``candidates`` is set to the item of each column, None
where column j is item j. An item whose score is -inf is in no metric and no table; `TorchTopItemsCallback` returns it
with that score.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pandas as pd
import polars as pl
import torch
from lightning import Callback, LightningModule, Trainer

from generative_recommenders.data.list_columns import require_columns
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.list_metrics import ListMetrics
from generative_recommenders.objectives.losses.sampled import full_precision
from generative_recommenders.retrieval.selection import largest

METRICS = ("recall", "precision", "ndcg", "map", "mrr", "novelty", "coverage")
Batch = Mapping[str, Any]


class Postprocessor(Protocol):
    """Scores ``[B, C]`` in, changed scores out, in the two stages that rank them."""

    def on_validation(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor: ...

    def on_prediction(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor: ...


class ComputeMetricsCallback(Callback):
    """Logs metrics of the k best items under names like "ndcg@10", for ModelCheckpoint's ``monitor`` too.

    With several loaders the names end in "/dataloader_idx_0", "/dataloader_idx_1" and so on.

    metrics: of recall, precision, ndcg, map, mrr, novelty and coverage; map, ndcg and recall unless given.
    ks: cutoffs, [1, 5, 10, 20] unless given. item_count: items of the catalogue, for coverage alone.
    ground_truth_column: relevant items of each row ``[B, G]``; train_column: items that are not new, for novelty
        ``[B, S]``. Ids below 0, or above both the largest id that is scored and item_count - 1, are padding.
    """

    def __init__(
        self,
        metrics: Sequence[str] | None = None,
        ks: Sequence[int] | None = None,
        postprocessors: Sequence[Postprocessor] | None = None,
        item_count: int | None = None,
        ground_truth_column: str = "ground_truth",
        train_column: str = "train",
    ) -> None:
        super().__init__()
        self.metrics = list(metrics or ("map", "ndcg", "recall"))
        self.ks = sorted(ks or (1, 5, 10, 20))
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"ComputeMetricsCallback: {unknown[0]!r} is none of {', '.join(METRICS)}")
        if self.ks[0] < 1:
            raise UserError(f"ComputeMetricsCallback: ks must be 1 or more, not {self.ks[0]}")
        if "coverage" in self.metrics and item_count is None:
            raise UserError("ComputeMetricsCallback: coverage is a share of item_count: give it")
        self.postprocessors, self.item_count = list(postprocessors or ()), item_count
        self.ground_truth_column, self.train_column = ground_truth_column, train_column
        self._totals: dict[int, ListMetrics] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._totals = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits, candidates = _processed(outputs["logits"], batch, pl_module, self.postprocessors, "on_validation")
        scores, items = top_items(logits, max(self.ks), candidates)
        # Ids of candidates are larger than their number.
        scored = logits.shape[1] if candidates is None else 1 + int(candidates.max())
        num_items = max(scored, self.item_count or 0)
        if dataloader_idx not in self._totals:
            self._totals[dataloader_idx] = ListMetrics(self.ks, num_items, device=logits.device)
        listed = (items + 1).masked_fill(scores == -torch.inf, 0)  # the metrics' ids begin at 1

        def ids_of(name: str) -> torch.Tensor:
            ids = column_of(batch, name, "ComputeMetricsCallback")
            return (ids + 1).masked_fill((ids < 0) | (ids >= num_items), 0)

        seen = ids_of(self.train_column) if "novelty" in self.metrics else None
        self._totals[dataloader_idx].add(listed, ids_of(self.ground_truth_column), seen)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collectives = process_collectives(pl_module.device)
        # Every process makes the same calls, even if it had no batch of a loader, and each may have seen another
        # largest id.
        widths: dict[str, int] = {}
        own_widths = {str(number): own.recommended.shape[1] for number, own in self._totals.items()}
        for each in collectives.gather_object_json(own_widths):
            widths |= {number: max(width, widths.get(number, 0)) for number, width in each.items()}
        for number, width in sorted(widths.items()):
            total = ListMetrics(self.ks, width - 1, device=pl_module.device)
            if (own := self._totals.get(int(number))) is not None:
                total.sums, total.users = own.sums, own.users
                total.recommended[:, : own.recommended.shape[1]] = own.recommended
            total.sum_over_processes(collectives)
            suffix = f"/dataloader_idx_{number}" if len(widths) > 1 else ""
            values = total.compute(self.item_count)
            wanted = {f"{name}@{k}{suffix}": values[f"{name}@{k}"] for name in self.metrics for k in self.ks}
            pl_module.log_dict(wanted, add_dataloader_idx=False, batch_size=1)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class _PredictionCallback(Callback):
    """Keeps a part of the output for each batch of a prediction, on the CPU."""

    def __init__(self, postprocessors: Sequence[Postprocessor] | None = None) -> None:
        super().__init__()
        self.postprocessors = list(postprocessors or ())
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._parts.append(tuple(part.detach().cpu() for part in self.parts(pl_module, outputs, batch)))

    @abstractmethod
    def parts(self, pl_module: LightningModule, outputs: Mapping[str, Any], batch: Batch) -> tuple[torch.Tensor, ...]:
        """What to keep of a batch, one row per query."""

    def predicted(self) -> list[tuple[torch.Tensor, ...]]:
        """The parts of each batch; UserError before the first prediction."""
        if not self._parts:
            raise UserError(f"{type(self).__name__}: nothing was predicted yet: call Trainer.predict first")
        return self._parts

    def collected(self) -> tuple[torch.Tensor, ...]:
        """The parts of all batches, each as one tensor."""
        return tuple(torch.cat(each) for each in zip(*self.predicted()))


class TopItemsCallback(_PredictionCallback):
    """Collects the top_k items of each row of a prediction, best first.

    query_column: the batch's key of the query ids ``[B]``, and their column in the result. item_column, rating_column:
    columns of the items and their scores in the result.
    """

    def __init__(
        self,
        top_k: int,
        query_column: str,
        item_column: str,
        rating_column: str = "rating",
        postprocessors: Sequence[Postprocessor] | None = None,
    ) -> None:
        super().__init__(postprocessors)
        if top_k < 1:
            raise UserError(f"{type(self).__name__}: top_k must be 1 or more, not {top_k}")
        self.top_k, self.query_column, self.item_column = top_k, query_column, item_column
        self.rating_column = rating_column

    def parts(self, pl_module: LightningModule, outputs: Mapping[str, Any], batch: Batch) -> tuple[torch.Tensor, ...]:
        """Items ``[B, k]``, their scores ``[B, k]``, and query ids ``[B]`` where there is a column of them."""
        logits, candidates = _processed(outputs["logits"], batch, pl_module, self.postprocessors, "on_prediction")
        scores, items = top_items(logits, self.top_k, candidates)
        if not self.query_column:
            return items, scores
        return items, scores, column_of(batch, self.query_column, type(self).__name__).flatten()

    def columns(self) -> dict[str, Any]:
        """One row per recommended item, as numpy arrays by name."""
        rows = []
        for items, scores, queries in self.predicted():  # batches with few candidates have fewer columns
            flat = (queries.repeat_interleave(items.shape[1]), items.flatten(), scores.flatten())
            rows.append([values[scores.flatten() != -torch.inf] for values in flat])
        names = (self.query_column, self.item_column, self.rating_column)
        return {name: torch.cat(values).numpy() for name, values in zip(names, zip(*rows))}

    @abstractmethod
    def get_result(self) -> Any:
        """Recommendations of the last prediction."""


class PandasTopItemsCallback(TopItemsCallback):
    """Recommendations as a pandas DataFrame, one row per item."""

    def get_result(self) -> pd.DataFrame:
        return pd.DataFrame(self.columns())


class PolarsTopItemsCallback(TopItemsCallback):
    """Recommendations as a polars DataFrame, one row per item."""

    def get_result(self) -> pl.DataFrame:
        return pl.DataFrame(self.columns())


class SparkTopItemsCallback(TopItemsCallback):
    """Recommendations as a Spark DataFrame, one row per item. spark_session: makes the DataFrame."""

    def __init__(
        self,
        top_k: int,
        query_column: str,
        item_column: str,
        rating_column: str,
        spark_session: Any,
        postprocessors: Sequence[Postprocessor] | None = None,
    ) -> None:
        super().__init__(top_k, query_column, item_column, rating_column, postprocessors)
        self.spark_session = spark_session

    def get_result(self) -> Any:
        columns = self.columns()
        kinds = ("bigint", "bigint", "double")
        schema = ", ".join(f"`{name}` {kind}" for name, kind in zip(columns, kinds))
        rows = list(zip(*(values.tolist() for values in columns.values())))
        return self.spark_session.createDataFrame(rows, schema)


class TorchTopItemsCallback(TopItemsCallback):
    """Recommendations as tensors: items ``[n, k]`` and scores ``[n, k]``, after the query ids ``[n]`` where
    query_column is given."""

    def __init__(
        self,
        top_k: int,
        postprocessors: Sequence[Postprocessor] | None = None,
        query_column: str | None = None,
    ) -> None:
        super().__init__(top_k, query_column or "", "item_id", postprocessors=postprocessors)

    def get_result(self) -> tuple[torch.Tensor, ...]:
        items, scores, *queries = self.collected()
        return (*queries, items, scores)


class HiddenStatesCallback(_PredictionCallback):
    """Collects one of the model's hidden states over a prediction. hidden_state_index: its place among
    "hidden_states"."""

    def __init__(self, hidden_state_index: int) -> None:
        super().__init__()
        self.hidden_state_index = hidden_state_index

    def parts(self, pl_module: LightningModule, outputs: Mapping[str, Any], batch: Batch) -> tuple[torch.Tensor, ...]:
        states = outputs["hidden_states"]
        if not -len(states) <= self.hidden_state_index < len(states):
            raise UserError(
                f"HiddenStatesCallback: the model gives {len(states)} hidden states, none at {self.hidden_state_index}"
            )
        return (states[self.hidden_state_index],)

    def get_result(self) -> torch.Tensor:
        """``[n, ...]`` over all batches of the last prediction."""
        return self.collected()[0]


def top_items(logits: torch.Tensor, k: int, candidates: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and item ids ``[n, min(k, C)]``, best first, the smaller column first among equals. candidates: ``[C]``,
    the item of each column, None where column j is item j."""
    scores, columns = largest(logits, k)
    scores = full_precision(scores)  # numpy has no bfloat16
    return scores, columns if candidates is None else candidates.to(columns.device)[columns]


def column_of(batch: Batch, name: str, who: str) -> torch.Tensor:
    """The batch's column; UserError, in the callback's name, where it has none such."""
    require_columns(list(batch), [name], f"{who}: the batch")
    return batch[name]


def _processed(
    logits: torch.Tensor, batch: Batch, pl_module: LightningModule, postprocessors: Sequence[Postprocessor], stage: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores after the postprocessors' method of this name, and the item of each of their columns, None where column j
    is item j."""
    own = batch.get("candidates_to_score")
    candidates = getattr(pl_module, "candidates_to_score", None) if own is None else own
    for each in postprocessors:
        each.candidates = candidates  # type: ignore[attr-defined]
        logits = getattr(each, stage)(batch, logits)
    return logits, candidates
