"""Recommendations of a trained run: histories in the users' own ids in, ranked items in the same ids out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from absl import logging

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.parts import build_model
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import data_facts, item_counts, load_model, user_ids
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.retrieval.selection import largest

Output = Literal["pandas", "polars", "torch"]
MAX_USERS = 512
"""Users encoded at a time."""
MAX_SCORES = 1 << 25
"""Scores held at a time: 128 MiB."""


@dataclass(frozen=True)
class _Rows:
    """Histories as a model reads them. users: as given, ``[B]``. batch: columns of an evaluation loader. seen: for each user,
    internal ids of everything in the history, also what is older than the window."""

    users: list[Any]
    batch: dict[str, torch.Tensor]
    seen: list[np.ndarray]


class Recommender:
    """A trained model that answers for users, known to it or new. Made by `load`.

    settings: of the run. model: in evaluation mode. item_ids: ``[V]`` original ids as text, row i is internal id i + 1.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: SequenceRecommender,
        item_ids: pa.Array,
        known_users: pa.Array | None = None,
        counts: torch.Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.model = settings, model.eval().requires_grad_(False)
        self.item_ids, self.known_users, self.counts = item_ids.cast(pa.large_string()), known_users, counts
        self.max_length = settings.data.max_sequence_length
        encoder = model.sequence.encoder
        facts = facts or {}
        read = {each["name"] for each in facts.get("event_features", {}).values()}
        timed = bool(facts.get("has_timestamps", False)) and bool(getattr(encoder, "timed", False))
        self.needs_timestamps = timed or "timestamps" in read
        self.uses_next_time = timed and getattr(encoder, "next_time", None) == "given"
        self.needs_ratings = hasattr(model.sequence.preprocessor, "rating") or "ratings" in read
        self.event_columns: list[Mapping[str, Any]] = list(facts.get("event_columns", ()))
        self._numeric_items = False
        with torch.no_grad():
            self.snapshot = model.catalogue()

    @classmethod
    def load(cls, run: str | Path, device: str = "auto", plugins: Sequence[str] = ()) -> Recommender:
        """The best checkpoint of a run (else the newest); the training data are not needed.

        run: the run's folder. device: "auto" takes a GPU if there is one. plugins: files or modules that register parts of the
        run's own. UserError: no checkpoint, or one that needs a plug-in.
        """
        load_plugins([str(each) for each in plugins])
        folder = Path(run) / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{run} is no folder of a run: it has no checkpoints")
        store = CheckpointStore(folder, read_only=True)
        checkpoint = store.load_best() or store.load_newest()
        if checkpoint is None:
            raise UserError(f"there is no whole checkpoint in {folder}")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        return cls.of_checkpoint(checkpoint, torch.device(name))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, device: torch.device) -> Recommender:
        """The model of one checkpoint."""
        settings = RunSettings.from_json(checkpoint.settings())
        ids, facts = checkpoint.item_ids(), data_facts(checkpoint)
        model = build_model(settings, Catalogue.of_facts(facts, len(ids), checkpoint.tensors))
        load_model(model, checkpoint)
        return cls(settings, model.to(device), ids, user_ids(checkpoint), item_counts(checkpoint), facts)

    # -- answers ------------------------------------------------------------------------------------------------

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Sequence[Any] | Mapping[Any, Sequence[Any]] | None = None,
        at: Any = None,
        fallback: Literal["popular"] | None = None,
        output: Output = "pandas",
    ) -> Any:
        """The k best items of each user.

        histories: a DataFrame (pandas or polars) of ``user_id, item_id`` and, where the model reads them, ``rating`` and
        ``timestamp`` (seconds; events are sorted by it), or a mapping of each user to items, oldest first. exclude_seen: no
        item of the history is recommended. candidates: the only items that may be, for all users or by user. at: the time of
        the request in seconds since 1970, which a model of ``next_time = "given"`` reads. fallback: what users with no
        known item get; otherwise they are left out.

        Returns a frame ``user_id, item_id, rank, score``, best first; or, as "torch", scores and internal ids ``[B, k]``.
        Equal scores are ranked by item id. Unknown items are dropped and counted in a warning.
        """
        if k < 1:
            raise UserError(f"k must be 1 or more, got {k}")
        users, values, ids = [], [], []
        allowed = None if candidates is None or isinstance(candidates, Mapping) else self.mask(candidates)
        for rows in self._rows(histories, at, keep_empty=fallback == "popular"):
            mask = allowed
            if isinstance(candidates, Mapping):
                mask = torch.stack([self.mask(candidates.get(user, ())) for user in rows.users])
            best, found = self.best(rows.batch, k, rows.seen if exclude_seen else None, mask)
            users += rows.users
            values.append(best)
            ids.append(found)
        scores = torch.cat(values) if values else torch.empty(0, k)
        items = torch.cat(ids) if ids else torch.empty(0, k, dtype=torch.int64)
        if output == "torch":
            return scores, items
        return self._frame(users, items, scores, output)

    def best(
        self,
        batch: dict[str, torch.Tensor],
        k: int,
        seen: Sequence[np.ndarray] | None = None,
        allowed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and internal ids ``[B, k]`` of the best items for a batch of an evaluation loader's columns.

        seen: internal ids that are left out, by row. allowed: ``[V]`` or ``[B, V]`` bool, the candidates. An empty history gets
        the most popular items. Places without an item have minus infinity and id 0.
        """
        with torch.no_grad():
            scores = self.model.score(self.model.encode_query(batch), self.snapshot).float().cpu()
        empty = batch["lengths"] == 0
        if empty.any():
            scores[empty] = self._popularity()
        for row, left_out in enumerate(seen or ()):
            scores[row, torch.from_numpy(left_out - 1)] = -torch.inf
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        values, columns = largest(scores, k)
        return values, (columns + 1).masked_fill(values == -torch.inf, 0)

    def score(self, histories: Any, candidates: Sequence[Any], *, at: Any = None) -> pd.DataFrame:
        """Scores of the candidates for each user: a frame with a row a user and a column an item; unknown items are refused."""
        ids = torch.from_numpy(self._internal(candidates)[0])
        if (ids == 0).any():
            unknown = candidates[int((ids == 0).nonzero()[0, 0])]
            raise UserError(f"candidate {unknown!r} is no item that the model was trained on")
        users: list[Any] = []
        scores = []
        for rows in self._rows(histories, at):
            with torch.no_grad():
                scores.append(self.model.score(self.model.encode_query(rows.batch), ids).float().cpu())
            users += rows.users
        values = torch.cat(scores).numpy() if scores else np.empty((0, len(ids)), np.float32)
        return pd.DataFrame(values, index=pd.Index(users, name="user_id"), columns=list(candidates))

    def embed(self, histories: Any, *, at: Any = None) -> pd.DataFrame:
        """States that items are scored against: a frame with a row a user."""
        users: list[Any] = []
        states = []
        for rows in self._rows(histories, at):
            with torch.no_grad():
                states.append(self.model.encode_query(rows.batch).states.float().cpu())
            users += rows.users
        values = torch.cat(states).numpy() if states else np.empty((0, 0), np.float32)
        return pd.DataFrame(values, index=pd.Index(users, name="user_id"))

    def item_embeddings(self) -> pd.DataFrame:
        """Items as scored: a frame with a row an item, by original id."""
        index = pd.Index(self.item_ids.to_pylist(), name="item_id")
        return pd.DataFrame(self.snapshot.embeddings.float().cpu().numpy(), index=index)

    def similar_items(self, items: Sequence[Any], k: int = 10) -> pd.DataFrame:
        """The k other items of the largest cosine of embeddings: a frame ``item_id, similar_id, rank, score``."""
        ids = self._internal(items)[0]
        if (ids == 0).any():
            raise UserError(
                f"{items[int(np.flatnonzero(ids == 0)[0])]!r} is no item that the model was trained on"
            )
        every = torch.nn.functional.normalize(self.snapshot.embeddings.float().cpu(), dim=-1)
        own = torch.from_numpy(ids) - 1
        cosines = every[own] @ every.T
        cosines[torch.arange(len(own)), own] = -torch.inf
        best, columns = largest(cosines, k)
        frame = self._frame(list(items), (columns + 1).masked_fill(best == -torch.inf, 0), best, "pandas")
        return frame.rename(columns={"user_id": "item_id", "item_id": "similar_id"})

    @property
    def batch_size(self) -> int:
        """Users whose scores of the whole catalogue fit the memory that is set aside for them."""
        return max(1, min(MAX_USERS, MAX_SCORES // max(1, len(self.item_ids))))

    # -- histories ----------------------------------------------------------------------------------------------

    def _rows(self, histories: Any, at: Any, keep_empty: bool = False) -> Iterator[_Rows]:
        """Histories in internal ids, some users at a time; users with no known item are counted and left out unless kept."""
        frame = _as_frame(histories)
        needed = ["rating"] * self.needs_ratings + ["timestamp"] * self.needs_timestamps
        needed += [each["name"] for each in self.event_columns]
        missing = [name for name in needed if name not in frame.columns]
        if missing:
            raise UserError(
                f"the model reads {' and '.join(missing)} of each event, and the histories have no such column"
            )
        self._numeric_items = frame["item_id"].dtype.is_integer()
        ids, unknown = self._internal(frame["item_id"])
        frame = frame.with_columns(pl.Series("_item", ids), pl.int_range(pl.len()).alias("_place"))
        frame = frame.with_columns(_event_column(frame[each["name"]], each) for each in self.event_columns)
        if "timestamp" in frame.columns:
            frame = frame.sort("timestamp", maintain_order=True)
        order = frame.sort("_place")["user_id"].unique(maintain_order=True)
        known = frame.filter(pl.col("_item") > 0)
        lost = len(order) - known["user_id"].n_unique()
        if unknown:
            logging.warning("%d events of items that the model does not know are dropped", unknown)
        if lost and not keep_empty:
            logging.warning("%d users have no item that the model knows and are left out", lost)
        if self.uses_next_time and at is None and len(known):
            logging.warning(
                "the time of the request is not given (at=): the time of each user's last event is taken"
            )
        groups = {
            key[0]: part
            for key, part in known.partition_by("user_id", as_dict=True, maintain_order=True).items()
        }
        users = [user for user in order.to_list() if keep_empty or user in groups]
        for start in range(0, len(users), self.batch_size):
            some = users[start : start + self.batch_size]
            yield self._batch(some, [groups.get(user) for user in some], at)

    def _batch(self, users: list[Any], parts: list[pl.DataFrame | None], at: Any) -> _Rows:
        """Columns of the last events of each user, right-padded to the model's window."""
        shape = (len(users), self.max_length)
        kept = [part.tail(self.max_length) if part is not None else None for part in parts]
        lengths = torch.tensor([0 if part is None else len(part) for part in kept])
        sources: dict[str, tuple[str, type]] = {"item_ids": ("_item", np.int64)}
        if self.needs_ratings:
            sources["ratings"] = ("rating", np.float32)
        if self.needs_timestamps:
            sources["timestamps"] = ("timestamp", np.int64)
        for each in self.event_columns:
            sources[each["name"]] = (each["name"], np.int64 if each["kind"] != "numerical" else np.float32)
        batch = {"lengths": lengths, "user_ids": torch.from_numpy(self._known(users))}
        for name, (column, kind) in sources.items():
            values: np.ndarray = np.zeros(shape, kind)
            for row, part in enumerate(kept):
                if part is not None:
                    values[row, : len(part)] = part[column].to_numpy()
            batch[name] = torch.from_numpy(values)
        if self.needs_timestamps:
            last = batch["timestamps"].gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            batch["next_timestamps"] = last if at is None else torch.full_like(last, int(at))
        seen = [
            np.empty(0, np.int64) if part is None else np.unique(part["_item"].to_numpy()) for part in parts
        ]
        return _Rows(users, batch, seen)

    def _internal(self, items: Any) -> tuple[np.ndarray, int]:
        """Internal ids ``[n]`` int64 of original ones, 0 for unknown ones, and how many these are."""
        text = pl.Series("items", items).cast(pl.String).to_arrow().cast(pa.large_string())
        ids = pc.index_in(text, value_set=self.item_ids).to_numpy(zero_copy_only=False)
        found = np.nan_to_num(ids.astype(np.float64), nan=-1).astype(np.int64) + 1
        return found, int((found == 0).sum())

    def _known(self, users: list[Any]) -> np.ndarray:
        """``[B]`` internal ids of users that the model was trained on, 0 for new ones."""
        if self.known_users is None:
            return np.zeros(len(users), np.int64)
        ids = pc.index_in(
            pa.array([str(user) for user in users], pa.large_string()), value_set=self.known_users
        )
        return (
            np.nan_to_num(ids.to_numpy(zero_copy_only=False).astype(np.float64), nan=-1).astype(np.int64) + 1
        )

    def mask(self, candidates: Sequence[Any]) -> torch.Tensor:
        """``[V]`` bool: the items that may be recommended."""
        ids = self._internal(list(candidates))[0] if len(candidates) else np.empty(0, np.int64)
        mask = torch.zeros(len(self.item_ids) + 1, dtype=torch.bool)
        mask[torch.from_numpy(ids)] = True
        return mask[1:]

    def _popularity(self) -> torch.Tensor:
        if self.counts is None:
            raise UserError(
                "fallback='popular': the checkpoint was written before release 0.2.0 and has no counts of items"
            )
        return self.counts.float()

    def _frame(self, users: list[Any], items: torch.Tensor, scores: torch.Tensor, output: str) -> Any:
        """One row a recommendation; places without an item are left out."""
        row, column = (items > 0).nonzero(as_tuple=True)
        taken = self.item_ids.take(pa.array((items[row, column] - 1).numpy()))
        ids = taken.cast(pa.int64()) if self._numeric_items else taken
        frame = pl.DataFrame(
            {
                "user_id": pl.Series(users, strict=False).gather(row.numpy()) if users else [],
                "item_id": pl.Series(pl.from_arrow(ids)),
                "rank": (column + 1).numpy(),
                "score": scores[row, column].numpy(),
            }
        )
        return frame if output == "polars" else frame.to_pandas()


def _as_frame(histories: Any) -> pl.DataFrame:
    """Histories as one row an event; UserError where columns are missing or ids are empty."""
    if isinstance(histories, Mapping):
        users = [user for user, items in histories.items() for _ in items]
        items = [item for each in histories.values() for item in each]
        # a user without events is still a user
        empty = [user for user, each in histories.items() if not len(each)]
        frame = pl.DataFrame(
            {"user_id": [*users, *empty], "item_id": [*items, *([None] * len(empty))]}, strict=False
        )
        return (
            frame.with_columns(pl.col("item_id"))
            if len(frame)
            else frame.cast({"user_id": pl.String, "item_id": pl.String})
        )
    frame = histories if isinstance(histories, pl.DataFrame) else pl.from_pandas(pd.DataFrame(histories))
    for name in ("user_id", "item_id"):
        if name not in frame.columns:
            raise UserError(f"histories have no column {name!r}; they have: {', '.join(frame.columns)}")
    if "timestamp" in frame.columns and frame["timestamp"].dtype.is_temporal():
        frame = frame.with_columns(pl.col("timestamp").cast(pl.Datetime("us")).dt.epoch("s"))
    return frame


def _event_column(values: pl.Series, column: Mapping[str, Any]) -> pl.Series:
    """An event column as the model reads it: ids of categories, standardised numbers, seconds; 0 where missing."""
    if column["kind"] == "categorical":
        known = pa.array(column["categories"], pa.large_string())
        ids = pc.index_in(values.cast(pl.String).to_arrow().cast(pa.large_string()), value_set=known)
        return (pl.Series(values.name, pl.from_arrow(ids)).cast(pl.Int64) + 1).fill_null(0)
    if column["kind"] == "numerical":
        return ((values.cast(pl.Float64) - column["mean"]) / (column["std"] or 1.0)).fill_null(0.0)
    return values.cast(pl.Int64).fill_null(0)
