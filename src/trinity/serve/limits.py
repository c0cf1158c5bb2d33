"""Who may ask, and how much: API keys, host and origin checks, body size. Everything but /health needs a key.

Deny by default: without keys a server may only listen on loopback, where Host and Origin are checked so that a web page
opened on the same machine cannot reach it (DNS rebinding, cross-site requests). There is no CORS.
"""

import hashlib
import hmac
import ipaddress
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trinity.base.errors import UsageError
from trinity.serve.errors import ApiError

MOST_BODY_BYTES = 16 * 2**20
SHORTEST_KEY = 16
OPEN_PATHS = ("/health",)


def read_keys(file: Path | None, from_environment: str | None) -> frozenset[bytes]:
    """Hashes of the allowed keys: one a line of `file` (blank lines and # comments aside) and TRINITY_API_KEY."""
    keys = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The key file {file} cannot be read.", "Name a text file with one key a line.") from error
        keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not keys:
            raise UsageError(f"The key file {file} holds no key.", "Write one key a line.")
    if from_environment:
        keys.append(from_environment.strip())
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii() or any(character.isspace() for character in key):
            raise UsageError(
                f"An API key is not {SHORTEST_KEY} or more ASCII characters without spaces.",
                "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    return frozenset(hashed(key) for key in keys)


def hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def known_key(key: str, keys: frozenset[bytes]) -> bool:
    """Whether a key is among the allowed, in a time that tells nothing about them."""
    given, found = hashed(key), False
    for allowed in keys:
        found |= hmac.compare_digest(given, allowed)
    return found


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, keys: frozenset[bytes]) -> None:
    """UsageError where a server without keys would listen beyond this machine."""
    if not keys and not is_loopback(host):
        raise UsageError(
            f"Listening on {host} without API keys would let anyone use the model.",
            "Give --api-key-file FILE or set TRINITY_API_KEY, or listen on 127.0.0.1.",
        )


class Gate:
    """The outermost layer of the app: every request passes here first."""

    def __init__(self, app: ASGIApp, keys: frozenset[bytes], on_response: Callable[[Scope, int], None]) -> None:
        self.app = app
        self.keys = keys
        self.on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, request_id = 500, uuid.uuid4().hex

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            scope["client_key"] = self._admit(scope["path"], headers)
            body = await read_body(receive, headers.get("content-length"))
        except ApiError as refusal:
            await refusal.response()(scope, receive, labelled)
        else:
            await self.app(scope, replayed(body, receive), labelled)
        finally:
            self.on_response(scope, status)

    def _admit(self, path: str, headers: dict[str, str]) -> str:
        """A name for whoever asks, from the key: empty without keys. ApiError for a request that may not come in."""
        if path in OPEN_PATHS:
            return ""
        if self.keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not known_key(key.strip(), self.keys):
                raise ApiError(401, "A valid API key is needed: 'Authorization: Bearer KEY'.", code="invalid_api_key")
            return hashed(key.strip()).hex()
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if not is_loopback(host):
            raise ApiError(403, "The Host header does not name this machine's loopback address.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "Requests from other web pages are not served.")
        return ""


async def read_body(receive: Receive, announced: str | None) -> bytes:
    """The whole body; ApiError 413 as soon as it is known to be too large."""
    too_large = ApiError(413, f"The body is larger than {MOST_BODY_BYTES // 2**20} MiB.")
    if announced and announced.isdigit() and int(announced) > MOST_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # the client is gone; the app will see that itself
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body that was read, then what comes after it."""
    handed_out = False

    async def again() -> Message:
        nonlocal handed_out
        if not handed_out:
            handed_out = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
