"""The processes of a run on one host: started, watched and ended by the process that the user started.

That process holds the store at which the members meet, on the loopback interface, and passes SIGTERM and
Ctrl-C on. When a member fails it ends the others; when it is gone itself, the members stop by themselves.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch.distributed as dist
from absl import logging

from generative_recommenders.distributed.memory_faults import out_of_memory
from generative_recommenders.distributed.process_group import join_group
from generative_recommenders.distributed.signals import handled_signals
from generative_recommenders.errors import UserError

START_METHOD = "spawn"
LOOPBACK = "127.0.0.1"
SETTLE_SECONDS = 1.0
"""How long the members that fail after a first one have to say so, to tell the first failure from its
consequences."""
END_SECONDS = 5.0
"""How long members have between SIGTERM and SIGKILL when one failed."""
ORPHAN_SECONDS = 15.0
"""How long a member has to write its checkpoint when the process that started it is gone."""
REPORT_LIMIT = 30_000
"""Bytes of what a failed member says; of a longer text both ends are kept."""
INTERRUPTED = 130
"""Exit code of a member that stopped in good order because it was asked to."""


@dataclass(frozen=True)
class Plan:
    """What every member needs to know."""

    worker: Callable[..., int]
    args: tuple[Any, ...]
    world_size: int
    port: int
    device_type: str | None
    timeout: timedelta


@dataclass(frozen=True, eq=False)
class Member:
    """said: the reports that were read so far."""

    rank: int
    process: BaseProcess
    reports: Connection
    said: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """kind: "user" (a UserError), "error" (text: a traceback, or one line for a failed
    allocation), "interrupted", "killed" or "exit"."""

    rank: int
    kind: str
    text: str
    when: float
    code: int


def run_spawned(
    worker: Callable[..., int],
    args: tuple[Any, ...],
    world_size: int,
    port: int,
    device_type: str | None,
    timeout: timedelta,
) -> int:
    """Runs ``worker(rank, world_size, *args)`` in world_size processes; returns the exit code of the run."""
    store, port = _serve_store(port)
    plan = Plan(worker, args, world_size, port, device_type, timeout)
    signals = SignalRelay()
    members: list[Member] = []
    with handled_signals(signals.handle):
        try:
            for rank in range(world_size):
                members.append(_start(plan, rank))
            signals.open(members)
            return _watch(members, signals.received)
        finally:
            _end(members)
            del store


class SignalRelay:
    """Passes each signal on once; one that comes while the members are being started waits for the last.

    ``handle`` may interrupt ``open`` or itself at any point, so that one ``pop`` decides who passes one on.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waiting: list[int] = []
        self._members: list[Member] = []

    def handle(self, number: int) -> None:
        self.received.append(number)
        self._waiting.append(number)
        self._pass_on()

    def open(self, members: list[Member]) -> None:
        """members: all of them."""
        self._members = members
        self._pass_on()

    def _pass_on(self) -> None:
        with contextlib.suppress(IndexError):
            while self._members:
                number = self._waiting.pop(0)
                for member in self._members:
                    _send(member.process, number)


def _serve_store(port: int) -> tuple[dist.TCPStore, int]:
    """The store and its port: the given one, or any free one where that is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError:
        listener.bind((LOOPBACK, 0))
        logging.warning("port %d is in use; the processes meet at port %d", port, listener.getsockname()[1])
    listener.listen(128)
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store's from here on
    return dist.TCPStore(
        LOOPBACK, port, None, True, wait_for_workers=False, master_listen_fd=descriptor
    ), port


def _start(plan: Plan, rank: int) -> Member:
    context = cast(SpawnContext, multiprocessing.get_context(START_METHOD))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_member, args=(plan, rank, sender), name=f"rank {rank}")
    process.start()
    sender.close()
    return Member(rank, process, receiver)


def _watch(members: list[Member], received: list[int]) -> int:
    """Waits for all members, or for the first failure; returns the exit code.

    received: the signals that were passed on. A member that stops in good order because of one is no failure,
    and the others may take their time: one of them may be writing the checkpoint.
    """
    running = list(members)
    while running:
        ended = _wait(running)
        running = [member for member in running if member not in ended]
        failed = [member for member in ended if _has_failed(member, received)]
        if failed:
            failed += [member for member in _settle(running) if _has_failed(member, received)]
            return _report(min(map(_failure, failed), key=lambda failure: failure.when), received)
    return INTERRUPTED if any(member.process.exitcode for member in members) else 0


def _wait(running: list[Member], seconds: float | None = None) -> list[Member]:
    """Waits until something happens, and reads what members say; returns those that have ended, if any.

    A sentinel is closed a moment before its process can be waited for: until then it has no exit code, so it
    is joined. Reports are read at once because a member that says more than a pipe holds waits for that.
    """
    sentinels = [member.process.sentinel for member in running]
    ready = wait([*sentinels, *(each.reports for each in running if not each.reports.closed)], seconds)
    ended = [member for member, sentinel in zip(running, sentinels) if sentinel in ready]
    for member in ended:
        member.process.join()
    for member in running:
        _read(member)
    return ended


def _read(member: Member) -> None:
    """Reads what there is; closes the pipe at its end, or where a member was killed within a report."""
    try:
        while not member.reports.closed and member.reports.poll():
            member.said.append(member.reports.recv_bytes())
    except (EOFError, OSError):
        member.reports.close()


def _settle(running: list[Member]) -> list[Member]:
    """The members that end within SETTLE_SECONDS."""
    deadline = time.monotonic() + SETTLE_SECONDS
    ended: list[Member] = []
    while len(ended) < len(running) and time.monotonic() < deadline:
        left = [member for member in running if member not in ended]
        ended += _wait(left, max(0.0, deadline - time.monotonic()))
    return ended


def _has_failed(member: Member, received: list[int]) -> bool:
    code = member.process.exitcode
    return code != 0 and not (received and code == INTERRUPTED)


def _failure(member: Member) -> Failure:
    """What a member that ended with an exit code other than 0 died of. One that said nothing died before
    the rest."""
    code = member.process.exitcode or 0
    if member.said:
        return Failure(rank=member.rank, code=code, **json.loads(member.said[0]))
    if code < 0:
        return Failure(member.rank, "killed", signal.Signals(-code).name, 0.0, code)
    return Failure(member.rank, "exit", "", 0.0, code)


def _report(failure: Failure, received: list[int]) -> int:
    """Says why the run ends; returns its exit code."""
    logging.flush()
    if failure.kind == "user":
        print(f"error: {failure.text}", file=sys.stderr, flush=True)
        return failure.code
    if received and failure.kind in ("killed", "interrupted"):
        return 128 + received[0]
    if failure.kind == "exit":
        return failure.code
    if failure.kind == "killed":
        text = f"it was killed by {failure.text}; SIGKILL is often the system running out of memory"
    else:
        text = failure.text
    print(f"rank {failure.rank} failed, the other processes are ended: {text}", file=sys.stderr, flush=True)
    return 1


def _end(members: list[Member]) -> None:
    """No member is left behind this."""
    for member in members:
        member.reports.close()  # nobody waits for it to be read
        _send(member.process, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    for member in members:
        member.process.join(max(0.0, deadline - time.monotonic()))
        member.process.kill()
        member.process.join()


def _send(process: BaseProcess, number: int) -> None:
    """A signal to a process that has not ended yet."""
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _member(plan: Plan, rank: int, reports: Connection) -> None:
    """The life of a member."""
    os.setpgrp()  # the terminal's Ctrl-C reaches the parent alone, which passes it on once
    _stop_when_orphaned()
    os.environ["LOCAL_RANK"] = str(rank)
    code = 1
    try:
        code = _work(plan, rank)
    except UserError as error:
        code = error.exit_code
        _send_report(reports, "user", str(error))
    except KeyboardInterrupt:
        _send_report(reports, "interrupted", "")
    except Exception as error:  # whatever it is, it is reported and ends the run
        _send_report(reports, "error", out_of_memory(error) or traceback.format_exc())
    finally:
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)  # without waiting for peers that may never answer
    sys.exit(0)


def _work(plan: Plan, rank: int) -> int:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, _loopback_interface())
    store = dist.TCPStore(LOOPBACK, plan.port, None, False, timeout=plan.timeout)
    join_group(rank, plan.world_size, plan.world_size, plan.device_type, plan.timeout, store)
    code = plan.worker(rank, plan.world_size, *plan.args)
    dist.destroy_process_group()
    return code


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _send_report(reports: Connection, kind: str, text: str) -> None:
    report = {"kind": kind, "text": _shortened(text), "when": time.monotonic()}
    with contextlib.suppress(BrokenPipeError):
        reports.send_bytes(json.dumps(report, ensure_ascii=False).encode())


def _shortened(text: str) -> str:
    """At most about REPORT_LIMIT bytes of UTF-8."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) > REPORT_LIMIT:
        half = REPORT_LIMIT // 2
        encoded = encoded[:half] + b" [...] " + encoded[-half:]
    return encoded.decode(errors="ignore")


def _stop_when_orphaned() -> None:
    """A thread that waits for the parent's end; then this process is asked to stop, and later is ended."""

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
