"""What the server refuses, and how: one OpenAI-shaped error that names the field, never the text of a prompt."""

import json
from typing import Any

import httpx
import openai
import pytest

GOOD = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def post(running, body: Any, path: str = "/chat/completions", **more: Any) -> httpx.Response:
    if isinstance(body, dict):
        body = {"model": running.name} | body
    return httpx.post(f"{running.url}{path}", json=body, timeout=20, **more)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?"))
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "json_object": True}),
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"backend": "x", "regex": "a"}),
        ("guided_json", {}),
        ("after_think", True),
        ("functions", []),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
        ("frobnicate", 1),
        ("n", 17),
        ("n", 0),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 0),
        ("max_tokens", "10"),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("logit_bias", {"first": 1}),
        ("logit_bias", {"99999": 1}),
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("seed", 2**80),
        ("stream", "yes"),
        ("stream_options", {"include_everything": True}),
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user", "content": ""}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [1]}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", "secret text"),
    ],
)
def test_a_bad_field_is_named(running, field: str, value: Any) -> None:
    response = post(running, GOOD | {field: value})
    error = error_of(response, 400)
    assert field in (error["param"] or error["message"])
    assert error["type"] == "invalid_request_error"
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_token": 3}, "Did you mean 'max_tokens'?"),
        ({"guided_json": {}}, "Use 'structured_outputs'."),
        ({"tools": [{}]}, "Leave it out."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is a text or a list of text parts."),
    ],
)
def test_a_refusal_says_what_to_send(running, wrong: dict[str, Any], told: str) -> None:
    assert error_of(post(running, GOOD | wrong), 400)["message"].endswith(told)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", None), ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("seed", None)],
)
def test_fields_that_ask_for_nothing_are_accepted(running, field: str, value: Any) -> None:
    assert post(running, GOOD | {field: value}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", []), ("prompt", [99999]), ("prompt", [[]]), ("prompt", ["a", 1]), ("suffix", "x"), ("best_of", 2)],
)
def test_bad_completion_fields(running, field: str, value: Any) -> None:
    error = error_of(post(running, {"prompt": "a", "max_tokens": 1} | {field: value}, "/completions"), 400)
    assert field in (error["param"] or error["message"])


def test_bodies_that_are_no_request(running) -> None:
    url = f"{running.url}/chat/completions"
    as_json = {"content-type": "application/json"}
    for content in (b"{", b"[]", b"3", b"", b"\xff\xfe", b"[" * 100_000):
        error_of(httpx.post(url, content=content, headers=as_json, timeout=20), 400)
    error_of(httpx.post(url, content=json.dumps(GOOD).encode(), headers={"content-type": "text/plain"}), 400)
    lone = b'{"model": "%s", "messages": [{"role": "user", "content": "\\ud800"}]}' % running.name.encode()
    assert "surrogate" in error_of(httpx.post(url, content=lone, headers=as_json), 400)["message"]
    missing = error_of(httpx.post(url, json={"messages": GOOD["messages"]}), 400)
    assert missing["param"] == "model"
    assert missing["message"] == "The field 'model' is missing. Name one that GET /v1/models lists."


def test_paths_methods_and_models(running) -> None:
    error_of(httpx.get(f"{running.url}/nothing"), 404)
    error_of(httpx.get(f"{running.url}/chat/completions"), 405)
    error = error_of(httpx.post(f"{running.url}/chat/completions", json=GOOD | {"model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert running.name in error["message"]


def test_errors_map_to_the_clients_classes(running) -> None:
    client = running.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=running.name, prompt=[40] * 100_000)
    assert caught.value.code == "context_length_exceeded"
    assert "100000 tokens" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model=running.name,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )


def test_a_body_too_large_is_refused_unread(running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.serve.limits.MOST_BODY_BYTES", 4096)
    large = {"messages": [{"role": "user", "content": "x" * 5000}]}
    error_of(post(running, large), 413)

    def in_parts():  # noqa: ANN202
        for _ in range(5):
            yield b"x" * 1024

    error_of(httpx.post(f"{running.url}/completions", content=in_parts(), timeout=20), 413)
