"""Model outputs: mappings whose keys are attributes too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["InferenceOutput", "TrainOutput"]

HiddenStates = tuple[torch.Tensor, ...]


class _Output(dict[str, Any]):
    """A mapping whose keys are attributes too; made of one mapping where Lightning and DDP move it to a device."""

    def __init__(self, name: str, value: torch.Tensor | Mapping[str, Any], states: HiddenStates | None) -> None:
        super().__init__(value if isinstance(value, Mapping) else {name: value, "hidden_states": states})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None


class TrainOutput(_Output):
    """loss: scalar with a graph. hidden_states: ``[B, N, D]`` each, the encoder's and those made from it."""

    def __init__(self, loss: torch.Tensor | Mapping[str, Any], hidden_states: HiddenStates | None = None) -> None:
        super().__init__("loss", loss, hidden_states)


class InferenceOutput(_Output):
    """logits: ``[B, V]`` or ``[B, candidates]``. hidden_states: as in `TrainOutput`."""

    def __init__(self, logits: torch.Tensor | Mapping[str, Any], hidden_states: HiddenStates | None = None) -> None:
        super().__init__("logits", logits, hidden_states)
