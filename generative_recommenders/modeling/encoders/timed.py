"""What encoders that compare the places and times of two events have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import Appended, last_tokens
from generative_recommenders.ops.attention.relative_bias import BiasInputs, Times, time_buckets
from generative_recommenders.ops.layout import Layout


class TimedEncoder(torch.nn.Module):
    """max_length: N, the reach of places. timed: whether times are read. next_time: "given" where a token knows the time of the
    event after it."""

    max_length: int
    timed: bool
    next_time: str

    def times(self, events: Mapping[str, torch.Tensor]) -> Times | None:
        """What is compared, or None where times are not read or the data have none."""
        keys = events.get("timestamps")
        queries = events.get("next_timestamps") if self.next_time == "given" else keys
        return None if not self.timed or keys is None or queries is None else (queries, keys)

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        """The last token may know the time of the event after it."""
        return self.next_time == "given" and self.timed and "timestamps" in events

    def appended_inputs(self, events: Mapping[str, torch.Tensor], appended: Appended) -> BiasInputs:
        """Places and times of appended tokens against those of all; UserError beyond max_length."""
        if appended.capacity > self.max_length:
            raise UserError(
                f"encode_incremental: {appended.capacity} tokens, and {type(self).__name__}'s max_length is {self.max_length}"
            )
        times, buckets = self.times(events), None
        if times is not None and appended.times is not None:
            buckets = time_buckets(appended.layout.to_rectangle(times[0]), appended.times)
        return BiasInputs(self.max_length - 1 + appended.distances(), buckets)

    def last_inputs(
        self, layout: Layout, events: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Appended, BiasInputs]:
        """`last_tokens`, and their places and times against those of all."""
        times = self.times(events)
        tokens, appended = last_tokens(layout, None if times is None else times[1])
        own = {name: values.index_select(0, tokens) for name, values in events.items()}
        return tokens, appended, self.appended_inputs(own, appended)
