"""Event columns of a history: from rectangles to one value per token, and as a part of the encoder's input.

What the model may see of a hidden event is decided here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from generative_recommenders.modeling.initialization import truncated_normal_
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.ops.layout import Layout
from generative_recommenders.types import SequentialFeatures

Events = Mapping[str, torch.Tensor]
"""Columns by name: ``[B, N]`` of a history's events, whatever the data hold, and ``[B]`` of the row. The fill of a
column, for what is padded, hidden or unknown, is 0."""


def columns_of(batch: Events) -> dict[str, torch.Tensor]:
    """The event columns of a loader's batch and its users, without items and lengths."""
    events = {name: x for name, x in batch.items() if x.dim() == 2 and name != "item_ids"}
    return events | {name: batch[name] for name in ("next_timestamps", "user_ids") if name in batch}


def history_features(batch: Events) -> SequentialFeatures:
    """The histories of a loader's evaluation batch, with what is known of their events and users."""
    return SequentialFeatures(batch["lengths"], batch["item_ids"], columns_of(batch))


def past_features(batch: Events) -> SequentialFeatures:
    """The histories of a transformed batch (``past_*`` columns)."""
    stems = (name.removeprefix("past_") for name in batch if name.startswith("past_"))
    events = {stem: batch[f"past_{stem}"] for stem in stems if stem not in ("ids", "lengths")}
    events.update({name: batch[name] for name in ("next_timestamps", "user_ids") if name in batch})
    return SequentialFeatures(batch["past_lengths"], batch["past_ids"], events)


def token_events(
    events: Events, lengths: torch.Tensor, layout: Layout, constant_width: int | None = None
) -> dict[str, torch.Tensor]:
    """Rectangular events as one value per token, with each token's next time (see `next_times`) and user.

    constant_width: HSTU's N. What follows a full row is unknown, but for rectangles of this width, where the published
    code repeats the row's last time.
    """
    tokens = {}
    if "user_ids" in events:
        tokens["user_ids"] = events["user_ids"].index_select(0, layout.row_of)
    for name, values in events.items():
        if values.dim() == 2 and name != "next_timestamps":
            tokens[name] = layout.flatten(values)
    if "timestamps" in events:
        following = events.get("next_timestamps")
        if following is None:
            times = events["timestamps"]
            times = times if times.shape[1] == constant_width else F.pad(times, (0, 1))
            following = next_times(times, lengths, None)[:, : events["timestamps"].shape[1]]
        elif following.dim() == 1:
            following = next_times(events["timestamps"], lengths, following)
        tokens["next_timestamps"] = layout.flatten(following)
    return tokens


def next_times(timestamps: torch.Tensor, lengths: torch.Tensor, next_known: torch.Tensor | None) -> torch.Tensor:
    """Time of the event after each position, ``[B, N]``.

    timestamps ``[B, N]``; the slot after a row's end may hold the next event's time, 0 if unknown. next_known ``[B]``
    replaces that slot. A full row without next_known repeats its own last time.
    """
    last = timestamps[:, -1:] if next_known is None else next_known[:, None]
    shifted = torch.cat([timestamps, last], dim=1)[:, 1:]
    if next_known is None:
        return shifted
    # Chosen by comparison: a scatter would refuse times of two dtypes, and fail where a length is not 0..N.
    places = torch.arange(timestamps.shape[1], device=timestamps.device)
    ends = lengths.to(timestamps.device)[:, None] - 1
    return torch.where(places == ends, next_known[:, None], shifted)


def hidden_events(columns: Events, hidden: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Events of training histories ``[B, N]`` some of whose positions are hidden (``[B, N]`` bool).

    As at the mask slot of inference: a hidden item has each column's fill and the time of the last shown item before it
    (else of the first one after it); its own time, the target's, is its next time alone.
    """
    events = {name: x.masked_fill(hidden, 0) if x.dim() == 2 else x for name, x in columns_of(columns).items()}
    if "timestamps" in columns:
        times = columns["timestamps"]
        places = torch.arange(times.shape[1], device=times.device)
        shown = ~hidden & (places < lengths[:, None])
        # Index of the last shown position up to here, -1 where all before are hidden.
        before = places.where(shown, -1).cummax(1).values
        first = shown.int().argmax(1, keepdim=True)
        seen = times.where(~hidden, times.gather(1, before.where(before >= 0, first)))
        events["timestamps"] = seen
        events["next_timestamps"] = torch.where(hidden, times, next_times(seen, lengths, torch.zeros_like(lengths)))
    return events


def events_with_slot(events: Events, lengths: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """Events ``[B, N]`` in rectangles of ``width`` > N, where a mask slot follows each row's ``lengths [B]`` events.

    The slot takes each column's fill and the time of the last event; columns ``[B]`` stay as they are.
    """
    widened = {
        name: values if values.dim() == 1 else F.pad(values, (0, width - values.shape[1]))
        for name, values in events.items()
    }
    if "timestamps" in widened:
        times = widened["timestamps"]
        last = times.gather(1, (lengths - 1).clamp(min=0)[:, None])
        widened["timestamps"] = times.scatter(1, lengths[:, None], last)
    return widened


def required(events: Events, name: str, needed_by: torch.nn.Module) -> torch.Tensor:
    """The column, or ValueError naming it and the module that needs it."""
    if name not in events:
        raise ValueError(f"{type(needed_by).__name__} needs {name}, and the data have none")
    return events[name]


@dataclass(frozen=True)
class EventFeature:
    """name: key of the event column. num_categories: C, ids 1..C, 0 for none; None for numbers, of this mean and
    std."""

    name: str
    num_categories: int | None = None
    mean: float = 0.0
    std: float = 1.0


class EventFeatures(torch.nn.Module):
    """Sum over the features of an embedding ``[C + 1, D]``, or of the standardised number times a vector ``[D]``.

    The fill, 0, has an embedding of its own among categories and adds nothing where it stands for a number.
    """

    def __init__(self, features: Sequence[EventFeature], embedding_dim: int) -> None:
        super().__init__()
        self.features = tuple(features)
        self.weights = torch.nn.ParameterDict()
        for feature in self.features:
            rows = () if feature.num_categories is None else (feature.num_categories + 1,)
            initial = truncated_normal_(torch.empty(*rows, embedding_dim))
            # of_: a bare name may be a method of modules, as "half"
            self.weights[f"of_{feature.name}"] = torch.nn.Parameter(initial)

    def forward(self, items: torch.Tensor, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``items [T, D]`` with the features of their events (``[T]`` columns) added."""
        for feature in self.features:
            values, weight = required(events, feature.name, self), self.weights[f"of_{feature.name}"]
            if feature.num_categories is not None:
                items = items + lookup_rows(weight, values)
            else:
                # times exceed what float32 resolves, differences from their mean do not
                numbers = ((values.double() - feature.mean) / feature.std).float()
                items = items + numbers.where(values != 0, 0.0)[:, None] * weight
        return items
