"""ARCHITECTURE.md, "Who may import whom", read from the syntax trees."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "generative_recommenders"
LEVELS = (
    {"errors", "types"}, {"config"}, {"ops", "distributed"}, {"data", "modeling"}, {"objectives"}, {"build",
    "checkpoint"}, {"retrieval"}, {"evaluation"}, {"training"}, {"run"}, {"lightning"}, {"compat"}, {"commands"},
    {"report", "ablate", "reproduce", "serve"}, {"__main__"},
)  # fmt: skip
"""Lowest first. A package imports from itself and from lower levels; not from others of its own level."""
KNOW_DISTRIBUTED, KNOW_GIN = {"distributed", "training"}, {"config"}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def part_of(path: Path) -> str:
    """The folder, or the module, directly below the package."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Full dotted names of everything that a file imports, wherever in it the import stands."""
    own = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own[: len(own) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@functools.cache
def names_in(path: Path) -> tuple[str, ...]:
    return tuple(imported(path))


def parts_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in names_in(path))
    parts = {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}
    return {part for part in parts if (ROOT / PACKAGE / part).exists() or (ROOT / PACKAGE / f"{part}.py").exists()}


def knows(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names_in(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    level = next((i for i, parts in enumerate(LEVELS) if part in parts), None)
    assert level is not None, f"{part} has no level: add it here and to ARCHITECTURE.md"
    allowed = set().union(*LEVELS[:level]) | {part}
    assert not parts_imported(path) - allowed


def test_modules_import_in_no_circle_and_folders_hold_few() -> None:
    found = json.loads(
        subprocess.run([sys.executable, ROOT / "tools" / "house.py", "--json"], capture_output=True, check=True).stdout
    )["checkout"]
    assert found["import circles"] == []
    assert max(found["modules a folder"].values()) <= 15


def test_only_listed_parts_import_torch_distributed() -> None:
    knowing = {part_of(path) for path in FILES if knows(path, "torch.distributed")}
    assert knowing <= KNOW_DISTRIBUTED
    assert knowing  # the rule finds what it looks for


def test_only_config_imports_gin() -> None:
    knowing = {part_of(path) for path in FILES if knows(path, "gin")}
    assert knowing == KNOW_GIN


def test_only_the_extra_imports_lightning() -> None:
    """An extra: nothing else may need it."""
    assert {part_of(path) for path in FILES if knows(path, "lightning")} == {"lightning"}


def test_nothing_imports_the_programs() -> None:
    for path in FILES:
        assert not knows(path, "main")
        assert not knows(path, "preprocess_public_data")


def test_the_rules_see_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / PACKAGE / "data" / "x.py"
    file.parent.mkdir(parents=True)
    lines = [
        "import torch.distributed as dist",
        "from ..modeling import layout",
        "from . import batching",
        "from torch import distributed",
        "def f():\n    from generative_recommenders.training.step import TrainingStep",
        "import importlib\nimportlib.import_module('gin')",
    ]
    file.write_text("\n".join(lines))
    names = set(imported(file, tmp_path))
    assert {
        "torch.distributed", f"{PACKAGE}.modeling.layout", f"{PACKAGE}.data.batching",
        f"{PACKAGE}.training.step.TrainingStep", "gin",
    } <= names  # fmt: skip


def test_kernels_and_devices_stay_where_they_belong() -> None:
    """Models and losses read as equations: what depends on a device is chosen in ops (and by the trainer)."""
    for path in FILES:
        code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body)
        if part_of(path) != "ops":
            assert "autograd.Function" not in code, path
        if part_of(path) not in {"ops", "distributed", "training"}:
            assert "device.type" not in code, path
