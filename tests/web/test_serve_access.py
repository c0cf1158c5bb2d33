"""Who may ask: keys on every path but /health, Host and Origin on loopback, no open server without keys."""

from pathlib import Path

import httpx
import openai
import pytest

from trinity.base.errors import UsageError
from trinity.config.serve import ServeConfig
from trinity.serve.limits import check_exposure, hashed, known_key, read_keys
from trinity.serve.server import open_socket

KEY, OTHER = "correct-horse-battery", "another-good-long-key"


def test_keys_guard_everything_but_health(serving) -> None:
    with serving(keys=(KEY, OTHER)) as running:
        root = running.url.removesuffix("/v1")
        assert httpx.get(f"{root}/health").status_code == 200
        for path in (
            "/v1/models",
            "/metrics",
            "/openapi.json",
            "/nothing",
            "/v1/chat/completions",
            "//health",
            "/health/",
        ):
            response = httpx.get(f"{root}{path}")
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xe9"):
            wrong = httpx.get(f"{root}/v1/models", headers={b"authorization": header.encode("latin-1")})
            assert wrong.status_code == 401
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong-wrong-wrong-wrong").models.list()
        for key in (KEY, OTHER):
            assert running.client(key).models.list().data
        assert httpx.get(f"{root}/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_loopback_without_keys_answers_only_this_machine(running) -> None:
    port = running.url.split(":")[2].split("/")[0]
    allowed = (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}")
    for host in allowed:
        assert httpx.get(f"{running.url}/models", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "192.168.1.5", "0.0.0.0", ""):
        assert httpx.get(f"{running.url}/models", headers={"host": host}).status_code in (400, 403), host
    for origin in ("https://evil.example", "null", f"http://localhost:{port}0"):
        assert httpx.get(f"{running.url}/models", headers={"origin": origin}).status_code == 403, origin
    same = {"origin": f"http://127.0.0.1:{port}"}
    response = httpx.get(f"{running.url}/models", headers=same)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_open_server_without_keys(host: str) -> None:
    with pytest.raises(UsageError, match="without API keys"):
        open_socket(ServeConfig(host=host, port=0), frozenset())
    check_exposure(host, frozenset({hashed(KEY)}))


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# team a\n{KEY}\n\n  {OTHER}  \n")
    keys = read_keys(file, "from-the-environment-1")
    assert all(known_key(key, keys) for key in (KEY, OTHER, "from-the-environment-1"))
    assert not known_key("", keys)
    assert not known_key("# team a", keys)
    assert KEY.encode() not in keys, "only hashes are kept"
    assert read_keys(None, None) == frozenset()
    for content, complaint in (
        ("", "no key"),
        ("# only\n", "no key"),
        ("short\n", "16"),
        ("has spaces in the key\n", "16"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=complaint):
            read_keys(file, None)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "absent", None)
