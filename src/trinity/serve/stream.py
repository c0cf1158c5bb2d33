"""From pieces to a response: server-sent events as they appear, or one JSON body at the end.

Either way a client that goes away frees its places in the engine at once.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trinity.serve.answers import Head, Shape, Usage
from trinity.serve.errors import ApiError
from trinity.serve.worker import Job, Worker

CLIENT_GONE = 499  # nobody reads it; it tells the metrics what happened


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A stream of events that cancels its job however it ends, also when it ends before its first event."""

    def __init__(self, job: Job, worker: Worker, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.job = job
        self.worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.job)


async def events(job: Job, head: Head, shape: Shape, choices_each: int, include_usage: bool) -> AsyncIterator[str]:
    """Chunks, then a usage chunk where asked for, then [DONE]. A failure is an error event before [DONE]."""
    usage, no_usage = Usage(job.requests, choices_each), {"usage": None} if include_usage else {}
    try:
        async for item in job.pieces():
            if item is None:
                yield ": still working\n\n"
                continue
            place, piece = item
            usage.add(place, piece)
            yield event(head.body([shape.choice(place, piece)], chunk=True, **no_usage))
        if include_usage:
            yield event(head.body([], chunk=True, usage=usage.body()))
    except ApiError as error:
        yield event(error.body())
    yield "data: [DONE]\n\n"


async def whole(job: Job, worker: Worker, http: HttpRequest, head: Head, shape: Shape, choices_each: int) -> Response:
    """The answer as one body. Raises ApiError; a client that left gets nothing."""
    reader = asyncio.create_task(_collect(job, head, shape, choices_each))
    leaver = asyncio.create_task(_left(http))
    try:
        await asyncio.wait((reader, leaver), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(reader.result()) if reader.done() else Response(status_code=CLIENT_GONE)
    finally:
        for task in (reader, leaver):
            task.cancel()
        worker.cancel(job)


async def _collect(job: Job, head: Head, shape: Shape, choices_each: int) -> dict[str, Any]:
    parts: list[list[dict[str, Any]]] = [[] for _ in job.requests]
    usage = Usage(job.requests, choices_each)
    async for item in job.pieces():
        if item is not None:
            place, piece = item
            usage.add(place, piece)
            parts[place].append(shape.choice(place, piece))
    choices = [shape.whole(place, part) for place, part in enumerate(parts)]
    return head.body(choices, usage=usage.body())


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
