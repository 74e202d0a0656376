"""Lists that the programs print: configurations, data sets, what is prepared, and parts with their options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from generative_recommenders.config.fields import nearest
from generative_recommenders.config.gin import ROOT
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.published import describe
from generative_recommenders.config.registry import REGISTRIES
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import show

LISTS = ("configs", "datasets", "prepared", *sorted(REGISTRIES))


def show_list(name: str, plugins: Sequence[str], data_root: Path) -> int:
    """Prints the list of one of `LISTS`; UserError with the nearest one and all for any other name."""
    if name not in LISTS:
        raise UserError(f"unknown --list={name}{nearest(name, LISTS)}")
    load_plugins(plugins)
    if name == "configs":  # by the name that --gin_config_file takes, with the first sentence of its comment
        lines = []
        for path in sorted((ROOT / "configs").rglob("*.gin")):
            comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
            description = " ".join(line.lstrip("# ").strip() for line in comment)
            lines.append(f"{path.relative_to(ROOT)}  {re.split(r'(?<=[.]) (?=[A-Z])', description)[0]}")
    elif name == "prepared":
        from generative_recommenders.data.manifest import read_manifest
        from generative_recommenders.data.preparation.prepare import prepared_names

        lines = []
        for each in prepared_names(data_root):
            try:
                counts = read_manifest(data_root / "prepared" / each).counts
                shown = "  ".join(f"{counts[of]:,} {of}" for of in ("users", "items", "events"))
            except UserError as error:  # one that is damaged does not hide the others
                shown = str(error)
            lines.append(f"{each}  {shown}")
        lines = lines or [f"nothing is prepared in {data_root / 'prepared'}"]
    else:
        register_built_in_parts()
        of_data = name in ("datasets", "data_sources")  # functions that take no options, some by many names
        lines = REGISTRIES["data_sources"].names() if of_data else describe(REGISTRIES[name])
    show("\n".join(lines))
    return 0


def register_built_in_parts() -> None:
    """Imports the modules that between them register every part of the package."""
    for module in ("training.trainer", "retrieval.recommender", "data.sources.public"):
        import_module(f"generative_recommenders.{module}")
