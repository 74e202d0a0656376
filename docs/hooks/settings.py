"""Settings and options in the documentation: tables made of the settings' groups and of the registries.

A page asks by a line of its own, ``<!-- settings: NAME ARGUMENTS -->``; what is asked for and is not there stops the
build.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from generative_recommenders.commands.lists import register_built_in_parts  # noqa: E402
from generative_recommenders.config.fields import range_of, type_name  # noqa: E402
from generative_recommenders.config.published import ELSEWHERE, PUBLISHED, targets_in  # noqa: E402
from generative_recommenders.config.registry import REGISTRIES, Part, Registry  # noqa: E402
from generative_recommenders.config.schema import FIELDS, GROUPS, RunSettings  # noqa: E402

register_built_in_parts()

MARK = re.compile(r"^<!-- settings: (\w+) ?(.*?) -->$", re.MULTILINE)
HEAD = "| name | type and range | default | meaning |\n| --- | --- | --- | --- |"
PAGES = {"encoders": "encoders", "losses": "losses"}
"""Kinds of parts that have a page each, and its folder."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](mark[2]), markdown)


def page_of(part: Part) -> str:
    """File name of a part's page, as ``sampledsoftmaxloss``."""
    return part.name.lower()


def names_of(registry: Registry, part: Part) -> list[str]:
    return [each for each in registry.names() if registry[each] is part]


def row(name: str, field: FieldInfo, default: Any, meaning: str) -> str:
    """A line of a table of settings."""
    text = default if default is ... else repr(default)
    kind = type_name(field.annotation).replace("|", "\\|")
    limits = range_of(field)
    shown = "none: give a value" if default is ... else f"`{text}`".replace("|", "\\|")
    if meaning[1:2].isalpha():  # a word, no symbol of an equation
        meaning = meaning[0].upper() + meaning[1:]
    return f"| `{name}` | `{kind}`{', ' + limits if limits else ''} | {shown} | {code(meaning)} |"


def code(text: str) -> str:
    """reStructuredText's literals and references as Markdown's code, on one line."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split())).replace("|", "\\|")


COMMON_OPTIONS = {
    "num_blocks": "Number of blocks.",
    "num_heads": "Number of attention heads of a block.",
    "dropout_rate": "Dropout rate.",
    "activation_checkpoint": "Activations are computed again in the backward pass, which saves memory.",
}
"""Descriptions of options that mean the same in every part that has them; a part's docstring goes before them."""


def help_of(part: Part, option: str) -> str:
    """What the docstrings say of an option: the text after ``OPTION: `` at the beginning of a line, of the part's own,
    its bases' or its constructor's; "" where they say nothing.
    """
    described = part.options.model_fields[option].description
    if described:
        return described
    owners = part.make.__mro__ if isinstance(part.make, type) else (part.make,)
    texts = [inspect.cleandoc(each.__doc__) for each in owners if each.__doc__]
    pattern = rf"^(?:\w+, )*{option}(?:, \w+)*: (.*?)(?=\n\n|\n\w+(?:, \w+)*: |\Z)"
    found = [re.search(pattern, text, re.MULTILINE | re.DOTALL) for text in texts]
    own = next((" ".join(match[1].split()) for match in found if match), None)
    return own or COMMON_OPTIONS.get(option, "")


def settings_table(_: str) -> str:
    """All groups of settings."""
    sections = []
    for group, kind in GROUPS.items():
        defaults = RunSettings()
        rows = [
            row(gin_name, field, defaults.value(gin_name), field.description or "")
            for gin_name, (owner, name) in FIELDS.items()
            if owner == group
            for field in [kind.model_fields[name]]
        ]
        said = code((kind.__doc__ or "").split("\n\n")[0])
        sections.append(f"### {group.replace('_', ' ').capitalize()}\n\n{said}\n\n{HEAD}\n" + "\n".join(rows))
    return "\n\n".join(sections)


def published_table(_: str) -> str:
    """Published names that fill an option of the chosen part."""
    rows = []
    for gin_name, targets in PUBLISHED.items():
        filled = [
            (part, target.option)
            for target in targets
            for part in target.registry.parts()
            if targets_in(part).get(gin_name) is target
        ]
        parts = ", ".join(f"`{part.gin_name}.{option}`" for part, option in filled)
        part, option = filled[0]
        field = part.options.model_fields[option]
        default = RunSettings().value(gin_name)
        rows.append(row(gin_name, field, default, f"{help_of(part, option)} Sets {parts}."))
    return f"{HEAD}\n" + "\n".join(rows)


def part_table(asked: str) -> str:
    """``KIND NAME``: the options of one part, or that it has none."""
    kind, name = asked.split()
    registry = REGISTRIES[kind]
    part = registry[name]
    filled = {t.option: (published, t.default) for published, t in targets_in(part).items()}
    rows = []
    for option, field in part.options.model_fields.items():
        published, default = filled.get(option, ("", None))
        meaning = help_of(part, option) + (f" Set by `{published}`." if published else "")
        rows.append(
            row(
                f"{part.gin_name}.{option}",
                field,
                part.default(option) if default is None else default,
                meaning,
            )
        )
    aliases = names_of(registry, part)[1:]
    also = f" Other names: {', '.join(f'`{each}`' for each in aliases)}." if aliases else ""
    chosen = f"`--dataset={part.name}`" if kind == "data_sources" else f'`{registry.setting} = "{part.name}"`'
    options = f"{HEAD}\n" + "\n".join(rows) if rows else "It has no options."
    return f"Chosen by {chosen}.{also}\n\n{options}"


def parts_table(asked: str) -> str:
    """``KIND [LEVEL]``: every part of a kind with its summary and options; one line and a link for those that have a
    page."""
    kind, _, level = asked.partition(" ")
    registry, sections = REGISTRIES[kind], []
    for part in registry.parts():
        if not part.make.__module__.startswith("generative_recommenders."):  # of a plug-in
            continue
        summary = code(re.split(r"\n\n|\n\w+(?:, \w+)*: ", (part.make.__doc__ or "").strip())[0])
        if kind in PAGES:
            link = f"{PAGES[kind]}/{page_of(part)}.md"
            sections.append(f"- [{part.name}]({link}) (`{part.gin_name}`): {summary}")
        else:
            sections.append(f"{level or '###'} {part.name}\n\n{summary}\n\n{part_table(f'{kind} {part.name}')}")
    return ("\n" if kind in PAGES else "\n\n").join(sections)


def elsewhere_table(_: str) -> str:
    """Parameters of the published functions that are no settings here."""
    rows = [f"| `{name}` | {code(what)} |" for name, what in ELSEWHERE.items()]
    return "| published name | what takes its place |\n| --- | --- |\n" + "\n".join(rows)


TABLES: dict[str, Callable[[str], str]] = {
    "groups": settings_table,
    "published": published_table,
    "part": part_table,
    "parts": parts_table,
    "elsewhere": elsewhere_table,
}
