"""Other libraries' documented names and signatures over this package: RePlay, Transformers4Rec, genrec, the HSTU
program.

A name is read from the first module below that exports it, on first use. RePlay's have their own module paths in
`compat.replay`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = (
    "replay.data.schema",
    "replay.models.nn.loss",
    "replay.nn.agg",
    "replay.nn.attention",
    "replay.nn.embedding",
    "replay.nn.ffn",
    "replay.nn.head",
    "replay.nn.lightning.postprocessor",
    "replay.nn.loss",
    "replay.nn.mask",
    "replay.nn.output",
    "replay.nn.protocols",
    "replay.nn.sequential",
    "replay.nn.sequential.twotower",
    "replay.nn.transform",
    "replay.nn.transform.template",
    "genrec.modules",
    "meta.modules",
    "transformers4rec.masking",
    "transformers4rec.metrics",
)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    for path in _MODULES:
        module = import_module(f"{__name__}.{path}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for path in _MODULES for name in import_module(f"{__name__}.{path}").__all__})
