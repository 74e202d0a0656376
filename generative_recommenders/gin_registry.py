"""Every gin name, once. Published configurations parse unchanged; a name that does not exist is an error that
names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import gin.config
import torch
from gin import config_parser

from .features import UserError
from .modeling.similarity.mixture_of_logits import MoLSettings
from .objectives.losses import SAMPLED_LOSSES
from .training import settings as s

PROJECT = Path(__file__).resolve().parents[1]
"""Includes in gin files are looked up from here, then from the working directory."""
BINDINGS = "the bindings"
FILE_LIMIT = 1 << 20  # bytes
MAX_FILES = 100
GIN_FAULTS = (
    ValueError, TypeError, OSError, AttributeError, NameError, LookupError, RecursionError, MemoryError,
)  # fmt: skip
"""What gin raises for texts that it cannot make sense of."""

SECTIONS: dict[str, tuple[str, type]] = {
    "train_fn": ("train", s.TrainSettings),
    "sasrec_encoder": ("sasrec", s.SasrecSettings),
    "hstu_encoder": ("hstu", s.HstuSettings),
    "diff_transformer_encoder": ("diff_transformer", s.DiffTransformerSettings),
    "transformer_encoder": ("transformer", s.TransformerSettings),
    "item_tower": ("item_tower", s.ItemTowerSettings),
    "sce": ("sce", s.SceSettings),
    "get_sequential_encoder": ("encoder", s.EncoderSettings),
    "create_data_loader": ("loader", s.LoaderSettings),
    "get_weighted_loss": ("weighted_loss", s.WeightedLossSettings),
    "get_similarity_function": ("similarity", s.SimilaritySettings),
    "create_mol_interaction_module": ("mol", MoLSettings),
}
"""gin name -> (section of `RunSettings`, its class)."""

SAMPLING = ("sampling_strategy", "num_negatives", "negatives_sharing", "log_q_correction", "calibration")
"""Of ``train_fn``: what acts in losses with sampled negatives alone."""

_CONFIGURABLES = {
    name: gin.external_configurable(kind, name=name, module="generative_recommenders")
    for name, (_, kind) in SECTIONS.items()
}


def load_settings(gin_files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[s.RunSettings, str]:
    """Parses files and bindings into settings, and gives the resolved configuration, defaults included.

    Nothing in them runs: gin's ``import`` is refused. Raises UserError in one line: a missing file, a syntax error
    with its place, an unknown name with the nearest one, a value of the wrong type.
    """
    gin.clear_config()
    opened: list[Path] = []
    for path in gin_files:
        _bind_file(Path(path), f"no gin file at {path}", opened)
    _bind_text("\n".join(bindings), BINDINGS, opened)
    try:
        built = {section: _build(name) for name, (section, _) in SECTIONS.items()}
    except UserError as error:  # gin adds where it was called from, over several lines
        raise UserError(str(error).splitlines()[0]) from error
    except GIN_FAULTS as error:
        raise UserError(explain(error)) from error
    settings = s.RunSettings(**built)
    return settings, resolved_text(settings)


def _bind_file(path: Path, missing: str, opened: list[Path]) -> None:
    """opened: every file so far; their number ends includes that go in a circle or multiply."""
    if not path.is_file():
        raise UserError(missing)
    opened.append(path)
    if len(opened) > MAX_FILES:
        raise UserError(f"gin: more than {MAX_FILES} files, {path} the last: do includes go in a circle?")
    with open(path, "rb") as file:
        content = file.read(FILE_LIMIT + 1)
    if len(content) > FILE_LIMIT:
        raise UserError(f"gin: {path} is longer than {FILE_LIMIT} bytes: it is not a configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"gin: {path} is not UTF-8 text (byte {error.start})") from error
    _bind_text(text, str(path), opened)


def _bind_text(text: str, place: str, opened: list[Path]) -> None:
    """Binds what a gin text says, statement by statement. gin's own loop would import modules, also to look for
    included files.
    """
    if "\0" in text:
        raise UserError(f"gin: {place} holds a zero byte: it is not a configuration")
    line = 1
    try:
        parser = config_parser.ConfigParser(text, gin.config.ParserDelegate())
        for statement in parser:
            line = statement.location.line_num
            _bind(statement, f"{place}, line {line}", opened)
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


def _bind(statement: Any, place: str, opened: list[Path]) -> None:
    if isinstance(statement, config_parser.ImportStatement):
        raise UserError(
            f"gin: {place}: a configuration cannot import; remove {statement.format()!r}, every name is known already"
        )
    if isinstance(statement, config_parser.IncludeStatement):
        found = next(
            (p for root in (PROJECT, Path.cwd()) if (p := root / statement.filename).is_file()), None
        )
        missing = f"gin: {place}: no gin file at {statement.filename!r}, from {PROJECT} or {Path.cwd()}"
        _bind_file(found or PROJECT / statement.filename, missing, opened)
    elif isinstance(statement, config_parser.BindingStatement):
        scope, selector, argument = statement.scope, statement.selector, statement.arg_name
        if argument:
            gin.bind_parameter((scope, selector, argument), statement.value)
        else:  # a macro
            name = f"{scope}/{selector}" if scope else selector
            gin.bind_parameter((name, "gin.macro", "value"), statement.value)


def resolved_text(settings: s.RunSettings) -> str:
    """Every gin name with its value, defaults included, as a gin file that gives the same settings."""
    lines = []
    for name, (section, _) in SECTIONS.items():
        values = dataclasses.asdict(getattr(settings, section))
        lines += [f"{name}.{key} = {value!r}" for key, value in sorted(values.items())] + [""]
    return "\n".join(lines)


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
        return f"gin: there is no configurable {name!r}{_nearest(name, SECTIONS)}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter (?:named )?'([^']+)'", text)
    if parameter:
        owner, name = (each.split(".")[-1] for each in parameter.groups())
        known = [f.name for f in dataclasses.fields(SECTIONS[owner][1])] if owner in SECTIONS else []
        return f"gin: {owner} has no parameter {name!r}{_nearest(name, known)}"
    return f"gin: {text}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def log_notices(settings: s.RunSettings) -> None:
    """Says once, in a line each, what is accepted but cannot act here, or is likely a slip."""
    for line in [*inert(settings), *likely_slips(settings)]:
        logging.getLogger("absl").info("%s", line)


def likely_slips(settings: s.RunSettings) -> list[str]:
    """One line for each combination that trains as asked but that no published configuration has."""
    dqk, dv = settings.hstu.dqk, settings.hstu.dv
    if settings.train.main_module != "HSTU" or dqk == dv:
        return []
    return [
        f"hstu_encoder.dqk = {dqk} and hstu_encoder.dv = {dv} do not match: queries and keys are {dqk} wide, values "
        f"{dv}; every published configuration has them equal"
    ]


def inert(settings: s.RunSettings) -> list[str]:
    """One line for each accepted name that cannot act here. (MoL says itself what published runs ignored.)"""
    t, lines = settings.train, []
    if settings.loader.num_workers > 0:
        workers = settings.loader.num_workers
        lines.append(
            f"create_data_loader.num_workers = {workers}: batches are cut by one thread and need no workers"
        )
    if settings.loader.prefetch_factor > s.MAX_PREFETCH:
        lines.append(
            f"create_data_loader.prefetch_factor = {settings.loader.prefetch_factor}: "
            f"{s.MAX_PREFETCH} batches are made ahead"
        )
    if settings.similarity.bf16_training and t.interaction_module_type != "MoL":
        lines.append("get_similarity_function.bf16_training: it acts on MoL; dot products stay float32")
    if "BruteForce" not in t.top_k_method:
        lines.append(
            f"train_fn.top_k_method = {t.top_k_method!r}: ranks are counted exactly over the whole catalogue; it acts "
            "in build_top_k alone"
        )
    drawing = [f"train_fn.{name}" for name in SAMPLING if getattr(t, name) != getattr(s.TrainSettings, name)]
    if drawing and t.loss_module not in SAMPLED_LOSSES:
        lines.append(f"{', '.join(drawing)}: {t.loss_module} scores the catalogue and draws no negatives")
    bf16 = {
        "train_fn.main_module_bf16": t.main_module_bf16,
        "train_fn.eval_bf16": t.eval_bf16,
        "get_similarity_function.bf16_training": settings.similarity.bf16_training,
        "create_mol_interaction_module.bf16_training": settings.mol.bf16_training,
    }
    if any(bf16.values()) and not has_bfloat16():
        names = ", ".join(name for name, asked in bf16.items() if asked)
        lines.append(f"{names}: this machine has no bfloat16 units; it is emulated and slower than float32")
    return lines


def has_bfloat16() -> bool:
    """Whether the accelerator, or the CPU where there is none, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def differences(before: s.RunSettings, now: s.RunSettings) -> list[tuple[str, Any, Any]]:
    """(gin name, value before, value now) of every setting that differs."""
    found = []
    for name, (section, _) in SECTIONS.items():
        old, new = dataclasses.asdict(getattr(before, section)), dataclasses.asdict(getattr(now, section))
        found += [(f"{name}.{key}", old[key], new[key]) for key in new if old[key] != new[key]]
    return found


def override(settings: s.RunSettings, bindings: Sequence[str]) -> s.RunSettings:
    """The settings with bindings applied over them, as for evaluating a checkpoint under another seen
    filter.
    """
    gin.clear_config()
    _bind_text("\n".join(bindings), BINDINGS, [])
    try:
        for name, (section, _) in SECTIONS.items():
            current = getattr(settings, section)
            bound = {
                f.name: value for f in dataclasses.fields(current) for value in _bound(f"{name}.{f.name}")
            }
            changed = dataclasses.replace(current, **bound)
            s.check_section(changed, name)
            settings = dataclasses.replace(settings, **{section: changed})
    except GIN_FAULTS as error:
        raise UserError(explain(error)) from error
    return settings


def _bound(name: str) -> list[Any]:
    """The value bound to a gin name, or nothing."""
    try:
        return [gin.query_parameter(name)]
    except ValueError:
        return []
