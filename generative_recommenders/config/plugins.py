"""Plug-ins: Python files and modules, named on the command line, that register parts of their own."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from generative_recommenders.errors import UserError

PACKAGE = "gr_plugins"
"""Files are imported as ``gr_plugins.STEM``."""
PLUGIN_HELP = "a Python file or module that registers parts of your own"
"""Help of ``--plugin``, in every program."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in. source: what ``--plugin`` names it by; sha256: of its file, of a package those of all of its
    Python files."""

    source: str
    module: str
    sha256: str


_LOADED: dict[str, Plugin] = {}


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--plugin`` to a program without absl's flags."""
    parser.add_argument("--plugin", action="append", default=[], help=f"{PLUGIN_HELP}; repeatable")


def load_plugins(sources: Sequence[str]) -> list[Plugin]:
    """Imports the plug-ins, each once; UserError in one line where one cannot be imported."""
    return [_load(source) for source in sources]


def plugin_of(module: str) -> Plugin | None:
    """The plug-in that a module belongs to."""
    return next((p for name, p in _LOADED.items() if module == name or module.startswith(name + ".")), None)


def _load(source: str) -> Plugin:
    is_file = source.endswith(".py") or "/" in source
    if is_file:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"--plugin: no file at {path}")
        if path.suffix != ".py":
            raise UserError(f"--plugin: {path} is no Python file: its name must end with .py")
        source = str(path.resolve())
        name = f"{PACKAGE}.{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
        sys.modules.setdefault(PACKAGE, types.ModuleType(PACKAGE))
        spec = importlib.util.spec_from_file_location(name, source)
    elif source in _LOADED:
        return _LOADED[source]
    else:
        name = source
        try:
            spec = importlib.util.find_spec(name)
        except Exception as error:  # of the package around a module, which is imported to find it
            raise _failed(source, error) from error
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin: there is no module {source!r}; a file is named by its path, as ./{source}.py")
    plugin = Plugin(source, name, _sha256(spec))
    if name in _LOADED:
        if _LOADED[name] != plugin:
            raise UserError(f"--plugin: {source} and {_LOADED[name].source} are both {name}, or it changed: rename one")
        return plugin
    _LOADED[name] = plugin  # before its parts are registered, which ask for it
    try:
        if is_file:
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        else:
            importlib.import_module(name)
    except BaseException as error:
        sys.modules.pop(name, None)
        del _LOADED[name]
        raise _failed(source, error) from error
    return plugin


def _sha256(spec: ModuleSpec) -> str:
    """Of a module's code, a package's files in the order of their names; empty where it has no files."""
    folders = spec.submodule_search_locations
    if folders is None:
        files = [Path(spec.origin or "")]
    else:
        files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    contents = [path.read_bytes() for path in files if path.is_file()]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else ""


def _failed(source: str, error: BaseException) -> BaseException:
    """UserError for what the plug-in's code raised; what stops the program stays as it is."""
    if not isinstance(error, Exception):
        return error
    if isinstance(error, UserError):
        return UserError(f"--plugin={source}: {error}")
    calls = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in calls if frame.f_code.co_filename == source]
    place = f", line {lines[-1]}" if lines else ""
    return UserError(f"--plugin={source}{place}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
