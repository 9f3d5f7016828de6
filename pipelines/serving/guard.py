"""What stands between clients and the interface: keys, limits, sizes and times of bodies, headers, and an end to every error.

Pure ASGI, so that bodies and streams pass without being gathered. A request that may not come in is answered before its body is
read. What fails inside without an answer of its own is logged under a number, and the client is told the number alone. Called by
`api`.
"""

import asyncio
import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.sections import ServeConfig
from pipelines.serving.clients import Clients, Keys, TooMany
from pipelines.serving.meters import Meters

logger = logging.getLogger(__name__)

BODY_SECONDS = 60.0
"""Within which a body must have arrived, so that who sends byte by byte holds nothing for long."""

OPEN_PREFIX = "/v1/images/files/"
"""Names of files there are secrets themselves."""

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(HTTPException):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: What is wrong, and what would be right.
        code: A word for programs.
        param: The field that is to blame.
        headers: More of the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in the form of OpenAI's API."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


class Guard:
    """Wraps an interface.

    Args:
        app: The interface.
        settings: Whose limits hold.
        keys: Who may come in, if `settings.require_key`.
        meters: Count requests.
    """

    def __init__(self, app: ASGIApp, *, settings: ServeConfig, keys: Keys, meters: Meters) -> None:
        self._app, self._settings, self._keys, self._meters = app, settings, keys, meters
        self._clients = Clients(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope)
        try:
            await self._let_in(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        except Exception:
            logger.exception("request_failed id=%s path=%s", answer.id, scope["path"])
            if answer.status:
                raise  # half an answer is out: the connection must end, or it would pass for a whole one
            message = f"something went wrong; the server's log says more under {answer.id}"
            await answer.refuse(Refused(500, message, code="internal"))
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._meters.requests.labels(route, str(answer.status or "none")).inc()

    async def _let_in(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        headers, path = Headers(scope=scope), scope["path"]
        private = path.startswith("/v1/") or path == "/metrics"
        client = self._client(scope, headers) if private else None
        generates = scope["method"] == "POST" and path.startswith("/v1/images/")
        with self._admitted(client) if client and generates else contextlib.nullcontext():
            most = self._settings.max_body_bytes
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > most:
                raise _too_large(most)
            await self._app(scope, _Body(receive, most), answer)

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Who asks.

        Raises:
            Refused: nobody who may.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is not None:
            return f"key {owner}"
        open_to_all = scope["method"] == "GET" and scope["path"].startswith(OPEN_PREFIX)
        if self._settings.require_key and not open_to_all:
            raise Refused(
                401,
                "this server wants an API key: send `Authorization: Bearer KEY`"
                if not key
                else "this API key is not known here",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return f"address {(scope.get('client') or ['unknown'])[0]}"

    @contextlib.contextmanager
    def _admitted(self, client: str) -> Iterator[None]:
        try:
            entered = self._clients.admitted(client)
            entered.__enter__()
        except TooMany as error:
            again = retry_after(error.retry_after_seconds)
            raise Refused(429, str(error), code=error.code, headers=again) from error
        try:
            yield
        finally:
            entered.__exit__(None, None, None)


class _Answer:
    """An answer on its way out, with the headers that all have."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self._send, self._scope = send, scope
        self.id = uuid.uuid4().hex
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            # Pages are asked for anew each time, by their hashes: files of two versions would not fit together.
            stored = "no-store" if self._scope["path"].startswith("/v1/") else "no-cache"
            headers.setdefault("cache-control", stored)
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answers with an error, unless an answer has begun."""
        if self.status:
            return
        body = error_body(refused.status_code, refused.detail, refused.code, refused.param)
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = dict(refused.headers or {}) | {
            "content-type": "application/json",
            "content-length": str(len(content)),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": refused.status_code, "headers": raw})
        await self({"type": "http.response.body", "body": content})


class _Body:
    """A request's body on its way in, which must not be too large or too slow."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._left, self._until = most, time.monotonic() + BODY_SECONDS
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            raise Refused(
                408, f"the body was not here within {BODY_SECONDS:.0f} seconds", code="slow_body"
            ) from error
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise _too_large(self._most)
        return message


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body must have at most {most} bytes", code="body_too_large")
