"""Plug-ins: Python files and modules, named on the command line, that register parts of their own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generative_recommenders.errors import UserError

PACKAGE = "gr_plugins"
"""Files are imported as ``gr_plugins.STEM``."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in. source: what ``--plugin`` names it by; sha256: of its file."""

    source: str
    module: str
    sha256: str


_LOADED: dict[str, Plugin] = {}


def load_plugins(sources: Sequence[str]) -> list[Plugin]:
    """Imports the plug-ins, each once; UserError in one line where one cannot be imported."""
    return [_load_file(Path(each)) if _is_file(each) else _load_module(each) for each in sources]


def plugin_of(module: str) -> Plugin | None:
    """The plug-in that a module belongs to."""
    return next((p for name, p in _LOADED.items() if module == name or module.startswith(name + ".")), None)


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source


def _load_file(path: Path) -> Plugin:
    if not path.is_file():
        raise UserError(f"--plugin: no file at {path}")
    path = path.resolve()
    name = f"{PACKAGE}.{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
    plugin = Plugin(str(path), name, hashlib.sha256(path.read_bytes()).hexdigest())
    if name in _LOADED:
        if _LOADED[name] != plugin:
            raise UserError(
                f"--plugin: {path} and {_LOADED[name].source} are both {name}, or it changed: rename one"
            )
        return plugin
    sys.modules.setdefault(PACKAGE, types.ModuleType(PACKAGE))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _LOADED[name] = plugin  # before its parts are registered, which ask for it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name], _LOADED[name]
        raise _failed(str(path), error) from error
    return plugin


def _load_module(source: str) -> Plugin:
    if source in _LOADED:
        return _LOADED[source]
    try:
        spec = importlib.util.find_spec(source)
        if spec is None:
            raise UserError(
                f"--plugin: there is no module {source!r}; a file is named by its path, as ./{source}.py"
            )
        origin = Path(spec.origin) if spec.origin else None
        sha256 = hashlib.sha256(origin.read_bytes()).hexdigest() if origin and origin.is_file() else ""
        _LOADED[source] = Plugin(source, source, sha256)
        importlib.import_module(source)
    except UserError:
        _LOADED.pop(source, None)
        raise
    except BaseException as error:
        _LOADED.pop(source, None)
        raise _failed(source, error) from error
    return _LOADED[source]


def _failed(source: str, error: BaseException) -> BaseException:
    """UserError for what the plug-in's code raised; what stops the program stays as it is."""
    if not isinstance(error, Exception):
        return error
    if isinstance(error, UserError):
        return UserError(f"--plugin={source}: {error}")
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source:
            line = trace.tb_lineno
        trace = trace.tb_next
    place = f", line {line}" if line else ""
    return UserError(
        f"--plugin={source}{place}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    )
