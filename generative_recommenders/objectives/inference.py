"""How a history becomes the state that scores the next item, for causal and for masked objectives."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

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
        payloads = {name: _widened(values, width) for name, values in features.past_payloads.items()}
        if "timestamps" in payloads:
            payloads["timestamps"] = _with_slot_time(payloads["timestamps"], features.past_lengths)
        features = SequentialFeatures(masked.lengths, masked.input_ids, payloads)
        layout = layout.to(device)
        items = model.mask_embedding(model.embed_history(past_ids), replaced)
        states = model.encode_tokens(move_features(features, device), layout, items=items)
        return states.index_select(0, tokens)


def move_features(features: SequentialFeatures, device: torch.device) -> SequentialFeatures:
    payloads = {name: values.to(device) for name, values in features.past_payloads.items()}
    return replace(features, past_ids=features.past_ids.to(device), past_payloads=payloads)


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    """Payload rectangles with room for the mask slot; ``[B]`` payloads as they are."""
    return values if values.dim() == 1 else F.pad(values, (0, width - values.shape[1]))


def _with_slot_time(timestamps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``[B, N + 1]`` with the last event's time at the mask slot behind it."""
    last = timestamps.gather(1, (lengths - 1).clamp(min=0)[:, None])
    return timestamps.scatter(1, lengths[:, None], last)
