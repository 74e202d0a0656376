"""Base of objectives: what a model learns to predict, and how it is asked for the next item afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.modeling.inputs import QueryReader
from generative_recommenders.modeling.model import SequenceEncoder
from generative_recommenders.objectives.criterion import Criterion
from generative_recommenders.objectives.examples import TrainingExample


class Objective(QueryReader):
    """An objective by ``train_fn.objective``; its constructor's keyword arguments are its options.

    The program supplies ``embedding_dim`` where the constructor asks for it.
    """

    fixed_shapes = False
    """Whether an example's shapes follow from the number of its tokens; `device_example` is then there."""
    needs_item_table = False
    """Whether it multiplies states by the item table itself, as an item tower and MoL do not."""

    @abstractmethod
    def example(self, columns: Mapping[str, torch.Tensor], draws: Draws = None) -> TrainingExample:
        """Inputs and targets of a batch. columns: of `data.loader.LoadedBatch`. draws: what random choices come
        from."""

    def device_example(self, columns: Mapping[str, torch.Tensor], num_tokens: int) -> TrainingExample:
        """`example` of columns on a device, without synchronising with it. num_tokens: T."""
        raise NotImplementedError

    @abstractmethod
    def first_target(self, batch: LoadedBatch) -> int | None:
        """Number of the process's first target in the global batch; None where only counting targets tells."""

    def criterion(self, base: Criterion, encoder: Callable[[bool], SequenceEncoder]) -> Criterion:
        """The chosen loss, with what the objective adds to it. encoder: another sequence encoder of the same settings,
        or, called with True, the model's own.
        """
        return base
