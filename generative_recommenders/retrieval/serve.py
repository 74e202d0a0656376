"""Answers over HTTP: requests that wait together are answered together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import polars as pl
import torch
from absl import logging
from pydantic import BaseModel, ConfigDict, Field, model_validator

from generative_recommenders.errors import UserError, not_installed
from generative_recommenders.retrieval.frames import MAX_NUMBER, SECONDS, parsed_times, seconds
from generative_recommenders.retrieval.histories import HistoryReader
from generative_recommenders.retrieval.recommender import Recommender

MAX_HISTORY, MAX_CANDIDATES, MAX_K = 10_000, 10_000, 1000
MAX_SIMILAR = 10_000
"""Items in the answer to one request for similar ones."""
MAX_FAULTS = 10
"""Of a request that the answer tells."""
MAX_NAME = 200
"""Characters that the answer to a faulty request repeats of a name in it."""
Item = Annotated[str, Field(max_length=1000)] | int
Cell = float | int | str | None
Ranked = list[dict[str, Any]]
"""Items ``{"item_id", "score"}``, best first."""


class RecommendRequest(BaseModel):
    """One user's history, oldest event first. columns: what else the model reads of the events, such as
    ``{"rating": [5, 3]}``."""

    model_config = ConfigDict(extra="forbid")
    history: list[Item] = Field(max_length=MAX_HISTORY, examples=[["0307887898", "0312853122"]])
    k: int = Field(10, ge=1, le=MAX_K)
    exclude_seen: bool = True
    candidates: list[Item] | None = Field(None, max_length=MAX_CANDIDATES)
    columns: dict[str, list[Cell]] = Field(default_factory=dict)
    at: int | None = Field(None, ge=-MAX_NUMBER, le=MAX_NUMBER, description="time of the request, as those of events")
    user_id: Item | None = None
    popular: bool = Field(False, description="answer a history without known items with popular ones")

    @model_validator(mode="after")
    def _columns_are_of_the_events(self) -> RecommendRequest:
        for name, values in self.columns.items():
            if len(values) != len(self.history):
                raise ValueError(f"column {name!r} has {len(values)} values for {len(self.history)} events")
            if name in ("user_id", "item_id") or name.startswith("_"):
                raise ValueError(f"column {name!r} has a reserved name")
        return self


class SimilarRequest(BaseModel):
    """Items whose nearest other items are asked for."""

    model_config = ConfigDict(extra="forbid")
    items: list[Item] = Field(min_length=1, max_length=1000)
    k: int = Field(10, ge=1, le=MAX_K)

    @model_validator(mode="after")
    def _answer_is_not_too_long(self) -> SimilarRequest:
        if len(self.items) * self.k > MAX_SIMILAR:
            raise ValueError(
                f"{len(self.items)} items with k {self.k} have an answer of more than {MAX_SIMILAR}: ask in parts"
            )
        return self


@dataclass(frozen=True)
class Limits:
    """max_batch: requests answered together. wait: seconds that the first of them waits for others. max_waiting:
    requests beyond which further ones are refused. max_body: bytes of a request."""

    max_batch: int = 64
    wait: float = 0.002
    max_waiting: int = 1024
    max_body: int = 1 << 20


def answer(recommender: Recommender, requests: list[RecommendRequest]) -> list[Ranked | UserError]:
    """Ranked items of each request; UserError in the place of one that the model cannot answer."""
    answers: list[Ranked | UserError] = [[] for _ in requests]
    columns: dict[int, dict[str, pl.Series]] = {}
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, request in enumerate(requests):
        try:  # what is wrong with one request's columns is found before they share a frame with others'
            columns[number] = _event_columns(recommender.reader, request)
        except UserError as error:
            answers[number] = error
        else:
            groups.setdefault((request.exclude_seen, request.candidates is None), []).append(number)
    waiting = [*groups.values()]
    while waiting:
        numbers = waiting.pop()
        found: Sequence[Ranked | UserError]
        try:
            found = _ranked(recommender, [requests[each] for each in numbers], [columns[each] for each in numbers])
        except UserError as error:
            if len(numbers) > 1:  # one by one, so that only the request that brought it is refused
                waiting += [[number] for number in numbers]
                continue
            found = [error]
        for number, each in zip(numbers, found):
            answers[number] = each
    return answers


def _event_columns(reader: HistoryReader, request: RecommendRequest) -> dict[str, pl.Series]:
    """Columns of a request's events, or of one missing event. Times become datetimes here, since other requests' times
    may be in other units. UserError for a missing column or a value that the model cannot read."""
    missing = [name for name in reader.needed_columns if name not in request.columns]
    if missing and request.history:
        raise UserError(f"columns: the model reads {' and '.join(missing)} of each event")
    for name in reader.number_columns:
        for value in request.columns.get(name, ()):
            if value is not None and not (isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER):
                raise UserError(f"columns: {name} {value!r} is not a number that the model reads")
    times = {"timestamp", *(each["name"] for each in reader.event_columns if each["kind"] == "time")}
    columns = {}
    for name in reader.needed_columns:
        values = request.columns.get(name) or [None]
        # not strict: categories come as texts and as numbers
        column = pl.Series(name, values, pl.Float64 if name in reader.number_columns else pl.String, strict=False)
        if name in times:
            if not column.is_between(*SECONDS).all():
                column = parsed_times(column)  # which takes as long as the rest of a small answer
                if not column.dtype.is_temporal() and (column.abs() > MAX_NUMBER // 10**6).any():
                    raise UserError(f"columns: {name} holds a number that is not a time")
            if not column.dtype.is_temporal():
                column = (column * 10**6).cast(pl.Int64)
            column = column.cast(pl.Datetime("us"))
        columns[name] = column
    return columns


def _ranked(
    recommender: Recommender, requests: list[RecommendRequest], columns: list[dict[str, pl.Series]]
) -> list[Ranked]:
    """Answers to requests that agree in exclude_seen and in whether they have candidates. columns: see
    `_event_columns`."""
    users: list[int] = []
    items: list[str | None] = []
    for number, request in enumerate(requests):
        users += [number] * max(1, len(request.history))
        items += [str(item) for item in request.history] or [None]
    frame = pl.DataFrame({"user_id": users, "item_id": pl.Series(items, dtype=pl.String)})
    frame = frame.with_columns(pl.concat([each[name] for each in columns]) for name in columns[0])
    (histories,) = recommender.reader.read(frame, None, len(requests), keep_empty=True, warn=False)
    batch = histories.batch
    names = ["" if request.user_id is None else request.user_id for request in requests]
    batch["user_ids"] = torch.from_numpy(recommender.reader.internal_users(names))
    for row, request in enumerate(requests):
        if "next_timestamps" in batch and (at := seconds(request.at)) is not None:
            batch["next_timestamps"][row] = at
    allowed = None
    if requests[0].candidates is not None:
        candidates = [[str(item) for item in request.candidates or ()] for request in requests]
        allowed, _ = recommender.allowed_by_row(candidates)
    popular = torch.tensor([request.popular and recommender.counts is not None for request in requests])
    answered = popular | (batch["lengths"] > 0)
    batch["lengths"][~answered] = 1  # of padding, so that nobody looks for the most popular items
    k = max(request.k for request in requests)
    queries = recommender.queries(histories)
    scores, ids = recommender.search.best(histories, queries, k, requests[0].exclude_seen, allowed)
    found: list[Ranked] = []
    for request, row_ids, row_scores, is_answered in zip(requests, ids.tolist(), scores.tolist(), answered.tolist()):
        pairs = list(zip(row_ids, row_scores))[: request.k] if is_answered else []
        found.append([{"item_id": recommender.item_ids[i - 1].as_py(), "score": score} for i, score in pairs if i > 0])
    return found


def nearest(recommender: Recommender, request: SimilarRequest) -> dict[str, Ranked]:
    """The nearest items of each item; UserError for an unknown one."""
    found: dict[str, Ranked] = {str(item): [] for item in request.items}
    frame = recommender.similar_items(list(found), request.k)
    for item, near, score in zip(frame["item_id"], frame["similar_id"], frame["score"].tolist()):
        found[item].append({"item_id": near, "score": score})
    return found


class Batcher:
    """Collects requests for a moment and answers them in one thread. observe: told the size of every batch."""

    def __init__(self, recommender: Recommender, limits: Limits, observe: Callable[[int], None]) -> None:
        self.recommender, self.limits, self.observe = recommender, limits, observe
        self.thread = ThreadPoolExecutor(1)
        self.waiting: asyncio.Queue[tuple[RecommendRequest, asyncio.Future]] = asyncio.Queue()
        self.similar_waiting = 0

    def _check_room(self) -> None:
        if self.waiting.qsize() + self.similar_waiting >= self.limits.max_waiting:
            raise asyncio.QueueFull

    async def ask(self, request: RecommendRequest) -> Ranked:
        """UserError where the model cannot answer; `asyncio.QueueFull` where too many wait."""
        self._check_room()
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((request, future))
        return await future

    async def ask_similar(self, request: SimilarRequest) -> dict[str, Ranked]:
        """`nearest` in the thread of the answers; `asyncio.QueueFull` where too many wait."""
        self._check_room()
        self.similar_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, nearest, self.recommender, request)
        finally:
            self.similar_waiting -= 1

    async def run(self) -> None:
        """Answers until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            some = [await self.waiting.get()]
            with suppress(TimeoutError):
                async with asyncio.timeout(self.limits.wait):
                    while len(some) < self.limits.max_batch:
                        some.append(await self.waiting.get())
            self.observe(len(some))
            requests = [request for request, _ in some]
            answers: Sequence[Ranked | Exception]
            try:
                answers = await loop.run_in_executor(self.thread, answer, self.recommender, requests)
            except Exception as error:
                # A fault of the program: these requests get status 500, later ones an answer.
                logging.exception("a batch of %d requests failed", len(requests))
                answers = [error] * len(requests)
            for (_, future), found in zip(some, answers):
                if future.done():  # its client has gone
                    continue
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)


Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class BodyLimit:
    """Refuses bodies of more than ``max_body`` bytes with 413, before they are held."""

    def __init__(self, app: Callable[..., Awaitable[None]], max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages, size, more = [], 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            messages.append(message)
            if size > self.max_body:
                body = b'{"detail":"the body is longer than %d bytes"}' % self.max_body
                headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                return await send({"type": "http.response.body", "body": body})

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return await self.app(scope, replay, send)


def faults_of(error: Any) -> list[dict[str, Any]] | str:
    """What an answer tells of FastAPI's RequestValidationError: the first faults, without what was sent, which may be
    long, and hold NaN and halves of surrogate pairs, which no answer can."""
    if isinstance(error.body, bytes):  # by its header it was not to be read as JSON
        return "the header Content-Type of the request must be application/json"
    return [
        {
            "type": each["type"],
            "loc": [part[:MAX_NAME] if isinstance(part, str) else part for part in each["loc"]],
            "msg": each["msg"][:MAX_NAME],
        }
        for each in error.errors()[:MAX_FAULTS]
    ]


def make_app(recommender: Recommender, limits: Limits | None = None) -> Any:
    """The FastAPI application; its page for trying it out is at /docs. UserError where the extra ``serve`` is
    missing."""
    try:
        import fastapi
        import prometheus_client  # noqa: F401  (of the same extra)
    except ImportError as error:
        raise not_installed(error.name or "fastapi", "serve") from error
    limits = limits or Limits()
    batcher: Batcher

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        nonlocal batcher
        batcher = Batcher(recommender, limits, batches.observe)
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        batcher.thread.shutdown()

    app = fastapi.FastAPI(title="generative_recommenders", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_body=limits.max_body)

    batches = _add_metrics(app)

    async def answered(asked: Awaitable[Any]) -> Any:
        try:
            return await asked
        except UserError as error:
            raise fastapi.HTTPException(422, str(error)) from error
        except asyncio.QueueFull as error:
            raise fastapi.HTTPException(503, "too many requests wait: try again later") from error

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def refuse(request: fastapi.Request, error: Any) -> Any:
        return fastapi.Response(json.dumps({"detail": faults_of(error)}), 422, media_type="application/json")

    @app.post("/recommend", summary="The k best items after a history")
    async def recommend(request: RecommendRequest) -> dict[str, Any]:
        return {"items": await answered(batcher.ask(request))}

    @app.post("/similar", summary="The k nearest other items of items")
    async def similar(request: SimilarRequest) -> dict[str, Any]:
        return {"items": await answered(batcher.ask_similar(request))}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "items": len(recommender.item_ids),
            "columns": recommender.reader.needed_columns,
        }

    return app


def _add_metrics(app: Any) -> Any:
    """Counts and times the answers of an application, and shows them at /metrics as Prometheus reads them.

    Returns the histogram that takes the sizes of batches.
    """
    import fastapi
    import prometheus_client as prometheus

    registry = prometheus.CollectorRegistry()
    batches = prometheus.Histogram(
        "batch_size", "requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
    )
    requests = prometheus.Counter("requests", "answers by path and status", ["path", "status"], registry=registry)
    seconds = prometheus.Histogram("request_seconds", "time to answer", ["path"], registry=registry)

    @app.middleware("http")
    async def measure(request, call_next):  # type: ignore[no-untyped-def]
        start, status = time.perf_counter(), 500  # what a fault of the program is answered with, further out
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            route = request.scope.get("route")  # paths that do not exist share one name
            path = getattr(route, "path", "other")
            requests.labels(path, status).inc()
            seconds.labels(path).observe(time.perf_counter() - start)

    @app.get("/metrics")
    async def metrics() -> Any:
        return fastapi.Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return batches
