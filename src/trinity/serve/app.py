"""The routes: models, completions, chat completions, health, metrics. Prompts and answers are never logged."""

import logging
import time
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Scope

from trinity.base.errors import DataError, RequestError
from trinity.base.seeds import named_seed
from trinity.config.serve import ServeConfig
from trinity.engine.grammar import ConstraintError
from trinity.engine.loaded import LoadedModel
from trinity.engine.request import Request, SamplingParams
from trinity.serve.answers import ChatShape, CompletionShape, Head, Shape
from trinity.serve.errors import ApiError, from_http, from_validation
from trinity.serve.limits import Gate
from trinity.serve.metrics import Metrics
from trinity.serve.schema import Asked, ChatAsked, CompletionAsked
from trinity.serve.stream import EventStream, events, whole
from trinity.serve.worker import Worker

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # read from generation_config.json

log = logging.getLogger("trinity.serve")


class Service:
    """One loaded model behind its worker, and how a request becomes sequences."""

    def __init__(self, loaded: LoadedModel, config: ServeConfig) -> None:
        self.loaded = loaded
        self.config = config
        self.metrics = Metrics(loaded.name)
        self.worker = Worker(loaded.engine(config), config, self.metrics)
        self.metrics.watch(self.worker.engine)
        self.defaults = {name: value for name, value in loaded.generation.items() if name in DEFAULTS}
        self.started = int(time.time())

    def model_card(self) -> dict[str, Any]:
        context = self.loaded.config.max_position_embeddings
        return {
            "id": self.loaded.name,
            "object": "model",
            "created": self.started,
            "owned_by": "trinity",
            "max_model_len": context,
        }

    def check_name(self, name: str) -> None:
        if name != self.loaded.name:
            raise ApiError(
                404, f"There is no model '{name}' here. Known: {self.loaded.name}.", "model", "model_not_found"
            )

    def completion(self, asked: CompletionAsked, client: str) -> tuple[list[Request], Shape]:
        """The sequences of a completions request, each prompt's choices side by side, and the shape of its answer."""
        tokenizer = self.loaded.tokenizer
        top = asked.logprobs
        sampling = self._sampling(asked, asked.max_tokens, logprobs=top, prompt_logprobs=top if asked.echo else None)
        requests, texts = [], []
        for prompt in asked.prompts():
            ids = self.loaded.prompt(prompt)
            requests += self._choices(asked, ids, sampling, "prompt", client)
            texts += [prompt if isinstance(prompt, str) else tokenizer.decode(prompt)] * asked.n
        return requests, CompletionShape(requests, texts, tokenizer, asked.echo, top is not None)

    def chat(self, asked: ChatAsked, client: str) -> tuple[list[Request], Shape]:
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        sampling = self._sampling(asked, limit, logprobs=asked.top())
        try:
            ids = self.loaded.chat_prompt([message.plain() for message in asked.messages])
        except (RequestError, DataError) as error:
            raise ApiError(400, str(error), "messages") from error
        return self._choices(asked, ids, sampling, "messages", client), ChatShape(self.loaded.tokenizer, asked.logprobs)

    def _sampling(self, asked: Asked, limit: int | None, **more: Any) -> SamplingParams:
        most = self.config.max_new_tokens if limit is None else limit
        return asked.sampling(self.defaults, max_new_tokens=most, **more)

    def _choices(
        self, asked: Asked, prompt: tuple[int, ...], sampling: SamplingParams, field: str, client: str
    ) -> list[Request]:
        """The n sequences of one prompt; with a seed, each choice has its own seed derived from it.

        What was read of a prompt is shared under one key alone, so that no client can time what another has asked.
        """
        requests = []
        for choice in range(asked.n):
            own = sampling
            if choice and sampling.seed is not None:
                own = replace(sampling, seed=named_seed(sampling.seed, "choice", choice))
            salt = f"{client} {asked.cache_salt}"
            requests.append(Request(prompt=prompt, sampling=own, client=client, cache_salt=salt))
        try:
            self.worker.engine.check(requests[0])
        except ConstraintError as error:
            raise ApiError(400, str(error), field_named(error) or asked.form_field) from error
        except RequestError as error:
            too_long = len(prompt) >= self.loaded.config.max_position_embeddings
            code = "context_length_exceeded" if too_long else None
            raise ApiError(400, str(error), field_named(error) or field, code) from error
        return requests


def field_named(error: RequestError) -> str | None:
    """The field of the request that an error's sentence begins with, if it does."""
    first = error.what.partition(" ")[0]
    return first if first in Asked.model_fields else None


def build_app(service: Service, keys: frozenset[bytes]) -> ASGIApp:
    """The whole application. `service.worker` must be started before it is asked."""
    app = FastAPI(title="trinity", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_information(app, service)

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, http: HttpRequest) -> Response:
        service.check_name(asked.model)
        requests, shape = await run_in_threadpool(service.completion, asked, http.scope["client_key"])
        return await _answer(service, asked, requests, shape, Head("text_completion", service.loaded.name), http)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatAsked, http: HttpRequest) -> Response:
        service.check_name(asked.model)
        requests, shape = await run_in_threadpool(service.chat, asked, http.scope["client_key"])
        return await _answer(service, asked, requests, shape, Head("chat.completion", service.loaded.name), http)

    def answered(scope: Scope, status: int) -> None:
        handler = getattr(scope.get("route"), "path", "none")
        service.metrics.answered(handler, scope["method"], status)

    return Gate(app, keys, answered)


async def _answer(
    service: Service, asked: Asked, requests: list[Request], shape: Shape, head: Head, http: HttpRequest
) -> Response:
    job = service.worker.submit(requests)
    if asked.stream:
        return EventStream(job, service.worker, events(job, head, shape, asked.n, asked.include_usage()))
    return await whole(job, service.worker, http, head, shape, asked.n)


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        running, waiting = service.worker.counts()
        service.metrics.running.set(running)
        service.metrics.waiting.set(waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return service.model_card()


def _add_errors(app: FastAPI) -> None:
    """Every refusal and failure leaves in the OpenAI shape."""

    @app.exception_handler(ApiError)
    async def refused(_: HttpRequest, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return from_validation(error, {*CompletionAsked.model_fields, *ChatAsked.model_fields}).response()

    @app.exception_handler(RequestError)
    async def unservable(_: HttpRequest, error: RequestError) -> JSONResponse:
        return ApiError(400, str(error), field_named(error)).response()

    @app.exception_handler(DataError)
    async def unreadable(_: HttpRequest, error: DataError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def unrouted(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return from_http(error).response()

    @app.exception_handler(Exception)
    async def defect(_: HttpRequest, error: Exception) -> JSONResponse:
        log.error("a request failed with %s", type(error).__name__)  # never its message: it may quote a prompt
        return ApiError(500, "The server failed on this request.").response()
