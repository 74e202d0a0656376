"""Checkpoints of the HSTU authors' public research program, for SASRec and HSTU (arXiv 2402.17152).

They are ``torch.save`` files of ``{"epoch", "model_state_dict", "optimizer_state_dict"}``; they are read with
``weights_only``, which builds tensors and plain containers and runs no code of the file.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from generative_recommenders.errors import UserError, first_line

ITEM_TABLE = "items.table"
POSITIONS = "sequence.preprocessor.position"
_NAMES = (
    (r"_embedding_module\._item_emb\.weight", ITEM_TABLE),
    (r"_input_features_preproc\._pos_emb\.weight", POSITIONS),
    (r"attention_layers\.(\d+)\.in_proj_(weight|bias)", r"sequence.encoder.blocks.\1.in_proj.\2"),
    (r"attention_layers\.(\d+)\.out_proj\.(weight|bias)", r"sequence.encoder.blocks.\1.out_proj.\2"),
    (r"forward_layers\.(\d+)\._conv1d\.0\.(weight|bias)", r"sequence.encoder.blocks.\1.ffn_in.\2"),
    (r"forward_layers\.(\d+)\._conv1d\.3\.(weight|bias)", r"sequence.encoder.blocks.\1.ffn_out.\2"),
    (r"_hstu\._attention_layers\.(\d+)\._uvqk", r"sequence.encoder.blocks.\1.uvqk"),
    (r"_hstu\._attention_layers\.(\d+)\._o\.(weight|bias)", r"sequence.encoder.blocks.\1.output.\2"),
    (r"_hstu\._attention_layers\.(\d+)\._rel_attn_bias\._pos_w", r"sequence.encoder.blocks.\1.bias.position"),
    (r"_hstu\._attention_layers\.(\d+)\._rel_attn_bias\._ts_w", r"sequence.encoder.blocks.\1.bias.time"),
)
_DERIVED = re.compile(r"(_hstu\.)?_attn_mask")  # buffers that follow from sizes
_UNREADABLE = (
    pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError,
    AttributeError, ArithmeticError, AssertionError, MemoryError,
)  # fmt: skip
"""Errors that ``torch.load`` raises for files that it did not write."""


def load_meta_checkpoint(model: torch.nn.Module, path: Path | str, item_ids: pa.Array | None) -> None:
    """Fills a `SequenceRecommender` of the same sizes from such a file; UserError where names or shapes do not fit.

    item_ids: the prepared data's original ids ``[V]``, integers as text, where the rows of the authors' item table are
    original ids (MovieLens; `reorder_items`); None where they are numbered as here, from 1 in sorted order of the ids
    (Amazon).
    """
    values = rename_parameters(read_meta_checkpoint(path))
    if item_ids is not None and ITEM_TABLE in values:
        values[ITEM_TABLE] = reorder_items(values[ITEM_TABLE], item_ids)
    parameters = dict(model.named_parameters())
    if POSITIONS in values and POSITIONS in parameters:
        # A longer table has rows that no history reaches.
        values[POSITIONS] = values[POSITIONS][: parameters[POSITIONS].shape[0]]
    missing, unused = parameters.keys() - values.keys(), values.keys() - parameters.keys()
    if missing:
        raise UserError(f"the checkpoint lacks {_listed(missing)}, which the configured model has")
    if unused:
        raise UserError(f"the checkpoint has {_listed(unused)}, which the configured model lacks")
    for name, parameter in parameters.items():
        if values[name].shape != parameter.shape:
            theirs, ours = list(values[name].shape), list(parameter.shape)
            raise UserError(f"{name} is {theirs} in the checkpoint and {ours} in the configured model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def read_meta_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """The model's parameters under the authors' names, on the CPU, without the prefix of data-parallel training."""
    state = read_state(path, "model_state_dict", "a file saved by the HSTU program")
    return {name.removeprefix("module."): value for name, value in state.items()}


def read_state(path: Path | str, key: str, wanted: str) -> dict[str, Tensor]:
    """The tensors below ``key`` of a file by ``torch.save``, on the CPU. wanted: what to give instead, for errors."""
    if (reason := _builds_more_than_it_holds(Path(path))) is not None:
        raise UserError(f"{path} is not a checkpoint that can be read as plain tensors: {reason}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle protocol of files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise UserError(f"{path} is not a checkpoint that can be read as plain tensors: {first_line(error)}") from error
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(each, Tensor) for each in state.values()):
        raise UserError(f"{path} holds no {key} of tensors: give {wanted}")
    return {str(name): value for name, value in state.items()}


def _builds_more_than_it_holds(path: Path) -> str | None:
    """Why reading a file could fill more memory than it has bytes; None where it cannot, and for unreadable files,
    of which ``torch.load`` says more."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as pack:
                entries = pack.infolist()
            # torch.save packs nothing.
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                return "its entries are packed"
        # A few bytes of pickle make a bytearray as long as they like, and tensors need none.
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return "it builds a bytearray" if content.find(b"bytearray") >= 0 else None
    except (*_UNREADABLE, zipfile.BadZipFile):
        return None


def rename_parameters(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names to ours; 1x1 convolutions ``[out, in, 1]`` become matrices. UserError for an unknown name and for a
    tensor that is no plain, finite weight."""
    weights = {name: value for name, value in values.items() if not _DERIVED.fullmatch(name)}
    names = {
        name: re.sub(theirs, ours, name) for name in weights for theirs, ours in _NAMES if re.fullmatch(theirs, name)
    }
    if unknown := weights.keys() - names.keys():
        raise UserError(f"the checkpoint is not of SASRec or HSTU: unknown parameters {_listed(unknown)}")
    renamed = {}
    for name, ours in names.items():
        value = weights[name]
        _check_weights(name, value, is_table=ours in (ITEM_TABLE, POSITIONS))
        renamed[ours] = value.squeeze(-1) if ".ffn_" in ours and value.dim() == 3 else value
    return renamed


def _check_weights(name: str, value: Tensor, is_table: bool) -> None:
    """Refuses what cannot be copied as weights, and what takes more memory than the file has bytes for it."""
    wrong = None
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_nested:
        wrong = "is no plain tensor"
    elif value.layout != torch.strided or value.device != torch.device("cpu"):
        wrong = f"is no plain tensor ({str(value.layout).removeprefix('torch.')} on {value.device})"
    elif value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        wrong = f"holds {str(value.dtype).removeprefix('torch.')}, not floating-point numbers"
    elif value.untyped_storage().nbytes() < value.numel() * value.element_size():
        wrong = f"has fewer values in the file than its shape {list(value.shape)}"
    elif not value.float().isfinite().all():
        wrong = "holds NaN or infinite values"
    elif is_table and value.dim() != 2:
        wrong = f"has {value.dim()} dimensions, not 2"
    if wrong is not None:
        raise UserError(f"{name} of the checkpoint {wrong}: give a file of plain, finite weights")


def are_numbers(item_ids: pa.Array) -> bool:
    """Whether all original ids are numbers from 0 on, as in MovieLens and the authors' files of Books: then they are
    rows of the authors' item tables. Amazon's own ids, with leading zeros and letters, are not."""
    return all(re.fullmatch("0|[1-9][0-9]*", each) for each in item_ids.to_pylist())


def reorder_items(table: Tensor, item_ids: pa.Array) -> Tensor:
    """Rows by original id ``[max id + 1, D]`` to rows by internal id ``[V + 1, D]``; row 0 stays.

    Where an id is 0, row ``id + 1`` of ``[max id + 2, D]`` is the item's.
    """
    try:
        ids = torch.tensor([*map(int, item_ids.to_pylist())], dtype=torch.int64)
    except (ValueError, TypeError):
        raise UserError(
            "the data set's item ids are not integers, so the rows of the checkpoint's item table cannot be told apart"
        ) from None
    shift = int((ids == 0).any())  # their reader adds 1 to ids that begin at 0, since row 0 is padding's
    last = table.shape[0] - 1 - shift
    wrong = ids[(ids < 0) | (ids > last)]
    if wrong.numel():
        raise UserError(
            f"item id {int(wrong[0])} of the data set has no row in the checkpoint's item table, "
            f"which ends at id {last}: it was trained on other data"
        )
    return table[torch.cat([ids.new_zeros(1), ids + shift])]


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
