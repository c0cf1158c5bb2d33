"""A real server on loopback for the web tests: a small model, a free port, always ended."""

import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from trinity.ckpt.hf import write_hf
from trinity.config.serve import ServeConfig
from trinity.engine.loaded import LoadedModel, load
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.serve.limits import hashed
from trinity.serve.server import Server, open_socket, url_of
from trinity.text.train_bpe import train_bpe


class Running:
    """A server that answers, and a client for it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
        self.name = server.service.loaded.name
        self.clients: list[openai.OpenAI] = []

    def client(self, key: str = "none") -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30))
        return self.clients[-1]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "little"
    folder.mkdir()
    write_hf(folder, build_model(replace(recipe("debug").model, max_position_embeddings=100_000), 5))
    train_bpe([inspect.getsource(textwrap)] * 2, 512).save(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> LoadedModel:
    return load(model_folder)


Serving = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serving(loaded: LoadedModel) -> Serving:
    """`with serving(max_active=1, keys=("...",)) as running:`; the fields of ServeConfig are keywords."""

    @contextmanager
    def start(model: LoadedModel = loaded, keys: tuple[str, ...] = (), **settings: object) -> Iterator[Running]:
        config = ServeConfig(port=0, **settings)  # type: ignore[arg-type]
        hashes = frozenset(map(hashed, keys))
        ready = threading.Event()
        listener = open_socket(config, hashes)
        server = Server(model, config, hashes, listener, ready.set)
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        assert ready.wait(20), "the server did not come up"
        running = Running(server, url_of(listener))
        try:
            yield running
        finally:
            for client in running.clients:  # one that is left to the collector may complain in another test
                client.close()
            server.stop()
            assert server.ended.wait(10), "the server did not end"
            thread.join(5)

    return start


@pytest.fixture(scope="module")
def running(serving: Serving) -> Iterator[Running]:
    with serving() as server:
        yield server
