"""Feature flags over HTTP, with changes pushed as server-sent events. Starlette, on one event loop.

uvicorn --factory examples.flags_over_sse:create_app        FLAGS_LOG names the log

GET /flags/NAME       the flag, as JSON
PUT /flags/NAME       set it; with If-Match, only at that version
GET /events           the current flags, then each change, as server-sent events
GET /healthz          ready, degraded or failed, with reasons
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import foldlog
from foldlog import Changed, Put, VersionMismatch, VersionToken, aio

PREFIX = "flags/"


class Flag(msgspec.Struct, frozen=True):
    """The value of a flag. Frozen, because all requests share the decoded values."""

    percent: int


async def get_flag(request: Request) -> Response:
    store: aio.AsyncStore = request.app.state.store
    entry = store.get(PREFIX + request.path_params["name"])
    if entry is None:
        return JSONResponse({"error": "no such flag"}, 404)
    return Response(entry.value, 200, {"ETag": f'"{int(entry.version)}"'}, "application/json")


async def put_flag(request: Request) -> Response:
    store: aio.AsyncStore = request.app.state.store
    key, raw = PREFIX + request.path_params["name"], await request.body()
    try:
        msgspec.json.decode(raw, type=Flag)
    except msgspec.ValidationError as error:
        return JSONResponse({"error": str(error)}, 422)
    expected = request.headers.get("If-Match", "").strip('"')
    try:
        if expected:
            token = VersionToken.from_u64(int(expected))
            version = await store.update(key, raw, expected=token)
        else:
            version = await store.put(key, raw)
    except VersionMismatch:
        return JSONResponse({"error": "it was changed meanwhile"}, 412)
    return Response(status_code=204, headers={"ETag": f'"{int(version)}"'})


async def events(request: Request) -> Response:
    async def stream() -> AsyncIterator[str]:
        async with request.app.state.store.watch(PREFIX) as watch:
            async for event in watch:
                yield as_sse(event)

    return StreamingResponse(stream(), media_type="text/event-stream")


def as_sse(event: foldlog.Event) -> str:
    """A watch event as a server-sent event: changes as `flag`, everything else by kind."""
    if not isinstance(event, Changed):
        return f"event: {type(event).__name__.lower()}\ndata: {{}}\n\n"
    name = event.update.key.removeprefix(PREFIX)
    value = json.loads(event.update.value) if isinstance(event.update, Put) else None
    return f"id: {event.seq}\nevent: flag\ndata: {json.dumps({'name': name, 'flag': value})}\n\n"


async def healthz(request: Request) -> Response:
    health = request.app.state.store.store.health()
    body = {"status": health.status, "reasons": health.reasons}
    return JSONResponse(body, 200 if health.is_serving else 503)


def create_app(log: str | None = None) -> Starlette:
    """The application. Its store is open while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aio.open(log or os.environ["FLAGS_LOG"]) as app.state.store:
            yield

    routes = [
        Route("/flags/{name}", get_flag),
        Route("/flags/{name}", put_flag, methods=["PUT"]),
        Route("/events", events),
        Route("/healthz", healthz),
    ]
    return Starlette(routes=routes, lifespan=lifespan)
