"""Server of a trained run: ``python -m generative_recommenders.serve RUN [--port=8000]``."""

from __future__ import annotations

import argparse
import socket
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from generative_recommenders.commands.program import exit_code
from generative_recommenders.config.plugins import add_plugin_flag
from generative_recommenders.distributed.signals import handled_signals
from generative_recommenders.errors import UserError, first_line, not_installed
from generative_recommenders.run.logging import show


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; requests that have begun are answered first."""
    app: Any = None
    listeners: list[socket.socket] = []

    def load() -> int:
        nonlocal app
        # Imports that take seconds, here, where an interrupt of them is one line.
        from generative_recommenders.retrieval.recommender import Recommender
        from generative_recommenders.retrieval.serve import Limits, make_app

        args = parser(Limits()).parse_args(argv)
        if args.max_batch < 1 or not 0 <= args.wait_ms <= 60_000 or not 0 < args.port < 1 << 16:
            raise UserError("--max_batch must be 1 or more, --wait_ms from 0 to 60000, --port from 1 to 65535")
        if find_spec("uvicorn") is None:
            raise not_installed("uvicorn", "serve")
        bind(args.host, args.port, listeners)  # before the model is loaded, which may take minutes
        recommender = Recommender.load(args.run, args.device, args.plugin)
        app = make_app(recommender, Limits(args.max_batch, args.wait_ms / 1000))
        import uvicorn  # noqa: F401

        show(f"answers at http://{args.host}:{args.port}/docs; Ctrl-C ends the server")
        return 0

    try:
        if code := exit_code(load):
            return code
        with suppress(KeyboardInterrupt), handled_signals(_stop):
            import uvicorn  # which has its own way with SIGTERM and Ctrl-C, and sends the signal again at its end

            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
            server.run(sockets=listeners)
            return 0 if server.started else 3
        return 0
    finally:
        for each in listeners:
            each.close()


def _stop(number: int) -> None:
    raise KeyboardInterrupt


def parser(limits: Any) -> argparse.ArgumentParser:
    """limits: `retrieval.serve.Limits`, the defaults."""
    made = argparse.ArgumentParser(
        prog="python -m generative_recommenders.serve", description="Serves a trained run over HTTP."
    )
    made.add_argument("run", help="the folder of a trained run")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone by default")
    made.add_argument("--port", type=int, default=8000, help="TCP port, %(default)s by default")
    made.add_argument("--device", default="auto", help="cpu or cuda; a GPU if there is one by default")
    add_plugin_flag(made)
    made.add_argument(
        "--max_batch",
        type=int,
        default=limits.max_batch,
        help="requests answered together, %(default)s by default",
    )
    made.add_argument(
        "--wait_ms",
        type=float,
        default=1000 * limits.wait,
        help="milliseconds that a request waits for others, %(default)s by default",
    )
    return made


def bind(host: str, port: int, sockets: list[socket.socket]) -> None:
    """Adds a socket bound to each address of a host, all of which refuse connections until a server listens.

    UserError where one cannot be bound.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sockets.append(socket.socket(family, kind, protocol))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # the IPv4 address of the same host has a socket of its own
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--host={host} --port={port}: cannot be listened on: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
