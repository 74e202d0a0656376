"""Server of a trained run: ``python -m generative_recommenders.serve RUN [--port=8000]``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import Any

from generative_recommenders.commands.program import exit_code
from generative_recommenders.config.plugins import add_plugin_flag
from generative_recommenders.errors import UserError, not_installed
from generative_recommenders.retrieval.recommender import Recommender
from generative_recommenders.retrieval.serve import Limits, make_app


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; requests that have begun are answered first."""
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m generative_recommenders.serve", description="Serves a trained run over HTTP."
    )
    parser.add_argument("run", help="the folder of a trained run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, help="TCP port, %(default)s by default")
    parser.add_argument("--device", default="auto", help="cpu or cuda; a GPU if there is one by default")
    add_plugin_flag(parser)
    parser.add_argument(
        "--max_batch",
        type=int,
        default=limits.max_batch,
        help="requests answered together, %(default)s by default",
    )
    parser.add_argument(
        "--wait_ms",
        type=float,
        default=1000 * limits.wait,
        help="milliseconds that a request waits for others, %(default)s by default",
    )
    args = parser.parse_args(argv)
    loaded: list[Any] = []

    def load() -> int:
        if args.max_batch < 1 or not 0 <= args.wait_ms <= 60_000 or not 0 < args.port < 1 << 16:
            raise UserError("--max_batch must be 1 or more, --wait_ms from 0 to 60000, --port from 1 to 65535")
        if find_spec("uvicorn") is None:
            raise not_installed("uvicorn", "serve")
        recommender = Recommender.load(args.run, args.device, args.plugin)
        loaded.append(make_app(recommender, Limits(args.max_batch, args.wait_ms / 1000)))
        return 0

    if code := exit_code(load):
        return code
    import uvicorn  # which has its own way with SIGTERM and Ctrl-C

    print(f"answers at http://{args.host}:{args.port}/docs; Ctrl-C ends the server", flush=True)
    uvicorn.run(loaded[0], host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
