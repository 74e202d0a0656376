"""Exported names in the documentation: what a package exports lazily, for mkdocstrings, which reads no
``__getattr__``."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MARK = re.compile(r"^<!-- exports: (\S+) -->$", re.MULTILINE)
ELSEWHERE = {"HSTU": "../encoders/hstu.md", "SASRec": "../encoders/sasrec.md"}
"""Exported names that have a page of their own."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with a reference for every name that the package exports."""
    return MARK.sub(lambda mark: exported(mark[1]), markdown)


def exported(package: str) -> str:
    """Register functions as a table, everything else by the module that defines it."""
    module = importlib.import_module(package)
    registers, links, references = [], [], []
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if name.startswith("register_"):
            registry = value.__self__
            registers.append(f"| `{name}` | {registry.kind} | `{registry.setting}` |")
        elif name in ELSEWHERE:
            links.append(f"[`{name}`]({ELSEWHERE[name]})")
        elif hasattr(value, "__qualname__"):
            references.append(
                f"::: {value.__module__}.{value.__qualname__}\n    options:\n      show_root_full_path: false"
            )
    head = "| function | registers | chosen by |\n| --- | --- | --- |"
    return "\n\n".join(
        [
            *references,
            f"Encoders have pages of their own: {', '.join(links)}.",
            f"## Functions that register parts\n\n{head}\n" + "\n".join(registers),
            "::: generative_recommenders.config.registry.Registry.register",
        ]
    )
