"""How a history becomes the state that scores the next item, for causal and for masked objectives."""

from __future__ import annotations

from dataclasses import replace

import torch

from generative_recommenders.modeling.events import events_with_slot
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.objectives.examples import masked_layout
from generative_recommenders.objectives.masked import MaskingScheme
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.types import SequentialFeatures


class InferenceInputs:
    """The state after the last event (causal), or at a mask slot appended behind it (scheme given)."""

    def __init__(self, scheme: MaskingScheme | None = None) -> None:
        self.scheme = scheme

    def states(
        self, model: SequenceRecommender, features: SequentialFeatures, device: torch.device
    ) -> torch.Tensor:
        """``[B, D]`` on the device; features on the CPU."""
        if self.scheme is None:
            return self._last(model, features, device)
        return self._slot(self.scheme, model, features, device)

    def _last(self, model, features, device):
        layout = jagged_layout(features.past_lengths, features.past_ids.shape[1], device)
        features = move_features(features, device)
        states = model.encode_tokens(features, layout)
        if layout.num_tokens == 0:
            return states.new_zeros(layout.num_rows, states.shape[1])
        last = states.index_select(0, layout.last_tokens.clamp(max=layout.num_tokens - 1))
        return last * (layout.lengths > 0)[:, None]

    def _slot(self, scheme, model, features, device):
        masked, read = scheme.inference(features.past_ids, features.past_lengths)
        layout = masked_layout(masked)
        replaced = layout.flatten(masked.replaced).to(device)
        tokens = (layout.starts + read).to(device)
        past_ids = layout.flatten(masked.input_ids).to(device)
        width = masked.input_ids.shape[1]
        events = events_with_slot(features.past_events, features.past_lengths, width)
        features = SequentialFeatures(masked.lengths, masked.input_ids, events)
        layout = layout.to(device)
        items = model.mask_embedding(model.embed_history(past_ids), replaced)
        states = model.encode_tokens(move_features(features, device), layout, items=items)
        return states.index_select(0, tokens)


def move_features(features: SequentialFeatures, device: torch.device) -> SequentialFeatures:
    events = {name: values.to(device) for name, values in features.past_events.items()}
    return replace(features, past_ids=features.past_ids.to(device), past_events=events)
