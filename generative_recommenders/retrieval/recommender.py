"""Recommendations of a trained run: histories in the users' own ids in, ranked items in the same ids out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import torch
import torch.nn.functional as F
from absl import logging

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.parts import build_model
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore, checkpoint_of_run
from generative_recommenders.checkpoint.weights import (
    data_facts,
    data_tensors,
    item_counts,
    load_model,
    user_ids,
)
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError, first_line
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops import dispatch
from generative_recommenders.retrieval.frames import (
    OUTPUTS,
    Output,
    answer_frame,
    as_frame,
    as_text,
    candidate_lists,
    in_order,
    is_table,
    listed,
    seconds,
    user_key,
    whole_ids,
)
from generative_recommenders.retrieval.histories import Histories, HistoryReader
from generative_recommenders.retrieval.item_search import Allowed, ItemSearch
from generative_recommenders.retrieval.new_items import add_rows
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.session import Session

MAX_USERS = 1024
"""Users encoded at a time."""
FEW_TOKENS = 256
"""Events up to which one thread encodes at least as fast as several, and much faster on a busy machine: operations last
microseconds, and threads wait for each other after every one."""


class Recommender:
    """A trained model that answers for known and new users. Made by `load`.

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
        self.known_users, self.counts, self.facts = known_users, counts, dict(facts or {})
        self._set_items(item_ids)

    def _set_items(self, item_ids: pa.Array) -> None:
        """Takes the model's items as they are now. item_ids: their original ids."""
        facts, preprocessor, encoder = self.facts, self.model.sequence.preprocessor, self.model.sequence.encoder
        self.item_ids = item_ids.cast(pa.large_string())
        read = {each["name"] for each in facts.get("event_features", {}).values()}
        timed = bool(facts.get("has_timestamps", False)) and bool(getattr(encoder, "timed", False))
        self.reader = HistoryReader(
            self.item_ids,
            self.known_users,
            self.settings.data.max_sequence_length,
            facts.get("trained_items", len(item_ids)),
            needs_ratings=preprocessor.needs_ratings or "ratings" in read,
            needs_timestamps=timed or "timestamps" in read,
            uses_next_time=timed and getattr(encoder, "next_time", None) == "given",
            event_columns=facts.get("event_columns", ()),
            num_ratings=preprocessor.num_ratings,
        )
        self.snapshot = self.model.catalogue()
        self.search = ItemSearch(self.model, self.snapshot, self.counts)
        self._directions: torch.Tensor | None = None  # embeddings of length 1, made by the first `similar_items`

    @classmethod
    def load(cls, run: str | Path, device: str = "auto", plugins: str | Sequence[str] = ()) -> Recommender:
        """The best checkpoint of a run, else the newest; the training data are not needed.

        run: the run's folder. device: "auto" takes a GPU if there is one. plugins: files or modules that register the
        run's own parts. UserError where there is no checkpoint, it needs a plug-in, or the device does not exist.
        """
        load_plugins([plugins] if isinstance(plugins, str) else [str(each) for each in plugins])
        checkpoint = checkpoint_of_run(run)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # torch does not know the name, or there is no such GPU
            raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from error
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
        candidates: Any = None,
        at: Any = None,
        fallback: Literal["popular"] | None = None,
        output: Output = "pandas",
    ) -> Any:
        """The k best items of each user.

        histories: a table (pandas, polars, pyarrow or Spark) of ``user_id, item_id`` and, where the model reads them,
        ``rating``, ``timestamp`` (as preparation reads them) and its event columns; or a mapping from users to items,
        oldest first; or a `Session`. Events are sorted by ``timestamp`` if there is one. exclude_seen: whether items of
        the history are left out. candidates: the only items to recommend: a list or a table ``item_id`` for all users,
        or a mapping or a table ``user_id, item_id`` by user, where a user without any gets nothing. at: the time of the
        request, a datetime or a number as in ``timestamp``, which a model of ``next_time = "given"`` reads. fallback:
        what users without a known item get; None leaves them out.

        Returns a frame ``user_id, item_id, rank, score``, best first; for output "torch", scores and internal ids
        ``[B, k]``, with k at most the number of items. Equal scores are ranked by item id. Unknown items are dropped
        and counted in a warning.
        """
        k = self._checked(k)
        if output not in OUTPUTS:
            raise UserError(f"output {output!r} is unknown; known: {', '.join(OUTPUTS)}")
        if fallback not in (None, "popular"):
            raise UserError(f"fallback {fallback!r} is unknown; known: popular")
        users, values, ids, numeric = [], [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)], False
        lists = None if candidates is None else candidate_lists(candidates)
        allowed: Allowed = self.allowed(lists) if isinstance(lists, list) else None
        unknown = 0
        for some, queries in self._queries(histories, at, keep_empty=fallback == "popular"):
            if isinstance(lists, dict):
                allowed, dropped = self.allowed_by_row([lists.get(user_key(user), []) for user in some.users])
                unknown += dropped
            best, found = self.search.best(some, queries, k, exclude_seen, allowed)
            users += some.users
            values.append(best)
            ids.append(found)
            numeric = some.numeric
        _warn_of_unknown(unknown)
        scores, items = torch.cat(values), torch.cat(ids)
        if output == "torch":
            return scores, items
        return answer_frame(self.item_ids, users, items, scores, numeric, output)

    def _checked(self, k: Any) -> int:
        """k, at most the number of items; UserError where it is not a positive whole number."""
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise UserError(f"k must be a whole number of 1 or more, got {k!r}")
        return min(int(k), len(self.item_ids))

    def score(self, histories: Any, candidates: Sequence[Any], *, at: Any = None) -> pd.DataFrame:
        """Scores of candidates: a frame with a row per user and a column per item. UserError for an unknown item."""
        candidates = listed(candidates, "candidates")
        ids = self.reader.known(candidates, "candidate")
        users, scores = [], [torch.empty(0, len(ids))]
        for some, queries in self._queries(histories, at):
            with torch.no_grad():
                scores.append(self.model.score(queries, ids).float().cpu())
            users += some.users
        index = pd.Index(users, name="user_id")
        return pd.DataFrame(torch.cat(scores).numpy(), index=index, columns=candidates)

    def embed(self, histories: Any, *, at: Any = None) -> pd.DataFrame:
        """States that items are scored against: a frame with a row per user."""
        users, states = [], []
        for some, queries in self._queries(histories, at):
            states.append(queries.states.float().cpu())
            users += some.users
        values = torch.cat(states).numpy() if states else np.empty((0, 0), np.float32)
        return pd.DataFrame(values, index=pd.Index(users, name="user_id"))

    def item_embeddings(self) -> pd.DataFrame:
        """Items as scored: a frame with a row per item, indexed by original id."""
        index = pd.Index(self.item_ids.to_pylist(), name="item_id")
        return pd.DataFrame(self.snapshot.embeddings.float().cpu().numpy(), index=index)

    def similar_items(self, items: Any, k: int = 10) -> pd.DataFrame:
        """The k other items of largest cosine to each: a frame ``item_id, similar_id, rank, score``.

        items: one original id or several. UserError for an unknown item.
        """
        one = isinstance(items, (str, int, np.integer))
        k, items = self._checked(k), listed([items] if one else items, "items")
        own = self.reader.known(items)
        if self._directions is None:
            self._directions = F.normalize(self.snapshot.embeddings.float(), dim=-1)
        every = self._directions
        cosines, ids = search_products(every[own.to(every.device) - 1], every, k, own[:, None].to(every.device))
        numeric = len(items) > 0 and isinstance(items[0], (int, np.integer))
        frame = answer_frame(self.item_ids, items, ids.cpu(), cosines.cpu(), numeric)
        return frame.rename(columns={"user_id": "item_id", "item_id": "similar_id"})

    # -- sessions and new items ---------------------------------------------------------------------------------

    def session(self, user: Any = None, history: Any = ()) -> Session:
        """A history that `append` extends. history: items, oldest first, or a table as for `recommend`, without
        ``user_id``."""
        session = Session(user, self.reader.max_length)
        if is_table(history):
            frame = as_frame(history)
        else:
            frame = pl.DataFrame({"item_id": in_order(history, "history")}, strict=False)
        return self._extend(session, frame if len(frame) else pl.DataFrame({"item_id": [None]}))

    def append(self, session: Session, item: Any, **columns: Any) -> Session:
        """Adds an event to the session and returns it. columns: of the event, such as ``rating=``, ``timestamp=``.

        `recommend` then answers as for the whole history; most encoders encode the new event alone until the window is
        full. For a model that reads times, an event older than others is put in its place among them.
        """
        return self._extend(
            session, pl.DataFrame({"item_id": [item], **{name: [value] for name, value in columns.items()}})
        )

    def _extend(self, session: Session, events: pl.DataFrame) -> Session:
        frame = events.with_columns(pl.lit("" if session.user is None else session.user).alias("user_id"))
        (histories,) = self.reader.read(frame, None, 1, keep_empty=True)
        session.add(histories)
        return session

    def add_items(self, items: Any) -> None:
        """Adds items known by their features alone: a table of ``item_id`` and the features of the item tower.

        They can be recommended at once; in histories they count as seen but are not read. `save` keeps them. UserError
        where the model knows items by their ids, or has these already.
        """
        frame = as_frame(items, "add_items")
        if "item_id" not in frame.columns:
            raise UserError(f"add_items: there is no column 'item_id'; there are: {', '.join(frame.columns)}")
        names = whole_ids(frame["item_id"]).cast(pl.String)
        if names.null_count() or names.n_unique() < len(names) or (self.reader.internal(names) > 0).any():
            raise UserError("add_items: item_id holds an item that is missing, given twice or known already")
        add_rows(self.model.items, frame, self.facts.get("item_encodings", {}))
        self.facts.setdefault("trained_items", len(self.item_ids))
        if self.counts is not None:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(len(frame))])
        self._set_items(pa.concat_arrays([self.item_ids, names.to_arrow().cast(pa.large_string())]))

    def save(self, run: str | Path) -> None:
        """Writes this model and its items as a run's folder, which `load` reads. UserError for the folder of a training
        run."""
        store = CheckpointStore(Path(run) / "checkpoints")
        if not all(path.name.endswith("-epoch-0-step-0") for path in store.paths()):
            raise UserError(
                f"{run} has checkpoints of a training run, which this would replace: save to another folder"
            )
        store.attach(self.item_ids, self.settings.to_json(), "")
        users = None if self.known_users is None else pa.chunked_array([self.known_users])
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= data_tensors(self.counts, users)
        store.save((0, 0), tensors, {"data": self.facts}, is_best=True)

    # -- parts --------------------------------------------------------------------------------------------------

    def allowed(self, candidates: Any, warn: bool = True) -> torch.Tensor:
        """Sorted internal ids ``[R]`` of candidates; warn: whether unknown ones are counted in a warning."""
        (allowed,), unknown = self.allowed_by_row([listed(candidates, "candidates")])
        if warn:
            _warn_of_unknown(unknown)
        return allowed

    def allowed_by_row(self, lists: list[list[Any]]) -> tuple[list[torch.Tensor], int]:
        """Those of each list, looked up together, and the number of unknown candidates."""
        texts = [as_text(items) for items in lists]
        ids = self.reader.internal(pl.concat(texts))
        parts = np.split(ids, np.cumsum([len(each) for each in texts])[:-1])
        return [torch.from_numpy(np.unique(each[each > 0])) for each in parts], int((ids == 0).sum())

    def queries(self, histories: Histories) -> Queries:
        """Queries of a batch of histories."""
        threads = torch.get_num_threads()
        few = int(histories.batch["lengths"].sum()) <= FEW_TOKENS and dispatch.fast_on_cpu(self.snapshot.embeddings)
        try:
            torch.set_num_threads(1 if few else threads)
            with torch.no_grad():
                return self.model.encode_query(histories.batch)
        finally:
            torch.set_num_threads(threads)

    def _queries(self, histories: Any, at: Any, keep_empty: bool = False) -> Iterator[tuple[Histories, Queries]]:
        at = seconds(at)
        if isinstance(histories, Session):
            some = histories.histories()
            if len(histories) or keep_empty:
                yield some, histories.encode(self.model, at)
            return
        for some in self.reader.read(histories, at, MAX_USERS, keep_empty):
            yield some, self.queries(some)


def _warn_of_unknown(candidates: int) -> None:
    if candidates:
        logging.warning("%d candidates are not items that the model knows", candidates)
