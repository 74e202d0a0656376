"""Transformers4Rec's masking classes, by their documented names, arguments and defaults, over the package's schemes.

Rows are right-padded with ``padding_idx``. There are three modes: ``training=True``; evaluation of the last item, the
default; and ``inference=True``, which asks for the item after the whole history. ``apply_mask_to_inputs`` acts as the
mode of the last targets asks. The schema's polarity is Transformers4Rec's: for causal modelling True = input kept, for
the others True = input replaced by the learned mask embedding.

Differences on purpose: a row of one item raises no error and is never hidden; spans of permutation modelling stop at
the end of a row, so that rows of two or more items always have something hidden and something visible; replacement
modelling honours ``mlm_probability``; a fake item is never the padding.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.masked import MaskedItemObjective, PermutedObjective

__all__ = [
    "CausalLanguageModeling",
    "MaskSequence",
    "MaskedLanguageModeling",
    "MaskingInfo",
    "PermutationLanguageModeling",
    "ReplacementLanguageModeling",
]


@dataclass
class MaskingInfo:
    """schema: ``[B, N]`` bool; targets: ``[B, N]`` int64, ``padding_idx`` where there is none."""

    schema: Tensor
    targets: Tensor


class MaskSequence(nn.Module):
    """Base of the four classes.

    hidden_size: width of the embeddings. eval_on_last_item_seq_only: evaluate the last item only, else every next item.
    Further keyword arguments do nothing; a warning names them.
    """

    mask_schema: Tensor | None
    masked_targets: Tensor | None

    def __init__(
        self, hidden_size: int, padding_idx: int = 0, eval_on_last_item_seq_only: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        if kwargs:
            warnings.warn(f"{type(self).__name__} ignores {', '.join(sorted(kwargs))}", stacklevel=2)
        self.hidden_size = hidden_size
        self.padding_idx = padding_idx
        self.eval_on_last_item_seq_only = eval_on_last_item_seq_only
        self.mask_schema = None
        self.masked_targets = None
        self.has_labels = True
        self.masked_item_embedding = nn.Parameter(torch.empty(hidden_size).normal_(std=0.001))

    def compute_masked_targets(self, item_ids: Tensor, training: bool = False, inference: bool = False) -> MaskingInfo:
        """Schema and targets for ``item_ids [B, N]``, also kept as ``mask_schema`` and ``masked_targets``.

        Without training the last item is the target; with inference alone there is none, and the item after the history
        is asked for.
        """
        if training:
            return self._keep(self.training_targets(item_ids))
        if inference:
            return self._keep(self.inference_targets(item_ids), has_labels=False)
        return self._keep(self.evaluation_targets(item_ids))

    def _keep(self, info: MaskingInfo, has_labels: bool = True) -> MaskingInfo:
        self.mask_schema, self.masked_targets, self.has_labels = info.schema, info.targets, has_labels
        return info

    def training_targets(self, item_ids: Tensor) -> MaskingInfo:
        """The scheme's own draw of labels."""
        raise NotImplementedError(f"{type(self).__name__} is a base class; use one of the four masking classes")

    def evaluation_targets(self, item_ids: Tensor) -> MaskingInfo:
        """The last item is the target and hidden; or every next item."""
        if not self.eval_on_last_item_seq_only:
            return self.predict_all(item_ids)
        return self.where_known(self.last(item_ids))

    def inference_targets(self, item_ids: Tensor) -> MaskingInfo:
        """One column more: the schema is True at the slot after each last item, which holds a copy of that item."""
        wider = F.pad(item_ids, (0, 1), value=self.padding_idx)
        return self.where_known(self.last(wider).roll(1, dims=1))

    def predict_all(self, item_ids: Tensor) -> MaskingInfo:
        """Targets: the next item at every position; schema: where there is one."""
        return self.where_known(F.pad(item_ids[:, 1:], (0, 1), value=self.padding_idx))

    def where_known(self, targets: Tensor) -> MaskingInfo:
        """The targets ``[B, N]``, with a schema that is True where there is one."""
        return MaskingInfo(targets != self.padding_idx, targets)

    def last(self, item_ids: Tensor) -> Tensor:
        """``item_ids [B, N]`` at each row's last item, padding elsewhere."""
        lengths = (item_ids != self.padding_idx).sum(1, keepdim=True)
        is_last = torch.arange(item_ids.shape[1], device=item_ids.device) == lengths - 1
        return item_ids.where(is_last, self.padding_idx)

    def apply_mask_to_inputs(self, inputs: Tensor, schema: Tensor) -> Tensor:
        """``inputs [B, N, D]`` with the mask embedding where ``schema`` is True.

        A schema of inference, ``[B, N + 1]``, adds a column for the slot. ``UserError`` for any other width.
        """
        width = inputs.shape[1]
        if schema.shape[1] not in (width, width + 1):
            raise UserError(f"schema {tuple(schema.shape)} does not fit inputs {tuple(inputs.shape)}")
        if schema.shape[1] > width:
            inputs = torch.cat([inputs, inputs[:, -1:]], dim=1)
        return self.with_mask(inputs, schema)

    def with_mask(self, inputs: Tensor, replaced: Tensor) -> Tensor:
        """``inputs [..., D]`` with the mask embedding where ``replaced [...]``."""
        return torch.where(replaced[..., None], self.masked_item_embedding.to(inputs.dtype), inputs)

    def forward(self, inputs: Tensor, item_ids: Tensor, training: bool = False, inference: bool = False) -> Tensor:
        """``compute_masked_targets`` followed by ``apply_mask_to_inputs``."""
        inference = inference and not training
        # A subclass may take the two documented arguments only, and keep nothing itself.
        further = {"inference": True} if inference else {}
        info = self._keep(self.compute_masked_targets(item_ids, training=training, **further), not inference)
        return self.apply_mask_to_inputs(inputs, info.schema)

    def forward_output_size(self, input_size: torch.Size) -> torch.Size:
        return input_size

    def transformer_required_arguments(self) -> dict[str, Any]:
        """Tensors that the encoder must be given."""
        return {}

    def transformer_optional_arguments(self) -> dict[str, Any]:
        """Tensors that the encoder may be given."""
        return {}

    @property
    def transformer_arguments(self) -> dict[str, Any]:
        return {**self.transformer_required_arguments(), **self.transformer_optional_arguments()}


class CausalLanguageModeling(MaskSequence):
    """The next item from the past. The schema is True where the input is kept.

    train_on_last_item_seq_only: only the last item of a history is a target in training. With a single target, the
    schema covers all real positions; at inference too, and the targets then are the ids themselves.
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        train_on_last_item_seq_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only, **kwargs)
        self.train_on_last_item_seq_only = train_on_last_item_seq_only

    def training_targets(self, item_ids: Tensor) -> MaskingInfo:
        return self._next(item_ids, self.train_on_last_item_seq_only)

    def evaluation_targets(self, item_ids: Tensor) -> MaskingInfo:
        return self._next(item_ids, self.eval_on_last_item_seq_only)

    def inference_targets(self, item_ids: Tensor) -> MaskingInfo:
        return self.where_known(item_ids)

    def _next(self, item_ids: Tensor, last_only: bool) -> MaskingInfo:
        info = self.predict_all(item_ids)
        if not last_only:
            return info
        return MaskingInfo(item_ids != self.padding_idx, self.last(info.targets))

    def apply_mask_to_inputs(self, inputs: Tensor, mask_schema: Tensor) -> Tensor:
        """``inputs [B, N, D]`` where the schema is True, else the mask embedding.

        Where the last targets were labels, the last column, which has no next item, is zero first.
        """
        if self.has_labels:
            inputs = F.pad(inputs[:, :-1], (0, 0, 0, 1))
        return self.with_mask(inputs, ~mask_schema)


class MaskedLanguageModeling(MaskSequence):
    """Random items from both sides. mlm_probability: chance of each item to be hidden, besides one certain per row."""

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        mlm_probability: float = 0.15,
        **kwargs: Any,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only, **kwargs)
        self.mlm_probability = mlm_probability
        self.scheme = MaskedItemObjective(mlm_probability)

    def training_targets(self, item_ids: Tensor) -> MaskingInfo:
        schema, _ = self.scheme.choose(item_ids != self.padding_idx)
        return self.where_known(item_ids.where(schema, self.padding_idx))


class PermutationLanguageModeling(MaskSequence):
    """Spans of items in a random order; the encoder receives ``perm_mask`` and ``target_mapping``.

    plm_probability: span length over the length of its context. max_span_length: longest span. permute_all: hide all
    items but one. ``perm_mask [B, N, N]`` int64 is 1 where i must not see j; ``target_mapping [B, N, N]`` is the
    identity. Inference uses the targets of evaluation: the last item is hidden and asked for.
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        plm_probability: float = 1 / 6,
        max_span_length: int = 5,
        permute_all: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only, **kwargs)
        self.plm_probability = plm_probability
        self.max_span_length = max_span_length
        self.permute_all = permute_all
        self.scheme = PermutedObjective(plm_probability, max_span_length, permute_all)
        self.perm_mask: Tensor | None = None
        self.target_mapping: Tensor | None = None

    def training_targets(self, item_ids: Tensor) -> MaskingInfo:
        schema, (key, query) = self.scheme.choose(item_ids != self.padding_idx)
        self._attend(key, query, torch.float32)
        return self.where_known(item_ids.where(schema, self.padding_idx))

    def evaluation_targets(self, item_ids: Tensor) -> MaskingInfo:
        """Causal attention; with a single target, no position may look at the last item."""
        info = super().evaluation_targets(item_ids)
        rows, width = item_ids.shape
        place = torch.arange(width, device=item_ids.device).expand(rows, -1)
        if self.eval_on_last_item_seq_only:
            self._attend(torch.where(info.schema, width, place), place, torch.float32)
        else:
            self._attend(place, place, torch.int64)  # Transformers4Rec's dtypes
        return info

    def inference_targets(self, item_ids: Tensor) -> MaskingInfo:
        return self.evaluation_targets(item_ids)

    def _attend(self, key: Tensor, query: Tensor, dtype: torch.dtype) -> None:
        self.perm_mask = (key[:, None, :] > query[:, :, None]).long()
        rows, width = key.shape
        self.target_mapping = torch.eye(width, dtype=dtype, device=key.device).repeat(rows, 1, 1)

    def apply_mask_to_inputs(self, inputs: Tensor, schema: Tensor) -> Tensor:
        """``inputs [B, N, D]`` with the mask embedding at True; unchanged at inference, as in Transformers4Rec."""
        return self.with_mask(inputs, schema) if self.has_labels else inputs

    def transformer_required_arguments(self) -> dict[str, Any]:
        return {"target_mapping": self.target_mapping, "perm_mask": self.perm_mask}


class ReplacementLanguageModeling(MaskedLanguageModeling):
    """Masked modelling for a generator, whose samples replace the hidden items for a discriminator.

    sample_from_batch: fakes come from the batch's own hidden items. Also takes ``mlm_probability`` (0.15).
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        sample_from_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only, **kwargs)
        self.sample_from_batch = sample_from_batch

    def get_fake_tokens(self, itemid_seq: Tensor, target_flat: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Histories with fakes at the hidden positions.

        itemid_seq: ``[B, N]``; target_flat: ``[B * N]`` targets, padding where there is none; logits: a row for each of
        the P hidden items, ``[P, V]`` over all ids, or with sample_from_batch ``[P, P]`` over the hidden items. Returns
        corrupted ids ``[B, N]``, labels ``[B, N]`` int64, 1 = replaced, and sampled indices ``[P]`` within the batch,
        empty without sample_from_batch.
        """
        hidden = (target_flat != self.padding_idx).reshape(itemid_seq.shape)
        if len(logits) != (count := int(hidden.sum())):
            raise UserError(f"get_fake_tokens: {len(logits)} rows of logits for {count} hidden items: give as many")
        if self.sample_from_batch:
            batch_updates = self.sample_from_softmax(logits)
            fakes = target_flat[target_flat != self.padding_idx][batch_updates]
        else:
            column = torch.arange(logits.shape[1], device=logits.device)
            fakes = self.sample_from_softmax(logits.masked_fill(column == self.padding_idx, -torch.inf))
            batch_updates = fakes.new_empty(0)
        corrupted = itemid_seq.masked_scatter(hidden, fakes)
        return corrupted, (corrupted != itemid_seq).long(), batch_updates

    def sample_from_softmax(self, logits: Tensor) -> Tensor:
        """One index per row of ``logits [P, V]``, distributed as their softmax, ``[P]`` int64."""
        if not len(logits):
            return logits.new_empty(0, dtype=torch.int64)
        return F.gumbel_softmax(logits.detach().float()).argmax(-1)
