"""Lanes of a reproduction: its gin files, the runs that they ask for, and the data that each of them needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from generative_recommenders.commands.ablation.plan import Ablation, Cell, cells_of
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


@dataclass(frozen=True)
class Lane:
    """One way to split and to choose the epoch: cells whose numbers compare. name: of its file."""

    name: str
    plan: Ablation
    cells: list[Cell]

    def chosen(self, table: str | None, only: Collection[str]) -> list[Cell]:
        """The cells of a table, and of them those that are named, as ``CELL`` or ``LANE/CELL``."""
        tables = self.plan.settings.tables
        in_table = {cell.name for cell in self.cells} if table is None else {*tables.get(table, ())}
        return [
            cell
            for cell in self.cells
            if cell.name in in_table and (not only or {cell.name, f"{self.name}/{cell.name}"} & {*only})
        ]


def lanes_of(name: str, runs: Path, epochs: int | None) -> list[Lane]:
    """All lanes of a data set. epochs: of every run, for a trial; as published where None."""
    bindings = [] if epochs is None else [f"train_fn.num_epochs = {epochs}"]
    found = []
    for file in sorted((FOLDER / name).glob("*.gin")):
        plan = Ablation.load(file, bindings, runs / file.stem)
        cells = cells_of(plan.settings, file)
        names = {cell.name for cell in cells}
        mentioned = [*plan.settings.tables.values(), [*plan.settings.published]]
        unknown = sorted({each for given in mentioned for each in given} - names)
        if unknown:
            raise UserError(f"{file} has no cell {', '.join(unknown)}")
        found.append(Lane(file.stem, plan, cells))
    return found


def data_root_of(lane: Lane, name: str, data_root: Path, raw_path: Path | None) -> Path:
    """Where the prepared data of a lane lie; they are made there where there are none. UserError where they cannot be
    had."""
    _prepare(name, data_root, data_root, raw_path, "file")
    manifest = SequenceDataset.open(prepared_path(data_root, name)).manifest
    tied = manifest.statistics.get("tied_events") and manifest.choices.get("tie_order") != "published"
    if lane.plan.base.data.protocol != "paper" or not tied:
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
