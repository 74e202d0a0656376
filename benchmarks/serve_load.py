"""Requests a second and their latency over HTTP, by the number of clients; the last line is one JSON object.

    python benchmarks/serve_load.py --encoder=SASRec --items=3416 --length=20 --requests=2000

Without ``--run`` an untrained model of this size is served. Server and clients share the machine's cores; every client
keeps one connection, and asks again as soon as it is answered. Latencies are in milliseconds. Needs the extra
``serve``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import records
from untrained import recommender

from generative_recommenders.retrieval.recommender import Recommender


@contextlib.contextmanager
def served(run: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a server of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "generative_recommenders.serve", str(run), f"--port={port}"]
    server = subprocess.Popen(command, cwd=records.ROOT)
    try:
        while True:
            with contextlib.suppress(OSError):
                http.client.HTTPConnection("127.0.0.1", port, timeout=60).connect()
                break
            if server.poll() is not None:
                raise SystemExit(server.returncode)
            time.sleep(0.1)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait(60)


def client(port: int, bodies: list[str]) -> list[float]:
    """Milliseconds of each request, asked one after the other."""
    connection, times = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
    for body in bodies:
        start = time.perf_counter()
        connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        times.append(1000 * (time.perf_counter() - start))
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {text.decode()[:300]}")
    return times


def measure(port: int, bodies: list[str], clients: int) -> dict[str, float]:
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        shares = [bodies[number::clients] for number in range(clients)]
        times = np.concatenate(list(pool.map(client, [port] * clients, shares)))
        seconds = time.perf_counter() - start
    p50, p95, p99 = np.percentile(times, (50, 95, 99)).round(2).tolist()
    return {"per_second": round(len(times) / seconds, 1), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def main() -> None:
    parser = records.parser_of(__doc__, items=3416, length=20, requests=2000, seed=0)
    parser.add_argument("--run", type=Path, help="the folder of a run whose model reads items alone")
    parser.add_argument("--encoder", default="SASRec")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    rng, results = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or Path(folder)
        if args.run is None:
            bindings = {"train_fn.main_module": args.encoder, "train_fn.max_sequence_length": args.length}
            recommender(args.items, bindings).save(run)
        ids = Recommender.load(run, "cpu").item_ids.to_pylist()
        histories = [rng.choices(ids, k=args.length) for _ in range(args.requests)]
        bodies = [json.dumps({"history": history, "k": 10}) for history in histories]
        with served(run) as (port, process):
            measure(port, bodies, max(args.clients))  # fills caches and pools
            before = records.resident_bytes(process)
            for clients in args.clients:
                results[f"clients_{clients}"] = measure(port, bodies, clients)
                print(clients, results[f"clients_{clients}"], flush=True)
            grown = round((records.resident_bytes(process) - before) / 2**20, 1)
    records.finish({"setup": vars(args), "results": results, "server_grew_mb": grown})


if __name__ == "__main__":
    main()
