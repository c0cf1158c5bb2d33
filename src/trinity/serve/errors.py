"""Refusals and failures in the OpenAI shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Collection
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from trinity.base.errors import nearest

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


HINTS = {
    "messages": " A content is a text or a list of text parts.",
    "prompt": " Give a text, token ids, or a list of either.",
}


class ApiError(Exception):
    """What a client is told; `param` names the field at fault. Carries no text of a prompt."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 429:
            headers["retry-after"] = "1"
        return JSONResponse(self.body(), self.status, headers)


def from_validation(error: RequestValidationError, known: Collection[str]) -> ApiError:
    """The first complaint of the schema, naming the field and never quoting its value. `known`: fields there are."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    field = place[0] if place else None
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not JSON. Send one JSON object.")
    if first["type"] == "extra_forbidden":
        path = ".".join(place)
        remedy = "Use 'structured_outputs'." if path.startswith("guided_") else "Leave it out."
        remedy = nearest(path, known, remedy, cutoff=0.8)
        return ApiError(400, f"This server does not support the field '{path}'. {remedy}", path, "unsupported")
    if first["type"] == "missing" and field:
        remedy = "Name one that GET /v1/models lists." if field == "model" else "Add it."
        return ApiError(400, f"The field '{'.'.join(place)}' is missing. {remedy}", ".".join(place))
    if field is None:
        return ApiError(400, "The body must be a JSON object, sent with content-type application/json.")
    return ApiError(400, f"The field '{field}' is not valid: {first['msg']}.{HINTS.get(field, '')}", field)


def from_http(error: HTTPException) -> ApiError:
    """Unknown paths and methods, which the framework itself refuses."""
    if error.status_code == 404:
        return ApiError(
            404, "There is no such path. Known: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics."
        )
    return ApiError(error.status_code, f"{error.detail}.")
