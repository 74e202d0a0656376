"""Gin names and their settings, each written once.

Published configurations parse unchanged; a name that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import io
import re
import tokenize
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gin import config_parser

from generative_recommenders.config.fields import nearest
from generative_recommenders.config.published import ELSEWHERE, PUBLISHED
from generative_recommenders.config.registry import parts_by_gin_name
from generative_recommenders.config.schema import NAMES, RunSettings
from generative_recommenders.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""``configs/`` lies here: beside the package in a checkout, within it where it is installed. Includes in gin files are
looked up from here, then from the working directory; files of the command line the other way round."""
BINDINGS = "the bindings"
FILE_LIMIT = 1 << 20  # bytes
MAX_FILES = 100
MAX_ENTRIES = 10_000
"""Entries of a value in which the values of macros stand for their names."""
MAX_STRINGS = 100
"""String literals in a row: gin joins them one by one, each time copying what it has."""
PARSER_FAULTS = (ValueError, TypeError, AttributeError, LookupError)
"""Errors that gin's parser raises for malformed texts, beside SyntaxError."""
ABLATION = "ablation"
"""Owner of what a file of `generative_recommenders.ablate` says beside settings."""
MODULE = "generative_recommenders."
"""May stand before every owner's name."""


def load_settings(gin_files: Sequence[str | Path], bindings: Sequence[str] = ()) -> RunSettings:
    """Parses files and bindings into settings.

    Nothing in them runs: imports and references to functions are refused. Raises UserError in one line: a missing file,
    a syntax error with its place, an unknown name with the nearest one, a value that cannot be.
    """
    return _bound(RunSettings(), _parse(gin_files, bindings))


def load_ablation(
    path: str | Path, bindings: Sequence[str], names: Collection[str]
) -> tuple[dict[str, Any], RunSettings]:
    """The values that a file binds of ``names`` on ``ablation``, and the settings that it gives as `load_settings`
    does."""
    values, beginning = _parse([path], bindings, names), f"{ABLATION}."
    own = [name for name in values if name.startswith(beginning)]
    return {name.removeprefix(beginning): values.pop(name) for name in own}, _bound(RunSettings(), values)


def override(settings: RunSettings, bindings: Sequence[str]) -> RunSettings:
    """The settings with bindings applied over them, as for evaluating a checkpoint under another seen filter."""
    return _bound(settings, _parse([], bindings))


def _parse(
    gin_files: Sequence[str | Path], bindings: Sequence[str], names: Collection[str] | None = None
) -> dict[str, Any]:
    """Names and values that files and bindings give. names: what may be bound on `ABLATION`; None where nothing may."""
    parsed = _Parsed(names)
    for path in gin_files:
        found = find_config(path)
        if not found.is_file():
            known = [str(each.relative_to(ROOT)) for each in sorted((ROOT / "configs").rglob("*.gin"))]
            begun = [each for each in known if each.startswith(str(path).removesuffix(".gin"))]
            close = begun[:3] or difflib.get_close_matches(str(path), known, n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(close)}?" if close else "--list=configs names those of the package"
            raise UserError(f"no gin file at {path}; {meant}")
        _bind_file(found, parsed)
    _bind_text("\n".join(bindings), BINDINGS, parsed)
    return parsed.values()


def _bound(settings: RunSettings, values: dict[str, Any]) -> RunSettings:
    """The settings with what is bound; UserError for what no setting is, and for values that cannot be."""
    settings = settings.bind(values)
    for published in filter(values.__contains__, PUBLISHED):
        for part, target in settings.readers(published):
            own, there = f"{part.gin_name}.{target.option}", values[published]
            if own in values and values[own] != there:
                raise UserError(
                    f"gin: {own} = {values[own]!r} and {published} = {there!r} are one option: bind one of them"
                )
    return settings


def find_config(path: str | Path) -> Path:
    """The file itself, or the configuration of the package that has this name, as ``configs/ml-1m/esasrec.gin``."""
    own = Path(path)
    packaged = ROOT / own
    return packaged if not own.exists() and not own.is_absolute() and packaged.is_file() else own


@dataclass(frozen=True)
class _Macro:
    """``%name`` within a value."""

    name: str


class _Parsed(config_parser.ParserDelegate):  # type: ignore[misc]
    """What the texts of one configuration bind.

    files, entries: how many were read, of the configuration and of the value at hand; their limits end includes and
    macros that go in a circle or multiply.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        self.files = self.entries = 0
        self.macros: dict[str, tuple[str, Any]] = {}
        """Name to the place where it is given a value, and the value."""
        self.bound: dict[str, tuple[str, Any]] = {}
        """Name to place and value."""
        self.used: set[str] = set()
        """Names that a %name refers to."""
        self.known: dict[str, list[str]] = {} if names is None else {ABLATION: list(names)}
        """Every owner with the names that can be bound on it."""
        for owner, _, name in (name.partition(".") for name in NAMES):
            self.known.setdefault(owner, []).append(name)
        for owner, part in parts_by_gin_name().items():
            self.known.setdefault(owner, []).extend(part.options.model_fields)

    def macro(self, macro_name: str) -> _Macro:
        self.used.add(macro_name)
        return _Macro(macro_name)

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        raise ValueError(f"a configuration cannot refer to @{scoped_configurable_name}: write the value itself")

    def values(self) -> dict[str, Any]:
        """The bound values, with macros resolved."""
        for name, (place, _) in self.macros.items():
            if name not in self.used:  # most often a setting whose owner was left out
                close = [each for each in NAMES if each.endswith("." + name)] or difflib.get_close_matches(
                    name, NAMES, 1, 0.5
                )
                hint = f"; did you mean {close[0]!r}?" if close else ": write it as OWNER.NAME"
                raise UserError(f"gin: {place}: {name!r} is no setting, and no %{name} refers to it{hint}")
        values: dict[str, Any] = {}
        for name, (place, value) in self.bound.items():
            self.entries = 0
            values[name] = self.resolved(value, place)
        return values

    def resolved(self, value: Any, place: str, within: tuple[str, ...] = ()) -> Any:
        """With the values of macros in their places; within: the macros that the value is a part of."""
        self.entries += 1
        if self.entries > MAX_ENTRIES or (isinstance(value, _Macro) and value.name in within):
            raise UserError(f"gin: {place}: a value of more than {MAX_ENTRIES} entries, or one that holds itself")
        if isinstance(value, _Macro):
            if value.name not in self.macros:
                raise UserError(f"gin: {place}: nothing gives %{value.name} a value")
            return self.resolved(self.macros[value.name][1], place, (*within, value.name))
        if isinstance(value, (list, tuple)):
            return type(value)(self.resolved(each, place, within) for each in value)
        if isinstance(value, dict):
            pairs = [tuple(self.resolved(each, place, within) for each in pair) for pair in value.items()]
            if not all(isinstance(key, (str, int, float, bool, type(None))) for key, _ in pairs):
                raise UserError(f"gin: {place}: keys are names or numbers")
            return dict(pairs)
        return value


def _bind_file(path: Path, parsed: _Parsed) -> None:
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
    """Binds what a gin text says, statement by statement, by gin's parser alone: its own loop would import modules."""
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
        if parser.current_token.type != tokenize.ENDMARKER:  # gin takes that for the end of the statements
            raise UserError(f"gin: the text ends within a statement ({place}, line {line})")
    except SyntaxError as error:
        number = error.lineno or line
        fault = _without_quotes(error.msg, text, number) or _one_line(error.msg)
        raise UserError(f"gin: {fault} ({place}, line {number})") from error
    except tokenize.TokenError as error:  # a bracket or a string that is not closed
        raise UserError(f"gin: {error.args[0]} ({place}, line {error.args[1][0]})") from error
    except (RecursionError, MemoryError) as error:
        raise UserError(f"gin: a value is nested too deeply ({place}, line {line})") from error
    except PARSER_FAULTS as error:
        raise UserError(f"gin: {_one_line(str(error))} ({place}, line {line})") from error


def _without_quotes(message: str, text: str, line: int) -> str | None:
    """The error text for a word in place of a value, most often a string whose quotes a shell took."""
    token = re.search(r"Failed to parse token '(.+?)'", message)
    if token is None:
        return None
    word, statement = token[1], text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
    whole = re.fullmatch(r"\s*([\w./]+)\s*=\s*([\w./-]+)\s*", statement)
    known = {"true": "True", "false": "False", "none": "None", "null": "None"}
    if word.lower() in known:
        return f"{word} is no value: write {known[word.lower()]}"
    if whole is None:
        return f"{word} is no value; a string needs quotes, as '{word}'"
    name, value = whole[1], whole[2]
    return (
        f"{name} = {value}: a string needs quotes, as {name} = '{value}'; in a shell "
        f"--gin_bindings=\"{name} = '{value}'\" keeps them"
    )


def _strings_in_a_row(text: str) -> int:
    """The longest run of strings with nothing but line ends and comments between them."""
    longest = run = 0
    between = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
    with suppress(tokenize.TokenError, SyntaxError):  # the parser says what and where
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in between:
                run = run + 1 if token.type == tokenize.STRING else 0
                longest = max(longest, run)
    return longest


def _bind(statement: Any, place: str, parsed: _Parsed) -> None:
    if isinstance(statement, config_parser.ImportStatement):
        raise UserError(
            f"gin: {place}: a configuration cannot import; remove {statement.format()!r}, every name is known already"
        )
    if isinstance(statement, config_parser.IncludeStatement):
        roots = dict.fromkeys((ROOT, Path.cwd()))
        found = next((p for root in roots if (p := root / statement.filename).is_file()), None)
        if found is None:
            tried = " or ".join(map(str, roots))
            raise UserError(f"gin: {place}: no gin file at {statement.filename!r}, from {tried}")
        _bind_file(found, parsed)
    elif isinstance(statement, config_parser.BindingStatement):
        scope, owner, argument = statement.scope, statement.selector, statement.arg_name
        if not argument:
            parsed.macros[f"{scope}/{owner}" if scope else owner] = place, statement.value
            return
        if scope:
            raise UserError(
                f"gin: {place}: scopes have no effect here; write {owner}.{argument} without {scope + '/'!r}"
            )
        owner, known = owner.removeprefix(MODULE), parsed.known
        if owner == ABLATION and owner not in known:
            raise UserError(f"gin: {place}: an ablation is run by python -m generative_recommenders.ablate FILE")
        if owner not in known:
            raise UserError(f"gin: {place}: there is no configurable {owner!r}{nearest(owner, known)}")
        instead = ELSEWHERE.get(f"{owner}.{argument}")
        if instead is not None:
            if statement.value in (None, "", False):
                return
            raise UserError(f"gin: {place}: {owner}.{argument} is no setting here: {instead}")
        if argument not in known[owner]:
            raise UserError(f"gin: {place}: {owner} has no parameter {argument!r}{nearest(argument, known[owner])}")
        parsed.bound[f"{owner}.{argument}"] = place, statement.value


def resolved_text(settings: RunSettings) -> str:
    """Every gin name with its value, defaults included, as a gin file that gives the same settings."""
    by_owner = groupby(resolved_values(settings).items(), key=lambda each: each[0].partition(".")[0])
    return "\n".join("".join(f"{name} = {value!r}\n" for name, value in own) for _, own in by_owner)


def resolved_values(settings: RunSettings) -> dict[str, Any]:
    """Every gin name with its value, defaults included: settings first, then options of the chosen parts."""
    sections = settings.to_json()
    options, _ = sections.pop("options"), sections.pop("plugins")
    blocks = [*sorted(sections.items()), *sorted(options.items())]
    return {f"{owner}.{name}": value for owner, given in blocks for name, value in sorted(given.items())}


def _one_line(text: str) -> str:
    without_addresses = re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", text)
    return " ".join(without_addresses.split())[:300]


def differences(before: RunSettings, now: RunSettings) -> list[tuple[str, Any, Any]]:
    """(gin name, value before, value now) of every setting that differs."""
    keys = {f"{part}.{key}" for side in (before, now) for part, given in side.options.items() for key in given}
    values = ((name, before.value(name), now.value(name)) for name in (*NAMES, *sorted(keys)))
    return [(name, was, is_now) for name, was, is_now in values if was != is_now]
