"""Plan of an ablation: the cells that its gin file spans, and the runs of each."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from absl import logging
from annotated_types import Ge
from pydantic import Field

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.fields import Section
from generative_recommenders.config.gin import ABLATION, differences, load_ablation, load_settings, resolved_text
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import holds_run

MAX_CELLS = 1000
EPOCHS, SEED = "train_fn.num_epochs", "train_fn.random_seed"


class AblationSettings(Section):
    """Contents of an ablation's gin file beside the settings that all of its cells share.

    cells: by name, what a cell binds, ``{"NAME": {"train_fn.loss_module": "CE"}}``; ``"include"`` names gin files that
    come before its bindings. grid: values by gin name, of which every combination is a cell, of each of ``cells`` where
    there are some. search: ranges by gin name, see `search.distribution`. metric: what the tests compare and a search
    maximises.
    seeds: runs of a cell, one where it is not named.

    For `generative_recommenders.reproduce`: title of the lane. tables: cells by table. published: figures by cell, with
    their ``source``. data: counts of the data that the figures are of. needs: what the runs want of a machine.
    """

    gin_name: ClassVar[str] = ABLATION

    cells: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    metric: Literal["ndcg@10", "hr@10", "mrr"] = "ndcg@10"
    seeds: dict[str, Annotated[int, Ge(1)]] = Field(default_factory=dict)
    title: str = ""
    tables: dict[str, list[str]] = Field(default_factory=dict)
    published: dict[str, dict[str, Any]] = Field(default_factory=dict)
    data: dict[str, int] = Field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class Cell:
    """One configuration of an ablation. bindings: gin statements over its file, includes among them."""

    name: str
    bindings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run of a cell. folder: of main.py; beside it, by the same name, lie its gin file and the log of its
    processes."""

    cell: Cell
    folder: Path
    settings: RunSettings
    resolved: str

    @property
    def config(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.gin")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def measured(self) -> Path:
        """Each user's rank of the test target, as ``--users_metrics`` writes them."""
        return self.folder.with_name(f"{self.folder.name}.users.parquet")

    @property
    def settings_sha256(self) -> str:
        """Of the resolved settings but for the seed, so that the runs of a cell have it in common."""
        seed = f"{SEED} = {self.settings.schedule.random_seed}\n"
        return hashlib.sha256(self.resolved.replace(seed, "").encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True)
class Ablation:
    """An ablation's gin file, with the bindings that go over all of its cells."""

    file: Path
    bindings: tuple[str, ...]
    out: Path
    settings: AblationSettings
    base: RunSettings

    @classmethod
    def load(cls, file: Path, bindings: Sequence[str], out: Path) -> Ablation:
        """UserError, with the place in the file, for what cannot be meant."""
        register_built_in_parts()  # what cells may choose
        values, base = load_ablation(file, bindings, AblationSettings.model_fields)
        settings = AblationSettings(**values)
        varied = [*settings.grid, *settings.search, *itertools.chain(*settings.cells.values())]
        if SEED in varied:  # each run binds its own over it: cells that differ in it alone would be one
            raise UserError(f"{file}: a cell, the grid or the search binds {SEED}: give --seeds or ablation.seeds")
        return cls(file, tuple(bindings), out, settings, base)

    @property
    def name(self) -> str:
        return self.file.stem

    @cached_property
    def cells(self) -> list[Cell]:
        return cells_of(self.settings, self.file)

    def chosen(self, only: Collection[str], table: str | None = None) -> list[Cell]:
        """The cells of a table, or all; of them those that are named, as ``CELL`` or ``FILE/CELL``, or all."""
        in_table = {cell.name for cell in self.cells} if table is None else {*self.settings.tables.get(table, ())}
        named = [cell for cell in self.cells if not only or {cell.name, f"{self.name}/{cell.name}"} & {*only}]
        return [cell for cell in named if cell.name in in_table]

    def run(self, cell: Cell, seed: int) -> Run:
        """The run of a cell; UserError where its settings cannot be, or where its folder holds another run."""
        over = [*cell.bindings, *self.bindings, f"{SEED} = {seed}"]
        try:
            _, settings = load_ablation(self.file, over, AblationSettings.model_fields)
        except UserError as error:
            raise UserError(f"{self.file}, cell {cell.name}: {error}") from error
        run = Run(cell, self.out / cell.name / f"seed-{seed}", settings, resolved_text(settings))
        if (made := made_settings(run)) is not None:
            # More epochs than before are the same run, which is resumed; fewer are another one.
            for name, before, now in differences(made, settings):
                if name != EPOCHS or now < before:
                    raise UserError(
                        f"{run.folder} was made with {name} = {before!r}, not {now!r}: give another folder of runs"
                    )
            saved = CheckpointStore(run.folder / "checkpoints", read_only=True).newest_settings() or {}
            hashes = [{each["sha256"] for each in some} for some in (saved.get("plugins", []), settings.plugin_parts())]
            if hashes[0] != hashes[1]:
                logging.warning(
                    "%s was trained with another version of its plug-in: remove %s to train it anew",
                    run.name, run.folder,
                )  # fmt: skip
        return run

    def seeds(self, cell: Cell, count: int | None) -> list[int]:
        """The seed of the file and those after it: ``count``, or as many as the file says of the cell where None."""
        first = self.base.schedule.random_seed
        return [first + i for i in range(self.settings.seeds.get(cell.name, 1) if count is None else count)]


def cells_of(settings: AblationSettings, file: Path) -> list[Cell]:
    """The cells of lists and grids; UserError for none, too many, two of one name, and seeds of another one."""
    if not settings.cells and not settings.grid:
        raise UserError(f"{file} names no cells: give ablation.cells or ablation.grid")
    named = []
    for name, given in settings.cells.items():
        if name != _file_name(name) or not name.strip("."):
            raise UserError(f"{file}: cell {name!r} gives a folder its name: use letters, digits and . _ = , + -")
        included = given.get("include", [])
        statements = [f"include {path!r}" for path in (included if isinstance(included, (list, tuple)) else [included])]
        statements += [f"{each} = {value!r}" for each, value in given.items() if each != "include"]
        named.append(Cell(name, tuple(statements)))
    for name, values in settings.grid.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"{file}: ablation.grid[{name!r}] is {values!r}: give a list of values")
    if max(len(named), 1) * math.prod(map(len, settings.grid.values())) > MAX_CELLS:
        raise UserError(f"{file}: more than {MAX_CELLS} cells")
    found: dict[str, Cell] = {}
    for cell, values in itertools.product(named or [Cell("")], itertools.product(*settings.grid.values())):
        combination = [*zip(settings.grid, values)]
        labels = [f"{name.rpartition('.')[2]}={value}" for name, value in combination]
        bound = tuple(f"{name} = {value!r}" for name, value in combination)
        name = _file_name(",".join(filter(None, (cell.name, *labels))))
        if name in found:
            raise UserError(f"{file}: two cells are named {name}: give ablation.cells names that differ")
        found[name] = Cell(name, cell.bindings + bound)
    if unknown := sorted(settings.seeds.keys() - found.keys()):
        raise UserError(f"{file}: ablation.seeds is of {', '.join(unknown)}, and no cell is named so")
    return [*found.values()]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=,+-]+", "-", text)[:120]


def made_settings(run: Run) -> RunSettings | None:
    """The settings that the run in the folder was made from; None where there is no run yet."""
    if not holds_run(run.folder):
        return None
    resolved = run.folder / "resolved.gin"
    if not resolved.exists():
        raise UserError(f"{run.folder} does not say what it was made from: give another folder of runs")
    return load_settings([resolved])


def names_in(given: str, known: Collection[str]) -> list[str]:
    """Names with commas between, as flags take them. Names of a grid's cells have commas of their own."""
    parts, names = [part for part in given.split(",") if part], []
    while parts:
        taken = next((end for end in range(len(parts), 1, -1) if ",".join(parts[:end]) in known), 1)
        names.append(",".join(parts[:taken]))
        parts = parts[taken:]
    return names
