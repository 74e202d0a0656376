"""What a model returns: mappings whose keys are attributes too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["InferenceOutput", "TrainOutput"]

HiddenStates = tuple[torch.Tensor, ...]


class _Output(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None


class TrainOutput(_Output):
    """loss: scalar with a graph. hidden_states: ``[B, N, D]`` each, the encoder's and those made from it."""

    def __init__(
        self, loss: torch.Tensor | Mapping[str, Any], hidden_states: HiddenStates | None = None
    ) -> None:
        # Lightning and DDP move outputs by building their type from one mapping.
        super().__init__(
            loss if isinstance(loss, Mapping) else {"loss": loss, "hidden_states": hidden_states}
        )


class InferenceOutput(_Output):
    """logits: ``[B, V]`` or ``[B, candidates]``. hidden_states: as in `TrainOutput`."""

    def __init__(
        self, logits: torch.Tensor | Mapping[str, Any], hidden_states: HiddenStates | None = None
    ) -> None:
        super().__init__(
            logits if isinstance(logits, Mapping) else {"logits": logits, "hidden_states": hidden_states}
        )
