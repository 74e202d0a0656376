"""Bases of encoders: stacks of blocks over whole histories, over their last tokens, or over appended ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F

from generative_recommenders.config.sections import NextTime
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import (
    Appended,
    IncrementalEncoder,
    KeysValues,
    agrees_with_forward,
    last_tokens,
)
from generative_recommenders.ops.attention.relative_bias import BiasInputs, Times, time_buckets
from generative_recommenders.ops.jagged import jagged_to_padded
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.recomputation import run_block

LinearConfig = Literal["uvqk"]
LinearActivation = Literal["silu", "none"]
"""Of the one projection to U, V, Q and K."""
LINEAR_ACTIVATIONS = {"silu": F.silu, "none": lambda x: x}


class BlockEncoder(torch.nn.Module):
    """A stack of ``blocks``, whose states of a causal history never change when later tokens arrive.

    A block is ``forward(x [T, D], layout, *inputs) -> [T, D]``, and the same in two parts, by which further tokens are
    encoded without the others: ``keys_values(x)``, ``[T, H, d]`` each, and
    ``over_cache(x, block, appended, *cached_inputs) -> [T, D]``, over the keys and values of all tokens.

    A block whose keys and values are projections may have ``over_inputs(x [R, D], inputs [R, C, D], lengths [R])`` too:
    the same for the last token of each row, from what the block takes of all its tokens, without keys and values.
    Where a derived class has a ``forward`` of its own, only what it says anew of these is taken.
    """

    causal = True
    output_dim: int
    activation_checkpoint: bool
    blocks: Any

    def inputs(self, layout: Layout, events: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Inputs of every block beside the tokens, computed once for a batch."""
        return ()

    def cached_inputs(self, events: Mapping[str, torch.Tensor], appended: Appended) -> tuple[Any, ...]:
        """The same for tokens after cached ones; events: of these tokens."""
        return ()

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` states from the output of the last block."""
        return x

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, E]`` to ``[T, D]``."""
        inputs = self.inputs(layout, events)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpoint and self.training, x, layout, *inputs)
        return layout.mask(self.output(x))

    def encode_last(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `modeling.model.SequenceEncoder.last`: the last block has queries and a feed-forward of the last tokens
        alone."""
        *before, last = self.blocks
        over_inputs = agrees_with_forward(last, "over_inputs")
        if not over_inputs and not agrees_with_forward(last, "keys_values", "over_cache"):
            return self(x, layout, events).index_select(0, layout.last_tokens[layout.lengths > 0])
        inputs = self.inputs(layout, events) if before else ()
        for block in before:
            x = block(x, layout, *inputs)
        if over_inputs:
            filled = layout.lengths > 0
            offsets = torch.cat([layout.starts[filled], layout.offsets[-1:]])
            of_rows, lengths = jagged_to_padded(x, offsets, layout.longest), layout.lengths[filled]
            return self.output(last.over_inputs(x.index_select(0, layout.last_tokens[filled]), of_rows, lengths))
        tokens, appended = last_tokens(layout, events.get("timestamps"))
        own = {name: values.index_select(0, tokens) for name, values in events.items()}
        held = (jagged_to_padded(each, layout.offsets, appended.capacity) for each in last.keys_values(x))
        cached = self.cached_inputs(own, appended)
        return self.output(last.over_cache(x.index_select(0, tokens), KeysValues(*held), appended, *cached))

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        """See `modeling.cache.IncrementalEncoder`."""
        return False

    def encode_appended(
        self,
        x: torch.Tensor,
        events: Mapping[str, torch.Tensor],
        appended: Appended,
        cached: Sequence[KeysValues],
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """See `modeling.cache.IncrementalEncoder`."""
        inputs, extended = self.cached_inputs(events, appended), []
        for block, before in zip(self.blocks, cached or repeat(None)):
            extended.append(appended.extend_block(before, *block.keys_values(x)))
            x = block.over_cache(x, extended[-1], appended, *inputs)
        return self.output(x), tuple(extended)


class TimedEncoder(BlockEncoder):
    """Blocks that compare the positions and times of two events.

    max_length: N, the longest distance of positions. timed: whether times are read. next_time: "given" where a token
    knows the time of the event after it, else "hidden".
    """

    max_length: int
    timed: bool
    next_time: NextTime

    def times(self, events: Mapping[str, torch.Tensor]) -> Times | None:
        """Times of queries and keys, or None where times are not read or the data have none."""
        keys = events.get("timestamps")
        queries = events.get("next_timestamps") if self.next_time == "given" else keys
        return None if not self.timed or keys is None or queries is None else (queries, keys)

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        # The token was encoded before the time of the event after it was known.
        return self.timed and self.next_time == "given" and "timestamps" in events

    def appended_bias(self, events: Mapping[str, torch.Tensor], appended: Appended) -> BiasInputs:
        """Positions and times of appended tokens against those of all; UserError beyond max_length."""
        if appended.capacity > self.max_length:
            raise UserError(
                f"a history of {appended.capacity} tokens, and {type(self).__name__}'s max_length is {self.max_length}"
            )
        times, buckets = self.times(events), None
        if times is not None and appended.times is not None:
            buckets = time_buckets(appended.layout.to_rectangle(times[0]), appended.times)
        return BiasInputs(self.max_length - 1 + appended.distances(), buckets)


def can_append(encoder: torch.nn.Module) -> TypeGuard[IncrementalEncoder]:
    """Whether an encoder and its blocks can encode incrementally, to the same states as by ``forward``."""
    blocks = encoder.blocks if isinstance(encoder, BlockEncoder) else ()
    return (
        isinstance(encoder, IncrementalEncoder)
        and agrees_with_forward(encoder, "encode_appended")
        and all(agrees_with_forward(block, "keys_values", "over_cache") for block in blocks)
    )


def check_heads(width: int, num_heads: int) -> None:
    """ValueError where the heads do not divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide the width {width}: choose one of its divisors")
