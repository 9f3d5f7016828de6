"""A real S3 API server in a process of its own: moto's, which fails now and then if told to.

    python s3_server.py PORT [ADDRESS]

``PUT /faults/7`` lets every seventh request fail, in turn by 503 Slow Down, by 500 Internal Error, by a connection that closes
without an answer, by one that closes after the request was obeyed, and by an answer that ends in the middle; ``PUT /faults/0``
none. Both answer with the number of faults so far. Nobody may read what has ``forbidden`` in its name.
"""

import itertools
import socket
import sys
import threading
from collections.abc import Iterable, Iterator

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.wrappers import Request, Response

ERROR = "<Error><Code>{}</Code><Message>injected</Message></Error>"


class Faults:
    """Middleware that lets some requests fail."""

    def __init__(self, app) -> None:
        self.app = app
        self.every, self.num_requests, self.num_faults = 0, 0, 0
        self.kinds = itertools.cycle(["503", "500", "unheard", "unanswered", "cut"])
        self.lock = threading.Lock()

    def __call__(self, environ, start_response) -> Iterable[bytes]:
        request = Request(environ)
        if request.path.startswith("/faults/"):
            with self.lock:
                self.every = int(request.path.removeprefix("/faults/"))
                return Response(str(self.num_faults))(environ, start_response)
        if "forbidden" in request.path:
            return Response(ERROR.format("AccessDenied"), 403)(environ, start_response)
        kind = self._next()
        if kind is None:
            return self.app(environ, start_response)
        if kind in ("503", "500"):
            request.get_data()
            code = {"503": "SlowDown", "500": "InternalError"}[kind]
            return Response(ERROR.format(code), int(kind))(environ, start_response)
        connection = environ["werkzeug.socket"]
        if kind == "unheard":
            return self._close(connection)
        answer = b"".join(self.app(environ, start_response))
        return self._close(connection, answer[: len(answer) // 2] if kind == "cut" else None)

    def _next(self) -> str | None:
        with self.lock:
            self.num_requests += 1
            if not self.every or self.num_requests % self.every:
                return None
            self.num_faults += 1
            return next(self.kinds)

    @staticmethod
    def _close(connection: socket.socket, answer: bytes | None = None) -> Iterator[bytes]:
        if answer is not None:
            yield answer
        connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError


if __name__ == "__main__":
    application = Faults(DomainDispatcherApplication(create_backend_app))
    port, address, *_ = [*sys.argv[1:], "127.0.0.1"]
    run_simple(address, int(port), application, threaded=True)
