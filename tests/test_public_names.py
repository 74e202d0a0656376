"""Names that the packages export."""

from __future__ import annotations

import ast
import enum
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "generative_recommenders"
ROOT = Path(__file__).parents[1]
PUBLIC = ("", "compat")
"""Packages that export names of their modules."""


def package(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_export_is_there_and_ours(name: str) -> None:
    module = package(name)
    for exported in module.__all__:
        value = getattr(module, exported)
        if isinstance(value, type):
            assert value.__module__.startswith(PACKAGE), exported
            assert value.__doc__ or issubclass(value, enum.Enum), f"{exported} has no docstring"


def test_type_checkers_and_editors_see_what_the_package_exports() -> None:
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    read = {each.name: node.module for node in imports for each in node.names if node.module.startswith(PACKAGE)}
    assert sorted([*read, "__version__"]) == sorted(package("").__all__)
    for exported, module in read.items():
        assert getattr(importlib.import_module(module), exported) is getattr(package(""), exported)


def test_the_package_is_imported_without_torch() -> None:
    code = f"import sys, {PACKAGE} as g; print('torch' in sys.modules, g.build_model.__name__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "build_model", "True"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_that_does_not_exist(name: str) -> None:
    with pytest.raises(AttributeError, match="Sasrek"):
        _ = package(name).Sasrek
