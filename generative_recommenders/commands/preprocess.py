"""Flags of ``preprocess_public_data.py``: raw ratings in, one folder of memory-mapped sequences out."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from absl import flags

from generative_recommenders.commands.lists import show_list
from generative_recommenders.commands.program import Help, start_program
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.data.export import export_parquet, export_text
from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.folder import check_file
from generative_recommenders.data.preparation.order import DUPLICATES, TIE_ORDERS
from generative_recommenders.data.preparation.prepare import find_prepared, prepare, prepared_path
from generative_recommenders.data.readers.events import ReadOptions
from generative_recommenders.data.readers.sources import TextOptions
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.sources.synthetic_books import MAX_LENGTH, SyntheticBooksSettings
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import show

_DEFAULTS = SyntheticBooksSettings()

_DATASET = flags.DEFINE_string("dataset", "synthetic-books", "the data set; --list names them")
_PLUGINS = flags.DEFINE_multi_string(
    "plugin", [], "a Python file or module that registers data sources of your own"
)
_LIST = flags.DEFINE_bool("list", False, "print the data sets by name, those of plug-ins too, and stop")
_RAW_PATH = flags.DEFINE_string("raw_path", None, "local file, folder or archive instead of a download")
_DATA_ROOT = flags.DEFINE_string(
    "data_root", "data", "raw files go to raw/, prepared data to prepared/NAME below it", allow_override=True
)
_NAME = flags.DEFINE_string("name", None, "name of the prepared data set; the data set's own by default")
_COLUMNS = flags.DEFINE_string(
    "columns",
    None,
    "csv only: the columns to read, NAME, NAME=COLUMN or NAME:KIND (user, item, rating, timestamp, or an event column of kind "
    "categorical, numerical or time); in file order with _ for one to skip where the file has no header",
)
_DELIMITER = flags.DEFINE_string(
    "delimiter",
    None,
    "csv only: what separates the columns, as ';', '::', tab or space; found out by default",
)
_HEADER = flags.DEFINE_enum(
    "header", "auto", ["auto", "yes", "no"], "csv only: whether line 1 names the columns"
)
_QUOTING = flags.DEFINE_enum(
    "quoting",
    "auto",
    ["auto", "csv", "none"],
    'csv only: whether " quotes a field (RFC 4180); auto: not in TSV',
)
_TIME_UNIT = flags.DEFINE_enum(
    "time_unit",
    "auto",
    ["auto", "s", "ms", "us", "ns"],
    "csv only: unit of numeric times; auto: by their size",
)
_DROP_MISSING = flags.DEFINE_bool(
    "drop_missing", False, "csv only: leave out events without a user or an item instead of refusing them"
)
_K_CORE = flags.DEFINE_integer(
    "k_core", None, "keep users and items with this many ratings, iterated, as the filter"
)
_TIE_ORDER = flags.DEFINE_enum(
    "tie_order",
    "file",
    list(TIE_ORDERS),
    "order of a user's events of one time: as in the file; as the HSTU authors' pandas sort leaves them on this machine; or "
    "random, by a hash of user, item, time and occurrence",
)
_DUPLICATES = flags.DEFINE_enum(
    "duplicates",
    "keep",
    list(DUPLICATES),
    "before the filter, drop: leave out repeats of the same user, item and time; consecutive: items that follow themselves",
)
_ENGINE = flags.DEFINE_enum(
    "engine", "polars", ["polars", "spark"], "polars: this machine; spark: needs the extra"
)
_MEMORY_LIMIT = flags.DEFINE_string(
    "memory_limit", "4GB", "memory for events; beyond it they are kept in files"
)
_SPARK_MASTER = flags.DEFINE_string("spark_master", "local[*]", "URL of the Spark cluster")
_EXPORT_TEXT = flags.DEFINE_string(
    "export_text", None, "also write the sequences to this file, in the exchange format"
)
_EXPORT_PARQUET = flags.DEFINE_string(
    "export_parquet", None, "also write the events to this file, by original ids"
)
_PREPARED = flags.DEFINE_string(
    "prepared",
    None,
    "with an export flag or --audit: this folder, or the data set of this name; nothing is prepared",
)
_AUDIT = flags.DEFINE_bool(
    "audit",
    False,
    "with --prepared: report lengths, popularity, times of training and test, event columns and whether order matters, as "
    "text, JSON and PNG",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "with --audit: folder of the reports; beside the prepared folder by default"
)
_USERS = flags.DEFINE_integer(
    "synthetic_users", _DEFAULTS.num_users, "synthetic-books: users before the filter"
)
_ITEMS = flags.DEFINE_integer(
    "synthetic_items", _DEFAULTS.num_items, "synthetic-books: items before the filter"
)
_MIN_LENGTH = flags.DEFINE_integer(
    "synthetic_min_length", _DEFAULTS.min_length, f"synthetic-books: fewest ratings a user, 1 to {MAX_LENGTH}"
)
_MEAN_LENGTH = flags.DEFINE_float(
    "synthetic_mean_length",
    _DEFAULTS.mean_length,
    f"synthetic-books: mean ratings a user before the filter, synthetic_min_length to {MAX_LENGTH}",
)
_PREDICTABILITY = flags.DEFINE_float(
    "predictability", _DEFAULTS.predictability, "synthetic-books: predictable share"
)
_SEED = flags.DEFINE_integer("synthetic_seed", _DEFAULTS.seed, "synthetic-books: seed")

_OF_CSV = (_COLUMNS, _DELIMITER, _HEADER, _QUOTING, _TIME_UNIT, _DROP_MISSING)
_OF_SYNTHETIC_BOOKS = (_USERS, _ITEMS, _MIN_LENGTH, _MEAN_LENGTH, _PREDICTABILITY, _SEED)
_OPTIONS_OF_ONE = {
    **{flag.name: "csv" for flag in _OF_CSV},
    **{flag.name: "synthetic-books" for flag in _OF_SYNTHETIC_BOOKS},
}
_PREPARE_ONLY = (
    "dataset",
    "raw_path",
    "name",
    "k_core",
    "tie_order",
    "duplicates",
    "engine",
    "memory_limit",
    "spark_master",
    *_OPTIONS_OF_ONE,
)
"""Flags that have no meaning where nothing is prepared."""


def parse_bytes(text: str) -> int:
    """``4GB``, ``500MB``, ``64kB`` or a number of bytes."""
    units = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
    number = text.rstrip("bBkKmMgGtT ")
    unit = units.get(text[len(number) :].strip().lower())
    if unit is None or not number.isascii() or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--memory_limit={text!r} is not a size; write 4GB or 500MB")
    return int(number) * unit


def read_options() -> ReadOptions:
    """How the flags say that raw files are laid out."""
    delimiter = _DELIMITER.value
    named = {"tab": "\t", "\\t": "\t", "space": " ", "whitespace": " ", " ": " "}
    delimiter = None if delimiter is None else named.get(delimiter, delimiter)
    if delimiter not in (None, "\t", " ") and not re.fullmatch(r"[!#-/:-@\[-`{-~]{1,2}", delimiter):
        raise UserError(
            f"--delimiter={_DELIMITER.value!r} is not a delimiter; write ';', ',', '|', '::', tab or space"
        )
    text = TextOptions(
        delimiter,
        {"auto": None, "yes": True, "no": False}[_HEADER.value],
        _QUOTING.value,
    )
    unit = None if _TIME_UNIT.value == "auto" else _TIME_UNIT.value
    return ReadOptions(_COLUMNS.value, text, unit, _DROP_MISSING.value)


def _export(folder: Path) -> None:
    """Writes the files that the export flags name."""
    for path, export in ((_EXPORT_TEXT.value, export_text), (_EXPORT_PARQUET.value, export_parquet)):
        if path is not None:
            export(SequenceDataset.open(folder), path)
            show(f"written: {path}")


def _check_flags() -> None:
    """UserError for a flag that is given but cannot act, by itself or beside the others."""
    for flag in (_EXPORT_TEXT, _EXPORT_PARQUET):
        if flag.value is not None:
            check_file(flag.value, f"--{flag.name}=")
    if _PREPARED.value is not None:
        surplus = [name for name in _PREPARE_ONLY if flags.FLAGS[name].present]
        if surplus:
            raise UserError(f"--{surplus[0]} has no meaning with --prepared, which prepares nothing")
        if _EXPORT_TEXT.value is None and _EXPORT_PARQUET.value is None and not _AUDIT.value:
            raise UserError("--prepared needs --export_text=FILE, --export_parquet=FILE or --audit")
    elif _AUDIT.value:
        raise UserError("--audit needs --prepared=NAME, a prepared data set or its folder")
    if _OUTPUT.present and not _AUDIT.value:
        raise UserError("--output needs --audit")
    for name, dataset in _OPTIONS_OF_ONE.items():
        if flags.FLAGS[name].present and _DATASET.value != dataset:
            raise UserError(f"--{name} is for --dataset={dataset}, and this is {_DATASET.value}")
    spark = _ENGINE.value == "spark"
    if spark and _MEMORY_LIMIT.present:
        raise UserError("--memory_limit has no meaning with --engine=spark")
    if not spark and _SPARK_MASTER.present:
        raise UserError("--spark_master needs --engine=spark")


def _prepare(memory_limit: int) -> tuple[Manifest, Path]:
    raw = resolve(
        _DATASET.value,
        raw_path=None if _RAW_PATH.value is None else Path(_RAW_PATH.value),
        data_root=Path(_DATA_ROOT.value),
        options=read_options(),
        k_core=_K_CORE.value,
        result_name=_NAME.value,
        synthetic=SyntheticBooksSettings(
            num_users=_USERS.value,
            num_items=_ITEMS.value,
            predictability=_PREDICTABILITY.value,
            min_length=_MIN_LENGTH.value,
            mean_length=_MEAN_LENGTH.value,
            seed=_SEED.value,
        ),
    )
    raw = dataclasses.replace(raw, tie_order=_TIE_ORDER.value, duplicates=_DUPLICATES.value)
    out = prepared_path(_DATA_ROOT.value, raw.name)
    if _ENGINE.value == "spark":
        from generative_recommenders.data.preparation.spark import prepare_with_spark

        return prepare_with_spark(raw, out, _SPARK_MASTER.value), out
    return prepare(raw, out, memory_limit), out


def run(arguments: list[str]) -> int:
    """Prepares or exports, by the flags; UserError for faults of input or flags."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options are written --name=value")
    load_plugins(_PLUGINS.value)
    if _LIST.value:
        return show_list("datasets", (), Path(_DATA_ROOT.value))
    _check_flags()
    if _PREPARED.value is not None:
        folder = find_prepared(_PREPARED.value, Path(_DATA_ROOT.value))
        _export(folder)
        if _AUDIT.value:
            from generative_recommenders.commands.audit import write_audit  # brings torch and matplotlib

            show(write_audit(folder, None if _OUTPUT.value is None else Path(_OUTPUT.value)))
        return 0
    manifest, out = _prepare(parse_bytes(_MEMORY_LIMIT.value))
    show(summary(manifest))
    show(f"prepared: {out}")
    _export(out)
    return 0


HELP = Help(
    "preprocess_public_data.py",
    "prepare",
    "Prepares a data set: raw ratings in, memory-mapped sequences of every user out, in data/prepared/NAME.",
    (
        ("--dataset=ml-1m", "downloads MovieLens-1M and prepares it; --list names the data sets"),
        (
            "--dataset=csv --raw_path=mine.csv --name=mine --columns=user,item,rating,timestamp --k_core=5",
            "prepares a file of your own: text, JSON lines, Parquet or Arrow, packed or not",
        ),
        ("--dataset=synthetic-books", "makes and prepares the embedded example"),
        (
            "--audit --prepared=mine",
            "reports lengths, popularity, leakage in time, and whether order matters",
        ),
    ),
    (
        ("What is prepared", (_DATASET, _RAW_PATH, _NAME, _DATA_ROOT, _PLUGINS, _LIST)),
        ("How a file of your own is read", _OF_CSV),
        ("Filter and order", (_K_CORE, _TIE_ORDER, _DUPLICATES)),
        ("Engine", (_ENGINE, _MEMORY_LIMIT, _SPARK_MASTER)),
        (
            "Exports and audit of what is prepared",
            (_PREPARED, _EXPORT_TEXT, _EXPORT_PARQUET, _AUDIT, _OUTPUT),
        ),
        ("Synthetic books", _OF_SYNTHETIC_BOOKS),
    ),
)


def start() -> None:
    """Runs the program with the process's arguments; without any it shows its help."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    start_program(run, HELP)
