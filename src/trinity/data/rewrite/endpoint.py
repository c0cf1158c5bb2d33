"""An OpenAI-compatible /chat/completions endpoint as a function from messages to an answer.

Busy (429), failing (5xx), silent or garbled answers are tried again with growing pauses, or after the time the server
names in Retry-After. What no retry can heal is told apart in two ways: a request that this server will not answer is
a RequestError (the run counts it and goes on); a server that is not there or refuses us is an EndpointError (the run
stops).
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any

import httpx

from trinity.base.errors import RequestError, TrinityError, UsageError
from trinity.data.rewrite.cache import Answer, Sampling
from trinity.data.rewrite.prompts import Messages

_REFUSED = {401: "does not accept the API key", 403: "forbids access", 404: "has no such model or path"}
LONGEST_PAUSE = 60.0
LONGEST_NAMED_PAUSE = 600.0


class EndpointError(TrinityError):
    """The endpoint as a whole cannot be used: not reachable, or it refuses the key, the path or the model."""


class Endpoint:
    """Callable from many threads. The key is sent in a header and appears in no message or record, even where a server
    repeats it."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        connections: int = 8,
        timeout_seconds: float = 300.0,
        attempts: int = 6,
        first_pause: float = 0.5,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UsageError(f"'{url}' is not an address: {error}.", "Write e.g. http://127.0.0.1:8000/v1.") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UsageError(f"'{url}' is not a web address.", "Write e.g. http://127.0.0.1:8000/v1.")
        if parsed.userinfo:
            raise UsageError("The endpoint's address carries a password.", "Put the key in an environment variable.")
        self.url = str(parsed.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/chat/completions")
        self.model = model
        self.attempts_made = 0
        self._lock = Lock()
        self._key = key
        self._closed = Event()
        self._attempts, self._first_pause, self._sleep = attempts, first_pause, sleep or self._closed.wait
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
            limits=httpx.Limits(max_connections=connections),
        )

    def reach(self) -> None:
        """Raise EndpointError at once when nobody listens there; any answer at all is good enough."""
        try:
            self._client.get(f"{self.url}/models", timeout=10.0)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(str(error)) from error
        except httpx.TransportError:
            return

    def __call__(self, messages: Messages, sampling: Sampling) -> Answer:
        """One answer. Raises RequestError for this request alone, EndpointError when no request can succeed."""
        body = {"model": self.model, "messages": messages, **sampling._asdict(), "stream": False}
        problem, unreachable = "", False
        for attempt in range(self._attempts):
            pause = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, self._first_pause * 2**attempt)
            try:
                response = self._post(body)
            except httpx.TransportError as error:
                unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                unreachable = False
                if response.status_code == 200:
                    answer = _read_answer(response)
                    if isinstance(answer, Answer):
                        return answer
                    problem = answer
                else:
                    problem = self._judge(response)
                    named = _named_pause(response.headers.get("Retry-After", ""))
                    pause = pause if named is None else named
            if attempt + 1 < self._attempts:
                self._sleep(pause)
            if self._closed.is_set():
                raise RequestError(f"given up when the run ended; the last: {problem}")
        if unreachable:
            raise self._unreachable(problem)
        raise RequestError(f"no usable answer in {self._attempts} attempts; the last: {problem}")

    def _unreachable(self, problem: str) -> EndpointError:
        return EndpointError(
            f"{self.url} cannot be reached ({problem}).",
            "Start the server or correct --endpoint; answers received so far are kept.",
        )

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        with self._lock:
            self.attempts_made += 1
        return self._client.post(f"{self.url}/chat/completions", json=body)

    def _judge(self, response: httpx.Response) -> str:
        """The problem in words when another attempt may heal it; otherwise the fitting error is raised."""
        status, said = response.status_code, " ".join(response.text.split())
        said = (said.replace(self._key, "***") if self._key else said)[:200]
        if status in _REFUSED:
            raise EndpointError(
                f"{self.url} {_REFUSED[status]} (status {status}: {said}).",
                "Check --endpoint, --model and the environment variable named by --api-key-env.",
            )
        if status == 429 or status == 408 or status >= 500:
            return f"status {status}: {said}"
        raise RequestError(f"status {status}: {said}")

    def close(self) -> None:
        """Wakes threads that wait for another attempt, so that a run that ends does not linger."""
        self._closed.set()
        self._client.close()


def _read_answer(response: httpx.Response) -> Answer | str:
    """The answer, or what is wrong with it."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
        usage = body.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"not a chat completion: {' '.join(response.text.split())[:120]!r}"
    if not isinstance(text, str):
        return "a chat completion without text"
    return Answer(text, cut_off, *tokens)


def _named_pause(value: str) -> float | None:
    """Seconds that a Retry-After header asks for: a number of seconds or a date; None when it says nothing usable."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_NAMED_PAUSE) if seconds == seconds else None
