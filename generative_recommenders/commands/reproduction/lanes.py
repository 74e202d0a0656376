"""Lanes of a reproduction, and the data that each of them needs.

A lane is one way to split and to choose the epoch, in a gin file of its own: an `Ablation` whose cells compare.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from absl import logging

from generative_recommenders.commands.ablation.plan import Ablation
from generative_recommenders.commands.setup import prepare_once
from generative_recommenders.config.gin import ROOT
from generative_recommenders.data.preparation.prepare import prepared_path
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

FOLDER = ROOT / "configs" / "reproduce"
PUBLISHED_ORDER = "published-order"
"""Below the data root: data whose ties in time are in the published programs' order, for lanes of protocol "paper"."""


def known_names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def lanes_of(name: str, runs: Path, epochs: int | None) -> list[Ablation]:
    """All lanes of a data set. epochs: of every run, for a trial; as published where None."""
    bindings = [] if epochs is None else [f"train_fn.num_epochs = {epochs}"]
    lanes = [Ablation.load(file, bindings, runs / file.stem) for file in sorted((FOLDER / name).glob("*.gin"))]
    for lane in lanes:
        mentioned = itertools.chain(*lane.settings.tables.values(), lane.settings.published)
        if unknown := sorted({*mentioned} - {cell.name for cell in lane.cells}):
            raise UserError(f"{lane.file} has no cell {', '.join(unknown)}")
    return lanes


def data_root_of(lane: Ablation, name: str, data_root: Path, raw_path: Path | None) -> Path:
    """Where the prepared data of a lane lie; they are made there where there are none. UserError where they cannot be
    had."""
    _prepare(name, data_root, data_root, raw_path, "file")
    manifest = SequenceDataset.open(prepared_path(data_root, name)).manifest
    tied = manifest.statistics.get("tied_events") and manifest.choices.get("tie_order") != "published"
    if lane.base.data.protocol != "paper" or not tied:
        return data_root
    other = data_root / PUBLISHED_ORDER
    _prepare(name, data_root, other, raw_path, "published")
    return other


def _prepare(name: str, raw_root: Path, root: Path, raw_path: Path | None, tie_order: str) -> None:
    """raw_root: where raw files are kept, once for both orders."""
    texts = [] if raw_path is None else [raw_path / "interactions.txt", raw_path / "interactions.txt.gz"]
    source = "sasrec-text" if any(text.exists() for text in texts) else name

    def raw() -> RawRatings:
        found = resolve(source, raw_path=raw_path, data_root=raw_root, result_name=name)
        return dataclasses.replace(found, tie_order=tie_order)

    if raw_path is not None and prepared_path(root, name).exists():
        logging.info("%s is prepared already: --raw_path is not read", prepared_path(root, name))
    try:
        prepare_once(prepared_path(root, name), raw)
    except UserError as error:
        raise UserError(
            f"{name} cannot be had on this machine: {error} (give the raw files by --raw_path, or prepared ones by "
            "--data_root)"
        ) from error
