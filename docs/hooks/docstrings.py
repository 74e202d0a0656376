"""Docstrings as Markdown for mkdocstrings: arguments as a list, reStructuredText's literals as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = r"(?:[a-z]\w*, )*[a-z]\w*"
ARGUMENT = re.compile(rf"^({NAMES}): (?=\S)", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Runs of lines ``name: what it is`` become a list; a continued line stays with its point."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        start = ARGUMENT.search(paragraph)
        if start is None or paragraph.startswith("    "):
            paragraphs.append(paragraph)
            continue
        before, points = (
            paragraph[: start.start()].rstrip(),
            re.split(rf"\n(?={NAMES}: \S)", paragraph[start.start() :]),
        )
        listed = "\n".join("- " + ARGUMENT.sub(r"`\1`: ", point.replace("\n", " "), count=1) for point in points)
        paragraphs.append(f"{before}\n\n{listed}" if before else listed)
    return re.sub(r"``(.+?)``", r"`\1`", "\n\n".join(paragraphs), flags=re.DOTALL)
