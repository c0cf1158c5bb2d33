"""Under load and at the end: places freed by clients that leave, 429 when full, time limits, metrics, orderly stops."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from trinity.base.errors import UsageError
from trinity.cli.main import main
from trinity.config.serve import ServeConfig
from trinity.engine.loaded import load
from trinity.kernels.compiled import is_loaded
from trinity.plan.inference import record_bytes
from trinity.serve.server import open_socket

# The end tokens are never drawn, so an answer goes on for as long as it is asked to.
ENDLESS = {"1": -100, "3": -100}
LONG: dict[str, Any] = {"prompt": "def wrap", "max_tokens": 90_000, "logit_bias": ENDLESS}


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that must come; far longer than it takes."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@contextmanager
def streaming(running, **more: Any) -> Iterator[Iterator[str]]:
    """An endless stream that has begun; leaving the block is the client going away."""
    body = {"model": running.name, "stream": True} | LONG | more
    with httpx.stream("POST", f"{running.url}/completions", json=body, timeout=30) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield lines


def idle(running) -> bool:
    return running.server.service.worker.counts() == (0, 0) and not running.server.service.worker.engine.busy


def test_clients_that_leave_free_their_places(serving) -> None:
    with serving(max_active=1, max_queued=1) as running:
        with streaming(running):
            assert running.server.service.worker.counts() == (1, 0)
            with pytest.raises(httpx.ReadTimeout):  # one that waits for its whole answer, then leaves the queue
                httpx.post(f"{running.url}/completions", json={"model": running.name} | LONG, timeout=0.3)
            eventually(lambda: running.server.service.worker.counts() == (1, 0))
        eventually(lambda: idle(running))
        answer = running.client().completions.create(model=running.name, prompt="a", max_tokens=2)
        assert answer.choices[0].finish_reason


def test_a_full_server_says_429_and_recovers(serving) -> None:
    with serving(max_active=1, max_queued=0) as running:
        with streaming(running):
            with pytest.raises(openai.RateLimitError) as caught:
                running.client().completions.create(model=running.name, prompt="a", max_tokens=2)
            assert caught.value.response.headers["retry-after"] == "1"
            assert httpx.get(running.url.removesuffix("/v1") + "/health").status_code == 200
        eventually(lambda: idle(running))
        assert running.client().completions.create(model=running.name, prompt="a", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="3 answers"):
            running.client().completions.create(model=running.name, prompt="a", max_tokens=2, n=3)


def test_requests_run_side_by_side_and_give_what_they_give_alone(serving, loaded) -> None:
    prompts = ["def wrap", "import re", "class Text", "return x", "# note"]
    with serving(max_active=2) as running:
        found: dict[str, str] = {}

        def ask(prompt: str) -> None:
            answer = running.client().completions.create(
                model=running.name, prompt=prompt, max_tokens=20, temperature=1, seed=9
            )
            found[prompt] = answer.choices[0].text

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == {p: loaded.generate(p, max_new_tokens=20, temperature=1, seed=9).text for p in prompts}


def test_time_limit_and_default_length(serving) -> None:
    with serving(request_seconds=0.3, max_new_tokens=5) as running:
        with pytest.raises(openai.InternalServerError, match=r"within 0\.3 seconds"):
            running.client().completions.create(model=running.name, **LONG)
        with streaming(running) as lines:
            *_, error, done = [line for line in lines if line]
        assert '"error"' in error
        assert done == "data: [DONE]"
        eventually(lambda: idle(running))
        short = running.client().completions.create(model=running.name, prompt="a", logit_bias=ENDLESS)
        assert short.usage is not None
        assert short.usage.completion_tokens == 5


def test_a_failing_engine_ends_requests_and_goes_on(serving, monkeypatch: pytest.MonkeyPatch, capfd) -> None:  # noqa: ANN001
    with serving() as running:
        engine = running.server.service.worker.engine
        step = engine.step

        def broken() -> Any:
            if engine.busy:
                raise RuntimeError("secret words")
            return step()

        monkeypatch.setattr(engine, "step", broken)
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            running.client().completions.create(model=running.name, prompt="secret words", max_tokens=2)
        monkeypatch.setattr(engine, "step", step)
        assert running.client().completions.create(model=running.name, prompt="a", max_tokens=2).choices
    assert "secret" not in "".join(capfd.readouterr())


def test_metrics_count_what_happened(serving) -> None:
    with serving() as running:
        for _ in range(2):
            running.client().completions.create(
                model=running.name, prompt=[40, 41, 42], max_tokens=4, logit_bias=ENDLESS
            )
        httpx.post(f"{running.url}/completions", json={})
        text = httpx.get(running.url.removesuffix("/v1") + "/metrics").text
    value = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    label = f'{{model_name="{running.name}"}}'
    assert value[f"trinity_prompt_tokens_total{label}"] == 6
    assert value[f"trinity_generation_tokens_total{label}"] == 8
    assert value[f"trinity_num_requests_running{label}"] == 0
    assert value[f"trinity_time_to_first_token_seconds_count{label}"] == 2
    assert value[f"trinity_e2e_request_latency_seconds_count{label}"] == 2
    assert value[f'trinity_request_success_total{{finished_reason="length",model_name="{running.name}"}}'] == 2
    assert value['http_requests_total{handler="/v1/completions",method="POST",status="200"}'] == 2
    assert value['http_requests_total{handler="/v1/completions",method="POST",status="400"}'] == 1


def test_a_taken_port_is_one_clear_line() -> None:
    with open_socket(ServeConfig(port=0), frozenset()) as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}.*--port 0"):
            open_socket(ServeConfig(port=port), frozenset())
    with pytest.raises(UsageError, match="no address"):
        open_socket(ServeConfig(host="256.0.0.1.localhost.invalid", port=0), frozenset({b"a hash"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 99999),
        ("port", -1),
        ("max_active", 0),
        ("max_queued", -1),
        ("max_new_tokens", 0),
        ("request_seconds", 0.0),
    ],
)
def test_settings_that_serve_nobody_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is {value}"):
        open_socket(ServeConfig(**{name: value}), frozenset())  # type: ignore[arg-type]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_in_order_on_a_signal(model_folder: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "trinity.cli.main", "serve", str(model_folder), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "TRINITY_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        first, holds, blank, curl = (process.stdout.readline() for _ in range(4))
        found = re.fullmatch(r"Serving little at (http://127\.0\.0\.1:\d+/v1)\n", first)
        assert found, first
        assert "of weights; keys and values in float32 for " in holds and ", 8 requests at a time" in holds
        assert (blank, curl) == ("\n", f"curl {found[1]}/chat/completions \\\n")
        body = {"model": "little", "stream": True} | LONG
        with httpx.stream("POST", f"{found[1]}/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(sent)
            *_, error, done = [line for line in lines if line]
        assert "The server was stopped" in error
        assert done == "data: [DONE]"
        complaints = process.communicate(timeout=20)[1]
        assert process.returncode == 0
        assert complaints == ""
    finally:
        process.kill()
        process.wait()


def test_a_prompt_is_read_once_under_one_key_and_again_under_another(serving) -> None:
    keys = ("a-key-of-one-tenant", "a-key-of-another-one")
    words = "the quick brown fox jumps over the lazy dog " * 8

    def cached(client: openai.OpenAI, **more: object) -> int:
        answer = client.completions.create(model="little", prompt=words, max_tokens=2, temperature=0, **more)  # type: ignore[arg-type]
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    with serving(keys=keys) as running:
        one, other = (running.client(key) for key in keys)
        first, again = cached(one), cached(one)
        assert first == 0 and again >= 64 and again % 64 == 0
        assert cached(other) == 0, "what one tenant asked is not to be timed by another"
        assert cached(one, extra_body={"cache_salt": "x"}) == 0
        shown = httpx.get(running.url.replace("/v1", "/metrics"), headers={"Authorization": f"Bearer {keys[0]}"}).text
    figures = dict(line.rsplit(" ", 1) for line in shown.splitlines() if line.startswith("trinity_prefix_cache"))
    assert figures['trinity_prefix_cache_lookups_total{model_name="little",outcome="hit"}'] == "1.0"
    assert figures['trinity_prefix_cache_lookups_total{model_name="little",outcome="unknown"}'] == "3.0"
    assert float(figures['trinity_prefix_cache_hits_total{model_name="little"}']) == again


@pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
def test_experts_on_the_disk_are_counted_and_their_loss_ends_those_who_need_them_alone(
    model_folder: Path, tmp_path: Path, serving
) -> None:
    packed = tmp_path / "packed"
    assert main(["export", str(model_folder), str(packed), "--format", "packed", "--dtype", "int4"]) == 0
    model = load(packed, expert_bytes=30_000)
    with serving(model, max_active=1) as running:
        ask = {"model": running.name, "prompt": "def wrap", "max_tokens": 5, "temperature": 0}
        whole = httpx.post(f"{running.url}/completions", json=ask, timeout=30).json()["choices"]
        counted = {name: metric(running, f"trinity_expert_cache_{name}_total") for name in EXPERT_COUNTS}
        record = record_bytes(model.config, "int4")
        assert counted["read_bytes"] == counted["misses"] * record > 0 and counted["stall_seconds"] >= 0
        assert counted["hits"] + counted["misses"] >= int((model.runner.expert_rows > 0).sum())
        file, content = packed / "packed.safetensors", (packed / "packed.safetensors").read_bytes()
        os.truncate(file, len(content) // 2)
        lost = httpx.post(f"{running.url}/completions", json=ask | {"prompt": "class Q"}, timeout=30)
        assert lost.status_code == 503 and "cannot be read" in lost.json()["error"]["message"]
        assert str(packed) not in lost.text
        file.write_bytes(content)
        again = httpx.post(f"{running.url}/completions", json=ask, timeout=30).json()["choices"]
        assert again == whole and eventually(lambda: idle(running)) is None


EXPERT_COUNTS = ("hits", "misses", "read_bytes", "stall_seconds")


def metric(running, name: str) -> float:
    lines = httpx.get(running.url.removesuffix("/v1") + "/metrics", timeout=30).text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
