"""Folder of one run: its lock, resolved configuration, metrics, TensorBoard events, log and checkpoints.

::

    runs/20260131-120000-ml-1m/
      run.lock  resolved.gin  metrics.jsonl  train.log  curves.png  report.html  tensorboard/  checkpoints/  report/
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging as python_logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from absl import logging

from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import add_log_file, no_link, remove_log_file, to_log_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RUNS = Path("runs")
"""Where runs without a folder of their own go, below the working directory."""
_FILES = ("run.lock", "resolved.gin", "metrics.jsonl", "train.log", "curves.png", "report.html")
_FOLDERS = ("checkpoints", "tensorboard", "report")
_EVENTS = re.compile(r"(?P<start>events\.out\.tfevents\.)(?P<time>\d{1,20})(?P<end>\..*)")


class RunFolder:
    """An open run folder; only the main process of a run has one. Use as a context manager or call `close`.

    checkpoints: the folder for a `CheckpointStore`.

    While it is open it is locked, and log lines go to ``train.log`` too. On resume call `truncate_after`
    with the step of the checkpoint, so that no later step is recorded twice.
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path, self._lock = path, lock
        self.checkpoints, self.tensorboard = path / "checkpoints", path / "tensorboard"
        self.metrics_path = path / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._without_tensorboard = False
        self._metrics = _open_lines(self.metrics_path)
        self._log_handler = add_log_file(path / "train.log")

    @classmethod
    def create_or_open(cls, path: Path | str | None, resume: bool = False, name: str = "run") -> RunFolder:
        """Opens ``path``, or a new ``runs/<timestamp>-<name>`` where path is None.

        Raises UserError where there is nothing to resume, where a run would write over another one's
        results, where another process has the folder open, or where it cannot be written to.
        """
        if path is None and resume:
            raise UserError("--resume needs the folder of the run to resume: give --run_dir")
        folder = Path(path) if path is not None else None
        try:
            if folder is None:
                folder = _new_folder(name)
            elif resume and not folder.is_dir():
                raise UserError(f"no run to resume at {folder}")
            elif not resume and holds_run(folder):
                raise UserError(f"{folder} holds a run already: resume it with --resume, or give another --run_dir")
            folder.mkdir(parents=True, exist_ok=True)
            for place in (folder / name for name in (*_FILES, *_FOLDERS)):
                if place.is_symlink():
                    raise UserError(
                        f"{place} is a symbolic link, and a run writes to no place elsewhere: "
                        "remove the link, or give another --run_dir"
                    )
                fits = place.is_dir() if place.name in _FOLDERS else place.is_file()
                if place.exists() and not fits:  # a pipe would keep the run waiting
                    raise UserError(f"{place} is in the way of a run: give another --run_dir")
            return cls(folder, _lock(folder))
        except OSError as error:
            shown = path or RUNS / name
            raise UserError(
                f"cannot write to run folder {shown}: {error.strerror}; choose another with --run_dir"
            ) from error

    def save_resolved_gin(self, text: str) -> Path:
        """Writes the configuration that the run is made from, complete."""
        return self._write("resolved.gin", text)

    def write_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one JSON object with ``step`` and the values to metrics.jsonl, at once; NaN and infinities
        become null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        with self._writable():
            # An unbuffered write to a nearly full disk is cut short.
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds TensorBoard scalars; names with a slash are grouped."""
        if self._without_tensorboard:
            return
        with self._writable():
            if self._writer is None:
                try:  # takes a second, and evaluation needs none
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    logging.warning("TensorBoard is not installed: its log of this run is not written")
                    self._without_tensorboard = True
                    return

                self._writer = SummaryWriter(str(self.tensorboard), purge_step=self._purge_step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def write_result(self, step: int, metrics: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """Adds the test result to TensorBoard, with the settings as hyperparameters, so that its table compares runs by
        them. step: the run's last; the result is written one step later, so that a run resumed from there purges it.
        metrics: by tag, as ``test/mrr``. settings: by gin name."""
        self.write_scalars(step + 1, metrics)
        if self._writer is None:  # without TensorBoard
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {name: v if isinstance(v, (bool, int, float)) else str(v) for name, v in settings.items()}
        with self._writable():
            for summary in hparams(shown, dict(metrics)):
                self._writer._get_file_writer().add_summary(summary)

    def truncate_after(self, step: int, epoch: int | None = None) -> None:
        """Removes what was recorded after ``step``: lines of metrics.jsonl, and TensorBoard events by its
        purge step. Final results and their report.html are removed too: a resumed run writes them anew.

        epoch: the one (from 0) that the checkpoint is in, whose record is still to come: one that was written
        at this very step is removed too. Call it before anything is written.
        """
        self._metrics.close()
        lines = self.metrics_path.read_bytes().splitlines(keepends=True)
        kept = [(line, record) for line in lines if (record := _kept_record(line, step, epoch)) is not None]
        # A run of release 0.1.0 is resumed under today's names of its metrics.
        text = b"".join(line for line, _ in kept).decode().replace('"liked_', '"high_rated_')
        self._write(self.metrics_path.name, text)
        (self.path / "report.html").unlink(missing_ok=True)
        self._metrics = _open_lines(self.metrics_path)
        # TensorBoard reads files in the order of their names, and a file must be read before the one that purges it.
        # Where the clock was put back, or the next file could get the same second, all get small numbers in their
        # order.
        paths = sorted(self.tensorboard.glob("*"))
        files = [(match, path) for path in paths if (match := _EVENTS.fullmatch(path.name))]
        if any(int(match["time"]) >= int(time.time()) for match, _ in files):
            with self._writable():
                for number, (match, path) in enumerate(files, start=1):
                    path.rename(self.tensorboard / f"{match['start']}{number:010d}{match['end']}")
        self._purge_step = step + 1
        at_step = [record for _, record in kept if record["step"] == step]
        if epoch is None or any("epoch" in record for record in at_step):
            return
        # TensorBoard can only purge whole steps, so that the scalars of this step, but not of its epoch, are written
        # again.
        self._purge_step = step
        for record in at_step:
            scalars = {name: value for name, value in record.items() if "/" in name}
            self.write_scalars(
                step, {name: v if isinstance(v, (int, float)) else math.nan for name, v in scalars.items()}
            )

    def flush(self) -> None:
        """Brings everything to disk: a checkpoint must not be ahead of the metrics."""
        with self._writable():
            os.fsync(self._metrics.fileno())
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        """Writes out everything and releases the lock. May be called again."""
        if self._lock.closed:
            return
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            logging.warning("TensorBoard's last events are not written: %s", error.strerror)
        self._metrics.close()
        remove_log_file(self._log_handler)
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, SystemExit):
            to_log_file(python_logging.ERROR, f"{type(error).__name__}: {error}")
        self.close()

    def _write(self, name: str, text: str) -> Path:
        """Replaces a file of the folder, whole or not at all."""
        # Not by `new_file`, which follows a link and makes a folder that is gone: a run writes to its own folder alone.
        path, writing = self.path / name, self.path / f".{name}.writing"
        with self._writable():
            writing.unlink(missing_ok=True)
            with open(writing, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(writing, path)  # a kill before this line leaves the old file as it was
        return path

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Turns a full disk into one line."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to run folder {self.path}: {error.strerror}") from error


def holds_run(folder: Path) -> bool:
    """Whether a run measured or saved anything there; one that was refused before its first step did not."""
    metrics = folder / "metrics.jsonl"
    measured = metrics.exists() and metrics.stat().st_size > 0
    return measured or any((folder / "checkpoints").glob("[0-9]*"))


def _new_folder(name: str) -> Path:
    """A folder named by the time, followed by a number where that one exists."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    RUNS.mkdir(exist_ok=True)
    attempt = 1
    while True:
        folder = RUNS / (f"{stamp}-{name}" + (f"-{attempt}" if attempt > 1 else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            attempt += 1


def _lock(folder: Path) -> IO[str]:
    """The locked lock file, which names this process. The operating system releases the lock however the process
    ends."""
    path = folder / "run.lock"
    file = open(path, "a+", encoding="utf-8", opener=no_link)  # noqa: SIM115, held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(32).strip() or "unknown"
        file.close()
        raise UserError(f"run folder {folder} is in use by process {owner}; wait for it or choose another") from None
    except OSError as error:
        logging.warning("run folder %s cannot be locked (%s): start no second run in it", folder, error.strerror)
    # Truncated only now: a process that did not get the lock has read the owner's id from it.
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _open_lines(path: Path) -> io.FileIO:
    """A JSON-lines file for appending, unbuffered; an unfinished last line, of a killed process, is cut off."""
    if path.exists():
        content = path.read_bytes()
        with open(path, "r+b", opener=no_link) as file:
            file.truncate(content.rfind(b"\n") + 1)
    return open(path, "ab", buffering=0, opener=no_link)


def _kept_record(line: bytes, step: int, epoch: int | None) -> dict[str, Any] | None:
    """The record of a line of metrics.jsonl up to this step and before this epoch; None for a later one, for the final
    results and for a damaged line."""
    try:
        record = json.loads(line.decode())
        late = int(record["step"]) > step or (epoch is not None and int(record.get("epoch", -1)) >= epoch)
        return None if late or record.get("part") == "final" else record
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
