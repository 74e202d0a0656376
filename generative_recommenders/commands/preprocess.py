"""Flags of ``preprocess_public_data.py``: raw ratings in, one folder of memory-mapped sequences out."""

from __future__ import annotations

import dataclasses
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags

from generative_recommenders.commands.lists import show_list
from generative_recommenders.commands.program import Help, start_program
from generative_recommenders.config.plugins import PLUGIN_HELP, load_plugins
from generative_recommenders.data.export import export_parquet, export_text
from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.folder import check_file, locked
from generative_recommenders.data.preparation.order import DUPLICATES, TIE_ORDERS
from generative_recommenders.data.preparation.prepare import find_prepared, prepare, prepared_path
from generative_recommenders.data.readers.events import ReadOptions
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.sources.synthetic_books import MAX_LENGTH, SyntheticBooksSettings
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import show

_DEFAULTS = SyntheticBooksSettings()

flags.DEFINE_string("dataset", "synthetic-books", "the data set; --list names them")
flags.DEFINE_multi_string("plugin", [], PLUGIN_HELP)
flags.DEFINE_bool("list", False, "print the data sets by name, those of plug-ins too, and stop")
flags.DEFINE_string("raw_path", None, "local file, folder or archive instead of a download")
flags.DEFINE_string(
    "data_root", "data", "raw files go to raw/, prepared data to prepared/NAME below it", allow_override=True
)
flags.DEFINE_string("name", None, "name of the prepared data set; the data set's own by default")
flags.DEFINE_string(
    "columns",
    None,
    "csv only: the columns to read, as NAME, NAME=COLUMN, NAME:KIND or NAME=COLUMN:KIND (user, item, rating, "
    "timestamp, or an event column of kind categorical, numerical or time); "
    "in file order with _ for one to skip where there is no header",
)
flags.DEFINE_string(
    "delimiter",
    None,
    "csv only: what separates the columns, as ';', '::', tab or space; found out by default",
)
flags.DEFINE_enum("header", "auto", ["auto", "yes", "no"], "csv only: whether line 1 names the columns")
flags.DEFINE_enum(
    "quoting",
    "auto",
    ["auto", "csv", "none"],
    'csv only: whether " quotes a field (RFC 4180); auto: not in TSV',
)
flags.DEFINE_enum(
    "time_unit",
    "auto",
    ["auto", "s", "ms", "us", "ns"],
    "csv and exchange-text: unit of numeric times; auto: by their size in csv, s in exchange-text",
)
flags.DEFINE_bool(
    "drop_missing",
    False,
    "csv and exchange-text: leave out events without a user or an item instead of refusing them",
)
flags.DEFINE_integer("k_core", None, "keep users and items with this many ratings, iterated, as the filter")
flags.DEFINE_enum(
    "tie_order",
    "file",
    list(TIE_ORDERS),
    "order of a user's events of one time: as in the file; as the HSTU authors' pandas sort leaves them on this "
    "machine; or random, by a hash of user, item, time and occurrence",
)
flags.DEFINE_enum(
    "duplicates",
    "keep",
    list(DUPLICATES),
    "before the filter, drop: leave out repeats of the same user, item and time; consecutive: "
    "items that follow themselves",
)
flags.DEFINE_enum("engine", "polars", ["polars", "spark"], "polars: this machine; spark: needs the extra")
flags.DEFINE_string("memory_limit", "4GB", "memory for events; beyond it they are kept in files")
flags.DEFINE_string("spark_master", "local[*]", "URL of the Spark cluster")
flags.DEFINE_string("export_text", None, "also write the sequences to this file, in the exchange format")
flags.DEFINE_string("export_parquet", None, "also write the events to this file, by original ids")
flags.DEFINE_string(
    "prepared",
    None,
    "with an export flag or --audit: this folder, or the data set of this name; nothing is prepared",
)
flags.DEFINE_bool(
    "audit",
    False,
    "with --prepared: report lengths, popularity, times of training and test, event columns and whether order matters, "
    "as text, JSON and PNG",
)
flags.DEFINE_string("output", None, "with --audit: folder of the reports; beside the prepared folder by default")

flags.DEFINE_integer("synthetic_users", _DEFAULTS.num_users, "synthetic-books: users before the filter")
flags.DEFINE_integer("synthetic_items", _DEFAULTS.num_items, "synthetic-books: items before the filter")
flags.DEFINE_integer(
    "synthetic_min_length", _DEFAULTS.min_length, f"synthetic-books: fewest ratings a user, 1 to {MAX_LENGTH}"
)
flags.DEFINE_float(
    "synthetic_mean_length",
    _DEFAULTS.mean_length,
    f"synthetic-books: mean ratings a user before the filter, synthetic_min_length to {MAX_LENGTH}",
)
flags.DEFINE_float("predictability", _DEFAULTS.predictability, "synthetic-books: predictable share")
flags.DEFINE_integer("synthetic_seed", _DEFAULTS.seed, "synthetic-books: seed")

_SYNTHETIC_BOOKS = {
    "synthetic_users": "num_users",
    "synthetic_items": "num_items",
    "synthetic_min_length": "min_length",
    "synthetic_mean_length": "mean_length",
    "predictability": "predictability",
    "synthetic_seed": "seed",
}
"""Flags of `SyntheticBooksSettings`, and the setting of each."""
_OF_CSV = "columns delimiter header quoting time_unit drop_missing"
_OPTIONS_OF_SOME = {
    **dict.fromkeys(_OF_CSV.split(), ("csv",)),
    **dict.fromkeys(("time_unit", "drop_missing"), ("csv", "exchange-text")),
    **dict.fromkeys(_SYNTHETIC_BOOKS, ("synthetic-books",)),
}
_TIES = ("tie_order", "duplicates")
_ORDER = f"k_core {' '.join(_TIES)}"
_ENGINE = "engine memory_limit spark_master"
_PREPARE_ONLY = f"dataset raw_path name {_ORDER} {_ENGINE}".split()
"""Flags that have no meaning where nothing is prepared, beside the options of one data set."""


def parse_bytes(text: str) -> int:
    """``4GB``, ``500MB``, ``64kB`` or a number of bytes."""
    units = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
    number = text.rstrip("bBkKmMgGtT ")
    unit = units.get(text[len(number) :].strip().lower())
    if unit is None or not number.isascii() or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--memory_limit={text!r} is not a size; write 4GB or 500MB")
    return int(number) * unit


def read_options() -> ReadOptions:
    """The layout of raw files, from the flags."""
    given, delimiter = flags.FLAGS, flags.FLAGS.delimiter
    named = {"tab": "\t", "\\t": "\t", "space": " ", "whitespace": " ", " ": " "}
    delimiter = None if delimiter is None else named.get(delimiter, delimiter)
    if delimiter not in (None, "\t", " ") and not re.fullmatch(r"[!#-/:-@\[-`{-~]{1,2}", delimiter):
        raise UserError(f"--delimiter={given.delimiter!r} is not a delimiter; write ';', ',', '|', '::', tab or space")
    header = {"auto": None, "yes": True, "no": False}[given.header]
    unit = None if given.time_unit == "auto" else given.time_unit
    return ReadOptions(given.columns, delimiter, header, given.quoting, unit, given.drop_missing)


def _export(folder: Path) -> None:
    """Writes the files that the export flags name."""
    for path, export in ((flags.FLAGS.export_text, export_text), (flags.FLAGS.export_parquet, export_parquet)):
        if path is not None:
            export(SequenceDataset.open(folder), path)
            show(f"written: {path}")


def _check_flags() -> None:
    """UserError for a flag that is given but has no effect, by itself or beside the others."""
    given = flags.FLAGS
    taken = {} if given.raw_path is None else {Path(given.raw_path).resolve(): "raw_path"}
    for name in ("export_text", "export_parquet"):
        if (path := given[name].value) is not None:
            check_file(path, f"--{name}=")
            if (other := taken.setdefault(Path(path).resolve(), name)) != name:
                raise UserError(f"--{name}={path} is the file of --{other}: name another one")
    if given.prepared is not None:
        surplus = [name for name in (*_PREPARE_ONLY, *_OPTIONS_OF_SOME) if given[name].present]
        if surplus:
            raise UserError(f"--{surplus[0]} has no meaning with --prepared, which prepares nothing")
        if given.export_text is None and given.export_parquet is None and not given.audit:
            raise UserError("--prepared needs --export_text=FILE, --export_parquet=FILE or --audit")
    elif given.audit:
        raise UserError("--audit needs --prepared=NAME, a prepared data set or its folder")
    if given["output"].present and not given.audit:
        raise UserError("--output needs --audit")
    for name, datasets in _OPTIONS_OF_SOME.items():
        if given[name].present and given.dataset not in datasets:
            raise UserError(f"--{name} is for --dataset={' or '.join(datasets)}, and this is {given.dataset}")
    if given.engine == "spark" and given["memory_limit"].present:
        raise UserError("--memory_limit has no meaning with --engine=spark")
    if given.engine != "spark" and given["spark_master"].present:
        raise UserError("--spark_master needs --engine=spark")


def _prepare() -> tuple[Manifest, Path]:
    """The manifest and the folder of what the flags ask for."""
    given = flags.FLAGS
    memory_limit = parse_bytes(given.memory_limit)
    settings: dict[str, Any] = {setting: given[flag].value for flag, setting in _SYNTHETIC_BOOKS.items()}
    # A source may have an order of its own, which the flags' defaults leave as it is.
    ties: dict[str, Any] = {name: given[name].value for name in _TIES if given[name].present}
    raw_path, data_root = None if given.raw_path is None else Path(given.raw_path), Path(given.data_root)
    synthetic, options = SyntheticBooksSettings(**settings), read_options()
    # What is downloaded or made is one process's until it is read.
    with locked(data_root / "raw" / given.dataset) if raw_path is None else nullcontext():
        raw = resolve(
            given.dataset, raw_path=raw_path, data_root=data_root, options=options, k_core=given.k_core,
            result_name=given.name, synthetic=synthetic,
        )  # fmt: skip
        raw = dataclasses.replace(raw, **ties)
        out = prepared_path(data_root, raw.name)
        if given.engine == "spark":
            from generative_recommenders.data.preparation.spark import prepare_with_spark

            return prepare_with_spark(raw, out, given.spark_master), out
        return prepare(raw, out, memory_limit), out


def run(arguments: list[str]) -> int:
    """Prepares or exports, by the flags; UserError for faults of input or flags."""
    given = flags.FLAGS
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options are written --name=value")
    load_plugins(given.plugin)
    if given.list:
        return show_list("datasets", (), Path(given.data_root))
    _check_flags()
    if given.prepared is not None:
        folder = find_prepared(given.prepared, Path(given.data_root))
        _export(folder)
        if given.audit:
            from generative_recommenders.commands.audit import write_audit  # brings torch and matplotlib

            show(write_audit(folder, None if given.output is None else Path(given.output)))
        return 0
    manifest, out = _prepare()
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
        ("What is prepared", "dataset raw_path name data_root plugin list"),
        ("How a file of your own is read", _OF_CSV),
        ("Filter and order", _ORDER),
        ("Engine", _ENGINE),
        ("Exports and audit of what is prepared", "prepared export_text export_parquet audit output"),
        ("Synthetic books", " ".join(_SYNTHETIC_BOOKS)),
    ),
)


def start() -> None:
    """Runs the program with the process's arguments; without any it shows its help."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    start_program(run, HELP)
