"""Sessions: histories that grow event by event, encoded on their new events alone where the encoder allows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from generative_recommenders.modeling.cache import HistoryCache
from generative_recommenders.modeling.encoders.base import can_append
from generative_recommenders.modeling.events import columns_of
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.retrieval.histories import Histories


class Session:
    """One user's history so far; `Recommender.append` adds to it.

    window: events that the model reads.
    """

    def __init__(self, user: Any, window: int) -> None:
        self.user, self.window = user, window
        self.seen: set[int] = set()
        self.numeric = False
        self._columns: dict[str, torch.Tensor] = {}
        self._of_user: dict[str, torch.Tensor] = {}
        self._cache: HistoryCache | None = None
        self._state: torch.Tensor | None = None
        self._encoded = 0
        self._asked_at: int | None = None
        self._total = 0

    def __len__(self) -> int:
        """Events that the model can read, including those before the window."""
        return self._total

    def add(self, histories: Histories) -> None:
        """Adds events of this user, as a reader gives them: after the others, or by time where they have times."""
        batch, length = histories.batch, int(histories.batch["lengths"][0])
        self.seen |= set(histories.seen[0].tolist())
        self.numeric = histories.numeric
        self._of_user = {name: x for name, x in batch.items() if x.dim() == 1 and name != "lengths"}
        new = {name: x[:, :length] for name, x in batch.items() if x.dim() == 2}
        before = self._columns or {name: x[:, :0] for name, x in new.items()}
        columns = {name: torch.cat([before[name], x], dim=1) for name, x in new.items()}
        times = columns.get("timestamps")
        if times is not None and (times.diff(dim=1) < 0).any():
            order = times.argsort(dim=1, stable=True)
            columns = {name: x.gather(1, order) for name, x in columns.items()}
            self._cache = None  # states encoded after the new event are out of date
        self._columns = {name: x[:, -self.window :] for name, x in columns.items()}
        if "next_timestamps" in self._of_user:
            # The time of the last event, unless a request brings its own.
            times = torch.nn.functional.pad(self._columns["timestamps"], (1, 0))
            self._of_user["next_timestamps"] = times[:, -1]
        self._total += histories.counts[0]
        if length:
            self._state = None

    def histories(self) -> Histories:
        """The window, as a reader would give it."""
        length = min(self._total, self.window)
        batch = {"lengths": torch.tensor([length]), **self._of_user, **self._columns}
        seen = np.array(sorted(self.seen), np.int64)
        return Histories([self.user], batch, [seen], self.numeric)

    @torch.no_grad()
    def encode(self, model: SequenceRecommender, at: int | None) -> Queries:
        """Result of `SequenceRecommender.encode_query` for the window. at: the time of the request."""
        batch = self.histories().batch
        if at is not None and "next_timestamps" in batch:
            batch["next_timestamps"] = torch.full_like(batch["next_timestamps"], at)
        if self._state is None or at != self._asked_at:
            self._state, self._asked_at = self._encode(model, batch), at
        return Queries(self._state, batch["user_ids"])

    def _encode(self, model: SequenceRecommender, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        encoder: Any = model.sequence.encoder
        appends = encoder.causal and can_append(encoder) and model.mask_embedding is None
        appends = appends and model.sequence.preprocessor.appendable
        # past the window every position moves, and another request time brings no new event: both encode the window
        if not appends or self._total > self.window or self._encoded == self._total:
            self._cache = None if self._total > self.window else self._cache
            return model.encode_query(batch).states
        if self._cache is None:
            self._encoded = 0
        new = {name: x[:, self._encoded :] if x.dim() == 2 else x for name, x in batch.items()}
        new = {name: x.to(model.items.table.device) for name, x in new.items()}
        lengths = torch.tensor([new["item_ids"].shape[1]])
        states, self._cache = model.encode_incremental(self._cache, lengths, new["item_ids"], columns_of(new))
        self._encoded = self._total
        return states
