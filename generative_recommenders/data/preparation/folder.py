"""Atomic writing of prepared folders and of files: to a temporary sibling that takes the target's place."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from absl import logging

from generative_recommenders.data.manifest import FILE_NAME
from generative_recommenders.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``target`` if the block succeeds and vanishes if it does not.

    An existing target is exchanged in one step where the file system can. UserError if it exists and is not a
    prepared folder, or if the disk is full or not writable.
    """
    with _beside(target) as scratch:
        empty_or_prepared = target.is_dir() and ((target / FILE_NAME).is_file() or not any(target.iterdir()))
        if target.exists() and not empty_or_prepared:
            raise UserError(f"{target}: exists and is not a prepared folder; name another one or remove it")
        scratch.mkdir()
        yield scratch


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, whose file takes its place if the block succeeds, else vanishes."""
    check_file(path)
    with _beside(path) as scratch:
        yield scratch


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """A whole UTF-8 file by `new_file`, line ends as they are. errors: how characters that UTF-8 lacks are encoded."""
    with new_file(path) as scratch:
        scratch.write_bytes(text.encode(errors=errors))


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target``, which takes its place if the block succeeds. A link keeps leading there."""
    if os.path.islink(target):
        target = Path(os.path.realpath(target))
    scratch = _scratch(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, f".{target.name}.tmp-")
        yield scratch
        _replace(scratch, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(scratch)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{scratch_owner()}")


def check_file(path: str | Path, flag: str = "") -> None:
    """UserError, with the name of the ``flag`` that asks for it, if no file can be written at ``path``."""
    where, path = f"{flag}{path}", Path(path)
    try:
        if not path.name or path.is_dir():
            raise UserError(f"{where}: not the name of a file; name the file to write")
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: a device or a pipe, whose place no file may take; name the file to write")
        if path.name == "metrics.jsonl" and (path.parent / "run.lock").exists():
            raise UserError(f"{where}: the run of that folder keeps its records there; name another file")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{where}: {parent} is not a folder; name a file elsewhere")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{where}: {parent} cannot be written to; name a file elsewhere")
        with suppress(FileNotFoundError):
            _scratch(path).stat()
    except OSError as error:
        raise UserError(f"{where}: cannot be written: {error.strerror or error}") from error


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time makes ``target``; the others wait. Where the file system has no locks, none waits."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.parent / f".{target.name}.lock", "w")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    with file:  # which stays, empty: a second process may hold it open already
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.info("%s: another process makes it; waiting for that", target)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def scratch_owner() -> str:
    """Names this process among those that share a disk."""
    return f"{socket.gethostname()}-{os.getpid()}"


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed runs of this host left under names of ``prefix`` and `scratch_owner`."""
    for path in folder.glob(f"{glob.escape(prefix)}{socket.gethostname()}-*"):
        process = path.name.rpartition("-")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not Path(f"/proc/{process}").exists()):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or folder that may be there."""
    with suppress(OSError):  # a name that is too long, for one, which is told where it is written
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _replace(scratch: Path, target: Path) -> None:
    """Put ``scratch`` in the place of ``target``: a folder by Linux' exchange of names, or in two steps."""
    if not (scratch.is_dir() and target.is_dir()):
        scratch.replace(target)  # of a folder in the place of a file, or the other way round, an OSError
        return
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform.startswith("linux") else None
    paths = (_AT_FDCWD, os.fsencode(scratch), _AT_FDCWD, os.fsencode(target))
    if rename is None or rename(*paths, _RENAME_EXCHANGE) != 0:
        old = scratch.with_name(scratch.name + "-old")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
