"""Listening, running and stopping: a socket bound before the model is loaded, and an end within two seconds."""

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from trinity.base.errors import UsageError
from trinity.config.serve import ServeConfig
from trinity.engine.loaded import LoadedModel
from trinity.serve.app import Service, build_app
from trinity.serve.limits import check_exposure

STOP_SECONDS = 1


def open_socket(config: ServeConfig, keys: frozenset[bytes]) -> socket.socket:
    """A listening socket, or a UsageError: senseless settings, an address taken, unknown, or open to others."""
    check_exposure(config.host, keys)
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise UsageError(f"There is no address '{config.host}:{config.port}'.", "Try --host 127.0.0.1.") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}.",
            "Choose another --port, or --port 0 for a free one.",
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Server(uvicorn.Server):
    """One model on one socket. `run()` blocks until SIGTERM, SIGINT or `stop()`; running answers end with an error."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: ServeConfig,
        keys: frozenset[bytes],
        listener: socket.socket,
        on_ready: Callable[[], None],
    ) -> None:
        self.service = Service(loaded, config)
        self.listener = listener
        self.on_ready = on_ready
        self.ended = threading.Event()
        super().__init__(
            uvicorn.Config(
                build_app(self.service, keys),
                lifespan="off",
                access_log=False,
                log_level="error",
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    def serve_until_stopped(self) -> None:
        self.service.worker.start()
        try:
            self.run(sockets=[self.listener])
        finally:
            self.service.worker.stop()
            self.service.worker.join(STOP_SECONDS / 2)
            self.listener.close()
            self.ended.set()

    def stop(self) -> None:
        """End the server from any thread: open answers first, so that their connections can close."""
        self.service.worker.stop()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal is an orderly end, not raised again afterwards; a second one does not wait."""
        self.force_exit = self.should_exit
        self.stop()
