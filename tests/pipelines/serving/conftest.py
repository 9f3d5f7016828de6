"""The interface on a real port, with a real small model behind it, in this process."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import uvicorn
from starlette.types import ASGIApp

from layered_model import LayeredPipeline
from pipelines.config import load_config
from pipelines.serving.api import create_app
from pipelines.serving.clients import load_keys
from pipelines.serving.painter import EnginePainter


@pytest.fixture(scope="session")
def small_pipeline(served) -> LayeredPipeline:
    """A small model of 8, 16 and 32 pixels that follows the prompt."""
    return LayeredPipeline.from_pretrained(served / "model")


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    url: str
    painter: EnginePainter


@pytest.fixture(scope="session")
def listening() -> Callable[[ASGIApp], AbstractContextManager[str]]:
    """Has an app listen, in a thread: ``with listening(app) as url``."""

    @contextlib.contextmanager
    def run(app: ASGIApp) -> Iterator[str]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)  # who comes before the server is up waits
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()

    return run


@pytest.fixture(scope="session")
def serve_app(small_pipeline, listening) -> Callable[..., AbstractContextManager[Server]]:
    """Serves in a thread: ``with serve_app(max_queued=2) as server``, with settings changed."""

    @contextlib.contextmanager
    def run(**changes: object) -> Iterator[Server]:
        settings = dataclasses.replace(load_config("demo").serve, **changes)
        painter = EnginePainter(small_pipeline, settings, "small")
        app = create_app(painter, settings, load_keys(settings))
        try:
            with listening(app) as url:
                yield Server(url, painter)
        finally:
            asyncio.run(painter.close())

    return run


@pytest.fixture(scope="module")
def server(serve_app) -> Iterator[Server]:
    """A server that lets one address do as much as it likes."""
    with serve_app(requests_per_minute=1_000_000, max_concurrent=1000) as running:
        yield running
