"""Gin names and their settings, each written once.

Published configurations parse unchanged; a name that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import io
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gin
import gin.config
from gin import config_parser

from generative_recommenders.config import schema as s
from generative_recommenders.config.registry import parts_by_gin_name
from generative_recommenders.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
"""Includes in gin files are looked up from here, then from the working directory."""
BINDINGS = "the bindings"
FILE_LIMIT = 1 << 20  # bytes
MAX_FILES = 100
MAX_ENTRIES = 10_000
"""Of a value, with names for values put in their places."""
MAX_STRINGS = 100
"""In a row: gin joins them one by one, each time copying what it has."""
GIN_FAULTS = (
    ValueError, TypeError, OSError, AttributeError, NameError, LookupError, RecursionError, MemoryError,
)  # fmt: skip
"""What gin raises for texts that it cannot make sense of."""

_CONFIGURABLES = {
    name: gin.external_configurable(kind, name=name, module="generative_recommenders")
    for name, (_, kind) in s.SECTIONS.items()
}


def load_settings(gin_files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[s.RunSettings, str]:
    """Parses files and bindings into settings, and gives the resolved configuration, defaults included.

    Nothing in them runs: gin's ``import`` is refused. Raises UserError in one line: a missing file, a syntax error
    with its place, an unknown name with the nearest one, a value of the wrong type.
    """
    gin.clear_config()
    parsed = _Parsed()
    for path in gin_files:
        _bind_file(Path(path), f"no gin file at {path}", parsed)
    _bind_text("\n".join(bindings), BINDINGS, parsed)
    parsed.check()
    try:
        built = {section: _build(name) for name, (section, _) in s.SECTIONS.items()}
    except UserError as error:  # gin adds where it was called from, over several lines
        raise UserError(str(error).splitlines()[0]) from error
    except GIN_FAULTS as error:
        raise UserError(explain(error)) from error
    settings = s.RunSettings(**built, options=_part_options(parsed, {}))
    _check_not_twice(parsed, settings)
    return settings, resolved_text(settings)


class _Parsed(gin.config.ParserDelegate):
    """What the texts of one configuration hold. files: their number ends includes that go in a circle or multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.files = 0
        self.macros: dict[str, tuple[str, Any]] = {}
        """Name to the place where it is given a value, and the value."""
        self.part_names: set[str] = set()
        """gin names of the registered parts that options are bound on."""
        self.bound_names: set[str] = set()
        self.bound: list[tuple[str, Any]] = []
        """Place and value of what is bound."""
        self.references: dict[int, tuple[Any, str]] = {}
        """By identity: a reference within a value, and the name that it refers to."""

    def macro(self, macro_name: str) -> Any:
        reference = super().macro(macro_name)
        self.references[id(reference)] = reference, macro_name
        return reference

    def check(self) -> None:
        """UserError for what no setting is, and for values that grow without measure."""
        self.check_macros()
        known: dict[str, int] = {}
        for place, value in self.bound:
            if self._entries(value, known) > MAX_ENTRIES:
                raise UserError(
                    f"gin: {place}: a value of more than {MAX_ENTRIES} entries, or one that holds itself"
                )

    def _entries(self, value: Any, known: dict[str, int]) -> int:
        if id(value) in self.references:
            name = self.references[id(value)][1]
            if name not in known:
                known[name] = MAX_ENTRIES + 1  # what it is within itself
                known[name] = self._entries(self.macros[name][1], known) if name in self.macros else 1
            return known[name]
        if isinstance(value, dict):
            return 1 + sum(self._entries(x, known) for pair in value.items() for x in pair)
        if isinstance(value, (list, tuple)):
            return 1 + sum(self._entries(x, known) for x in value)
        return 1

    def check_macros(self) -> None:
        """UserError for a value without an owner, which no %name refers to: a setting whose owner was left out."""
        referred = {name for _, name in self.references.values()}
        for name, (place, _) in self.macros.items():
            if name in referred:
                continue
            known = [
                f"{owner}.{f.name}"
                for owner, (_, kind) in s.SECTIONS.items()
                for f in dataclasses.fields(kind)
            ]
            close = [each for each in known if each.endswith("." + name)] or difflib.get_close_matches(
                name, known, 1, 0.5
            )
            hint = f"; did you mean {close[0]!r}?" if close else ": write it as OWNER.NAME"
            raise UserError(f"gin: {place}: {name!r} is no setting, and no %{name} refers to it{hint}")


def _bind_file(path: Path, missing: str, parsed: _Parsed) -> None:
    if not path.is_file():
        raise UserError(missing)
    parsed.files += 1
    if parsed.files > MAX_FILES:
        raise UserError(f"gin: more than {MAX_FILES} files, {path} the last: do includes go in a circle?")
    with open(path, "rb") as file:
        content = file.read(FILE_LIMIT + 1)
    if len(content) > FILE_LIMIT:
        raise UserError(f"gin: {path} is longer than {FILE_LIMIT} bytes: it is not a configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"gin: {path} is not UTF-8 text (byte {error.start})") from error
    _bind_text(text, str(path), parsed)


def _bind_text(text: str, place: str, parsed: _Parsed) -> None:
    """Binds what a gin text says, statement by statement. gin's own loop would import modules, also to look for
    included files.
    """
    if "\0" in text:
        raise UserError(f"gin: {place} holds a zero byte: it is not a configuration")
    if _strings_in_a_row(text) > MAX_STRINGS:
        raise UserError(f"gin: {place} joins more than {MAX_STRINGS} strings: it is not a configuration")
    line = 1
    try:
        parser = config_parser.ConfigParser(text, parsed)
        for statement in parser:
            line = statement.location.line_num
            _bind(statement, f"{place}, line {line}", parsed)
        if parser.current_token.type != tokenize.ENDMARKER:
            raise UserError(f"gin: the text ends within a statement ({place}, line {line})")
    except SyntaxError as error:
        raise UserError(f"gin: {_one_line(error.msg)} ({place}, line {error.lineno or line})") from error
    except tokenize.TokenError as error:  # a bracket or a string that is not closed
        raise UserError(f"gin: {error.args[0]} ({place}, line {error.args[1][0]})") from error
    except UserError:
        raise
    except GIN_FAULTS as error:
        raise UserError(f"{explain(error)} ({place}, line {line})") from error


def _strings_in_a_row(text: str) -> int:
    """The longest run of strings with nothing but line ends and comments between them."""
    longest = run = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                run += 1
                longest = max(longest, run)
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
                run = 0
    except (tokenize.TokenError, SyntaxError):  # the parser says what and where
        pass
    return longest


def _bind(statement: Any, place: str, parsed: _Parsed) -> None:
    if isinstance(statement, config_parser.ImportStatement):
        raise UserError(
            f"gin: {place}: a configuration cannot import; remove {statement.format()!r}, every name is known already"
        )
    if isinstance(statement, config_parser.IncludeStatement):
        found = next(
            (p for root in (PROJECT, Path.cwd()) if (p := root / statement.filename).is_file()), None
        )
        missing = f"gin: {place}: no gin file at {statement.filename!r}, from {PROJECT} or {Path.cwd()}"
        _bind_file(found or PROJECT / statement.filename, missing, parsed)
    elif isinstance(statement, config_parser.BindingStatement):
        scope, selector, argument = statement.scope, statement.selector, statement.arg_name
        if argument and scope:
            raise UserError(
                f"gin: {place}: scopes cannot act here; write {selector}.{argument} without {scope + '/'!r}"
            )
        if argument:
            parsed.bound.append((place, statement.value))
            parsed.bound_names.add(f"{selector}.{argument}")
            if selector not in s.SECTIONS and selector in parts_by_gin_name():
                _part_configurable(selector)
                parsed.part_names.add(selector)
            gin.bind_parameter((scope, selector, argument), statement.value)
        else:  # a macro
            name = f"{scope}/{selector}" if scope else selector
            parsed.macros[name] = place, statement.value
            gin.bind_parameter((name, "gin.macro", "value"), statement.value)


@cache
def _part_configurable(gin_name: str) -> Any:
    """What gin calls to give the options bound on a registered part."""
    return gin.external_configurable(
        lambda **options: options, name=gin_name, module="generative_recommenders.parts"
    )


def _part_options(parsed: _Parsed, before: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bound options of registered parts over those of before, checked."""
    options = {name: dict(values) for name, values in before.items()}
    for name in sorted(parsed.part_names):
        bound = copy.deepcopy(_part_configurable(name)())
        options[name] = {**options.get(name, {}), **bound}
        parts_by_gin_name()[name].option_values(options[name])
    return options


def _check_not_twice(parsed: _Parsed, settings: s.RunSettings) -> None:
    """UserError where a published name and the chosen part's own name are bound to different values."""
    for registry, name in settings.chosen_parts():
        gin_name = registry[name].gin_name if name in registry else ""
        for option, published in s.PUBLISHED_OPTIONS.get(registry.kind, {}).items():
            own = f"{gin_name}.{option}"
            if gin_name not in s.SECTIONS and {own, published} <= parsed.bound_names:
                here, there = settings.options[gin_name][option], settings.published(published)
                if here != there:
                    raise UserError(
                        f"gin: {own} = {here!r} and {published} = {there!r} are one option: bind one of them"
                    )


def resolved_text(settings: s.RunSettings) -> str:
    """Every gin name with its value, defaults included, as a gin file that gives the same settings."""
    lines = []
    for name, (section, _) in s.SECTIONS.items():
        values = dataclasses.asdict(getattr(settings, section))
        lines += [f"{name}.{key} = {value!r}" for key, value in sorted(values.items())] + [""]
    chosen = {r[name].gin_name: (r, name) for r, name in settings.chosen_parts() if name in r}
    published: set[str] = set()
    for name in sorted({*settings.options, *chosen} - set(s.SECTIONS)):
        values = dict(settings.options.get(name, {}))
        if name in chosen:
            registry, part = chosen[name]
            filled = s.PUBLISHED_OPTIONS.get(registry.kind, {})
            published |= {filled[option] for option in values if option in filled}
            every = registry[part].option_values(settings.part_options(registry, part))
            values.update({k: v for k, v in every.items() if k not in filled and _is_gin_value(v)})
        if values:
            lines += [f"{name}.{key} = {value!r}" for key, value in sorted(values.items())] + [""]
    return "\n".join(line for line in lines if line.partition(" = ")[0] not in published)


def _is_gin_value(value: Any) -> bool:
    """Infinity, the default of a limit that does not act, has no form in gin."""
    return not isinstance(value, float) or math.isfinite(value)


def _build(name: str) -> Any:
    built = _CONFIGURABLES[name]()
    s.check_section(built, name)
    return built


def explain(error: BaseException) -> str:
    """gin's message as one line, with the nearest known name where a name was unknown."""
    if isinstance(error, (RecursionError, MemoryError)):
        return "gin: a value is nested too deeply, or a name refers to itself"
    text = _one_line(str(error))
    unknown = re.search(r"No configurable matching '([^']+)'", text)
    if unknown:
        name = unknown.group(1)
        return f"gin: there is no configurable {name!r}{_nearest(name, [*s.SECTIONS, *parts_by_gin_name()])}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter (?:named )?'([^']+)'", text)
    if parameter:
        owner, name = (each.split(".")[-1] for each in parameter.groups())
        known = [f.name for f in dataclasses.fields(s.SECTIONS[owner][1])] if owner in s.SECTIONS else []
        return f"gin: {owner} has no parameter {name!r}{_nearest(name, known)}"
    return f"gin: {text}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def differences(before: s.RunSettings, now: s.RunSettings) -> list[tuple[str, Any, Any]]:
    """(gin name, value before, value now) of every setting that differs."""
    found = []
    for name, (section, _) in s.SECTIONS.items():
        old, new = dataclasses.asdict(getattr(before, section)), dataclasses.asdict(getattr(now, section))
        found += [(f"{name}.{key}", old[key], new[key]) for key in new if old[key] != new[key]]
    keys = sorted(
        {(name, key) for side in (before, now) for name, values in side.options.items() for key in values}
    )
    for name, key in keys:
        was, is_now = (side.options.get(name, {}).get(key) for side in (before, now))
        if was != is_now:
            found.append((f"{name}.{key}", was, is_now))
    return found


def override(settings: s.RunSettings, bindings: Sequence[str]) -> s.RunSettings:
    """The settings with bindings applied over them, as for evaluating a checkpoint under another seen
    filter.
    """
    gin.clear_config()
    parsed = _Parsed()
    _bind_text("\n".join(bindings), BINDINGS, parsed)
    parsed.check()
    try:
        for name, (section, _) in s.SECTIONS.items():
            current = getattr(settings, section)
            bound = {
                f.name: value for f in dataclasses.fields(current) for value in _bound(f"{name}.{f.name}")
            }
            changed = dataclasses.replace(current, **bound)
            s.check_section(changed, name)
            settings = dataclasses.replace(settings, **{section: changed})
    except GIN_FAULTS as error:
        raise UserError(explain(error)) from error
    settings = dataclasses.replace(settings, options=_part_options(parsed, settings.options))
    _check_not_twice(parsed, settings)
    return settings


def _bound(name: str) -> list[Any]:
    """The value bound to a gin name, or nothing."""
    try:
        return [copy.deepcopy(gin.query_parameter(name))]  # which puts the values of macros in their places
    except ValueError:
        return []
