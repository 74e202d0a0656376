"""Answers over HTTP: as the recommender's, under load, until the server is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from generative_recommenders import Recommender, serve
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.serve import (
    Batcher,
    Limits,
    RecommendRequest,
    SimilarRequest,
    answer,
    make_app,
)
from recommender_runs import make_run
from tiny_data import ragged_sequences, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    dataset = tiny_dataset(folder / "data", ragged_sequences(57, 30, seed=5))
    return make_run(folder, dataset, {"main_module": "SASRec"})[0]


@pytest.fixture(scope="module")
def rec(run: Path) -> Recommender:
    return Recommender.load(run)


def test_requests_answered_together_are_answered_as_alone(rec: Recommender) -> None:
    requests = [
        RecommendRequest(history=["i00003", "i00004"], k=3),
        RecommendRequest(history=["i00005"], k=5, exclude_seen=False),
        RecommendRequest(history=["i00005"], k=2, candidates=["i00007", "i00009", "what"]),
        RecommendRequest(history=["what"]),
        RecommendRequest(history=[], popular=True, k=1),
        RecommendRequest(history=["i00003", "i00004"], k=7),
    ]
    answers = answer(rec, requests)
    for request, found in zip(requests[:3], answers):
        alone = rec.recommend(
            {"a": request.history},
            request.k,
            exclude_seen=request.exclude_seen,
            candidates=request.candidates,
        )
        assert [each["item_id"] for each in found] == alone["item_id"].tolist()
        assert [each["score"] for each in found] == pytest.approx(alone["score"].tolist(), abs=1e-5)
    assert answers[3] == [] and len(answers[4]) == 1
    assert answers[5][:3] == answers[0]


def test_missing_columns_that_the_model_reads_are_refused(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data", ragged_sequences(57, 30, seed=5))
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "HSTU", "next_time": "given"})[0])
    columns = {"timestamp": [5000, 9000]}
    missing, newcomer, good, bad, later = answer(
        rec,
        [
            RecommendRequest(history=["i00003"]),
            RecommendRequest(history=[], popular=True),
            RecommendRequest(history=["i00003", "i00004"], columns=columns),
            RecommendRequest(history=["i00003", "i00004"], columns=columns, exclude_seen=False, candidates=[]),
            RecommendRequest(history=["i00003", "i00004"], columns=columns, at=10**7),
        ],
    )
    assert isinstance(missing, UserError) and "timestamp" in str(missing)
    assert [each["item_id"] for each in newcomer] == rec.recommend({"new": []}, fallback="popular")["item_id"].tolist()
    assert bad == [] and len(good) == 10
    assert good != later


def test_times_are_read_by_each_request_alone(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data", ragged_sequences(57, 30, seed=5))
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "HSTU", "next_time": "given"})[0])
    history = ["i00003", "i00004", "i00005"]
    seconds, milliseconds, dates = (
        RecommendRequest(history=history[: len(times)], columns={"timestamp": times})
        for times in ([1_600_000_000, 1_600_000_600], [1_600_000_000_000 + i for i in range(3)], [20230531] * 3)
    )
    requests = [seconds, milliseconds, dates]
    wrong = seconds.model_copy(update={"columns": {"timestamp": [5, -(2**53)]}})
    *together, refused = answer(rec, [*requests, wrong])
    assert isinstance(refused, UserError) and "timestamp holds a number that is not a time" in str(refused)
    for request, found in zip(requests, together):
        (alone,) = answer(rec, [request])
        frame = {"user_id": "a", "item_id": request.history, **request.columns}
        expected = rec.recommend(pd.DataFrame(frame))
        for each in (found, alone):
            assert [item["item_id"] for item in each] == expected["item_id"].tolist()
            assert [item["score"] for item in each] == pytest.approx(expected["score"].tolist(), abs=1e-5)


def test_batches_fill_without_a_wait(rec: Recommender) -> None:
    sizes: list[int] = []

    async def ask_all() -> None:
        batcher = Batcher(rec, Limits(wait=0), sizes.append)
        task = asyncio.create_task(batcher.run())
        await asyncio.gather(*(batcher.ask(RecommendRequest(history=["i00003"])) for _ in range(64)))
        task.cancel()

    asyncio.run(asyncio.wait_for(ask_all(), 60))
    assert max(sizes) > 8


def test_requests_for_similar_items_wait_among_the_others(rec: Recommender) -> None:
    async def ask_all() -> list[object]:
        batcher = Batcher(rec, Limits(max_waiting=2), lambda size: None)
        near, other = SimilarRequest(items=["i00003"], k=2), RecommendRequest(history=["i00003"])
        asked = [batcher.ask_similar(near), batcher.ask_similar(near), batcher.ask_similar(near), batcher.ask(other)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, *refused = asyncio.run(asyncio.wait_for(ask_all(), 60))
    assert first == second and len(first["i00003"]) == 2
    assert all(isinstance(each, asyncio.QueueFull) for each in refused)


def test_a_value_that_the_model_cannot_read_refuses_its_request_alone(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data", ragged_sequences(57, 30, seed=5))
    chosen = {"main_module": "SASRec", "input_preprocessor": "CombinedItemAndRating"}
    rec = Recommender.load(make_run(tmp_path, dataset, chosen)[0])
    ratings = ([3.0], [100.0], ["much"], [4])
    first, large, text, last = answer(
        rec, [RecommendRequest(history=["i00003"], columns={"rating": each}) for each in ratings]
    )
    assert isinstance(large, UserError) and "rating 100.0" in str(large) and "from 0 to 5" in str(large)
    assert isinstance(text, UserError) and "rating 'much' is not a number" in str(text)
    assert len(first) == len(last) == 10


def test_a_fault_of_the_program_leaves_the_server_answering(rec: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask_twice() -> tuple[object, object]:
        batcher = Batcher(rec, Limits(), lambda size: None)
        task = asyncio.create_task(batcher.run())
        request = RecommendRequest(history=["i00003"], k=2)
        with monkeypatch.context() as patch:
            patch.setattr(rec.search, "best", lambda *_: 1 / 0)
            (failed,) = await asyncio.gather(batcher.ask(request), return_exceptions=True)
        answered = await batcher.ask(request)
        task.cancel()
        return failed, answered

    failed, answered = asyncio.run(asyncio.wait_for(ask_twice(), 60))
    assert isinstance(failed, ZeroDivisionError) and len(answered) == 2


def test_an_answer_of_status_500_is_counted(rec: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    app = make_app(rec)

    async def ask(method: str, path: str, body: bytes = b"") -> bytes:
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": body}

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        with contextlib.suppress(ZeroDivisionError):  # which the server logs
            await app(scope, receive, send)
        return b"".join(each.get("body", b"") for each in sent)

    async def counts() -> bytes:
        async with app.router.lifespan_context(app):
            await ask("POST", "/similar", b'{"items": ["i00003"]}')
            return await ask("GET", "/metrics")

    monkeypatch.setattr(rec, "similar_items", lambda *_: 1 / 0)
    assert b'requests_total{path="/similar",status="500"} 1.0' in asyncio.run(asyncio.wait_for(counts(), 60))


class Server:
    def __init__(self, run: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "generative_recommenders.serve", str(run), f"--port={self.port}"]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(600):
            try:
                assert self.ask("GET", "/health")[0] == 200
                return
            except OSError:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def ask(self, method: str, path: str, body: object = None, connection=None) -> tuple[int, str]:
        own = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        own.request(method, path, text, {"Content-Type": "application/json"})
        response = own.getresponse()
        return response.status, response.read().decode()

    def memory(self) -> int:
        """Bytes that the server's process holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    server = Server(run)
    yield server
    # It ends when it is told to, and says nothing.
    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(timeout=30) == 0
        assert "Traceback" not in server.process.stderr.read()
    finally:
        server.process.kill()


def test_answers_over_http(server: Server, rec: Recommender) -> None:
    status, text = server.ask("POST", "/recommend", {"history": ["i00003", "i00004"], "k": 3})
    assert status == 200
    expected = rec.recommend({"a": ["i00003", "i00004"]}, k=3)["item_id"].tolist()
    assert [each["item_id"] for each in json.loads(text)["items"]] == expected
    status, text = server.ask("POST", "/similar", {"items": ["i00003", "i00003"], "k": 2})
    near = rec.similar_items(["i00003"], 2)["similar_id"].tolist()
    assert status == 200 and [each["item_id"] for each in json.loads(text)["items"]["i00003"]] == near
    assert server.ask("GET", "/docs")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/recommend", {"history": ["i00003"], "k": 0}, 422, "greater than or equal to 1"),
        ("/recommend", {}, 422, "history"),
        ("/recommend", {"history": ["i00003"], "kk": 1}, 422, "kk"),
        ("/recommend", {"history": ["i00003"] * 10_001}, 422, "at most 10000"),
        ("/recommend", {"history": ["i00003"], "columns": {"rating": []}}, 422, "0 values for 1 events"),
        ("/recommend", b"{", 422, "JSON"),
        ("/recommend", b'{"history": [NaN]}', 422, "finite number"),
        ("/recommend", b'{"history": ["i00003"], "k": 1e400}', 422, '"k"'),
        ("/recommend", b'{"history": ["i00003"], "\\ud800": "\\ud800"}', 422, "unicode string"),
        ("/recommend", b" " * (1 << 21), 413, "longer than"),
        ("/similar", {"items": ["what"]}, 422, "is not an item that the model was trained on"),
        ("/similar", {"items": ["i00003"] * 11, "k": 1000}, 422, "more than 10000"),
        ("/nothing", {}, 404, "Not Found"),
    ],
)
def test_faults_of_a_request_say_what_is_wrong(
    server: Server, path: str, body: object, status: int, words: str
) -> None:
    assert server.ask("POST", path, body)[0] == status
    assert words in server.ask("POST", path, body)[1]


def test_a_faulty_request_has_a_short_answer(server: Server) -> None:
    for faulty in ({"history": [None] * 9000}, {"x" * 900_000: 1}, {"history": [], "columns": {"x" * 900_000: [1]}}):
        status, text = server.ask("POST", "/recommend", faulty)
        assert status == 422 and len(text) < 3000


def test_a_body_that_is_not_said_to_be_json_is_told_by_its_header(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"history": ["i00003"], "k": 0})
    for header, words in (
        ("application/x-www-form-urlencoded", b"must be application/json"),  # as curl does
        ("Application/JSON", b"greater than or equal to 1"),
    ):
        connection.request("POST", "/recommend", body, {"Content-Type": header})
        response = connection.getresponse()
        assert response.status == 422 and words in response.read()


def test_load_without_an_error_or_growth_of_memory(server: Server) -> None:
    def client(number: int, requests: int) -> set[int]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"history": [f"i{1 + (number * 7 + i) % 30:05}" for i in range(5)], "k": 10}
        return {server.ask("POST", "/recommend", body, connection)[0] for _ in range(requests)}

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32), [16] * 32))  # fills caches and pools
        before = server.memory()
        statuses = set().union(*pool.map(client, range(32), [63] * 32))
    assert statuses == {200}
    assert server.memory() - before < 32 << 20
    text = server.ask("GET", "/metrics")[1]
    counted = [line for line in text.splitlines() if line.startswith("requests_total") and "/recommend" in line]
    assert any('status="200"' in line and float(line.split()[-1]) >= 2016 + 512 for line in counted)
    assert "batch_size_bucket" in text and "request_seconds_bucket" in text


def test_a_folder_without_a_run_ends_the_program(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "generative_recommenders.serve", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no folder of a run" in done.stderr


@pytest.mark.parametrize(("host", "words"), [("127.0.0.1", "in use"), ("no.such.host.invalid", "--host=no.such")])
def test_an_address_that_is_not_free_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, host: str, words: str
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(Recommender, "load", lambda *_: 1 / 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(["run", f"--host={host}", f"--port={taken.getsockname()[1]}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err


@pytest.fixture
def port() -> str:
    """The flag of a port that is free."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"--port={free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["x" * 300], "File name too long"), ([".", "--port=0"], "from 1 to 65535")],
)
def test_faults_of_the_command_report_one_line(
    capsys: pytest.CaptureFixture[str], port: str, arguments: list[str], words: str
) -> None:
    assert serve.main([port, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and words in printed


def test_a_model_that_memory_does_not_hold_reports_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Recommender, "load", too_large)
    assert serve.main(["run", port]) == 1
    assert capsys.readouterr().err.count("\n") == 1
