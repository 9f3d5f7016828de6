"""Asks a server, `layered serve`, for its model and for pictures, over HTTP.

Pictures are asked for as a stream of events, so that who waits sees how far they are. A server that is busy says when to come
again, and is asked again then. What else goes wrong is told in one line: a `UserError` where the request or the URL is wrong, a
`StageFailed` where the server or the way there is.

Called by `sample`.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import httpx

from pipelines.errors import StageFailed, UserError
from pipelines.serving.answers import (
    UNREADABLE,
    EncodedPicture,
    EncodedPreview,
    ServedModel,
    read_error,
    read_event,
    read_models,
)
from pipelines.serving.event_stream import server_sent_events
from pipelines.session import event

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LAYERED_API_KEY"
"""Environment variable that holds the key, where a server wants one. Not an option: everybody on a machine can read those."""

CONNECT_SECONDS = 10.0
"""For finding the server."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
"""Until a busy server is asked again that does not say when to come; twice as long each time."""

LONGEST_TOLD = 400
"""Characters of a server's message that are passed on."""


class Client:
    """A server, for as long as there is something to ask of it; a context manager.

    Args:
        url: Of the server, with or without ``/v1``.
        key: Shown to the server, and to nobody else; None for a server that wants none.
        timeout_seconds: Longest silence of the server before it is given up.
        patience_seconds: Longest time, in all, that one request may be put off because the server is busy.

    Raises:
        UserError: no such URL or key can be.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        patience_seconds: float = 300.0,
    ) -> None:
        self.url = base_url(url)
        self._key, self._patience = key, patience_seconds
        if key is not None and re.fullmatch("[!-~]+", key) is None:
            # Refused here, for the error of whoever sends headers would show it.
            raise UserError(f"{KEY_VARIABLE} must be letters, digits and signs, without blanks")
        # A redirect is told, not followed: it would send the request, and perhaps the key, to somebody else.
        self._http = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            follow_redirects=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def models(self) -> list[ServedModel]:
        """What the server draws with.

        Raises:
            UserError: the server wants another key, or is no `layered serve`.
            StageFailed: it cannot be reached, or fails.
        """
        with self._answer("GET", "/v1/models") as response:
            content = response.read()
        try:
            return read_models(content)
        except UNREADABLE as error:
            raise UserError(
                f"{self.url} is no server of `layered serve`: its /v1/models holds something else"
            ) from error

    def model(self) -> ServedModel:
        """The model that draws where a request names none. Raises as `models`."""
        models = self.models()
        if not models:
            raise StageFailed(f"{self.url} has no model; try again when it does")
        return models[0]

    def draw(
        self,
        prompt: str,
        *,
        seed: int,
        num_images: int = 1,
        resolution: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        num_previews: int = 0,
        model: str | None = None,
    ) -> Iterator[EncodedPreview | EncodedPicture]:
        """Draws pictures; who stops reading gives up those that are not done.

        Args:
            prompt: What to draw; empty for anything.
            seed: Of the first picture's noise; the next has the next.
            num_images: How many, at most the model's ``max_images``.
            resolution: Pixels of a side; the highest for None.
            num_steps: The model's own for None.
            guidance: The model's own for None.
            num_previews: Of each picture.
            model: Name of the model, so that another one refuses.

        Yields:
            Previews and pictures, of all pictures asked for, as they come; each picture once.

        Raises:
            UserError: the server refuses the request, or the key.
            StageFailed: the server cannot be reached, fails, or is gone before the last picture.
        """
        fields = {
            "prompt": prompt,
            "seed": seed,
            "n": num_images,
            "size": "auto" if resolution is None else f"{resolution}x{resolution}",
            "num_steps": num_steps,
            "guidance": guidance,
            "partial_images": num_previews,
            "model": model,
            "stream": True,
        }
        content = _encoded({key: value for key, value in fields.items() if value is not None})
        missing = set(range(num_images))
        with self._answer("POST", "/v1/images/generations", content) as response:
            kind = self._plain(response.headers.get("content-type", "no type"))
            if not kind.startswith("text/event-stream"):
                raise self._odd(f"{kind}, not a stream of events")
            for name, data in server_sent_events(response.iter_bytes()):
                drawn = self._event(name, data)
                if isinstance(drawn, EncodedPicture):
                    if drawn.image_index not in missing:
                        raise self._odd(
                            f"picture {drawn.image_index} of {num_images} once too often"
                        )
                    missing.remove(drawn.image_index)
                if drawn is not None:
                    yield drawn
        if missing:
            raise StageFailed(
                f"{self.url}: the answer ended with {len(missing)} of {num_images} pictures missing; try again"
            )

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, content: bytes | None = None
    ) -> Iterator[httpx.Response]:
        """The answer to a request that was accepted; its content is still to be read."""
        url, headers = self.url + path, {"Content-Type": "application/json"} if content else {}
        waited, pause = 0.0, FIRST_PAUSE_SECONDS
        try:
            while True:
                with self._http.stream(method, url, content=content, headers=headers) as response:
                    if response.is_success:
                        yield response
                        return
                    response.read()
                if response.status_code not in (429, 503):
                    raise self._refusal(response)
                seconds = _retry_after(response) or pause
                waited, pause = waited + seconds, min(2 * pause, LONGEST_PAUSE_SECONDS)
                if waited > self._patience:
                    raise StageFailed(
                        f"{self._told(response)}; given up, for it asks for {waited:.0f} seconds of waiting "
                        f"in all, and {self._patience:.0f} are the most"
                    )
                reason = self._message(response)[1]
                event(logger, "waiting", server=self.url, seconds=seconds, reason=reason)
                time.sleep(seconds)
        except httpx.RequestError as error:
            absent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            hint = "is it running there?" if absent else "the connection was lost; try again"
            what = self._plain(error) or type(error).__name__
            raise StageFailed(f"{self.url}: {what}; {hint}") from error

    def _event(self, name: str, data: str) -> EncodedPreview | EncodedPicture | None:
        """What an event of a stream brings.

        Raises:
            UserError, StageFailed: an error.
        """
        try:
            if name != "error":
                return read_event(name, data)
            kind, param, message = read_error(data)
        except UNREADABLE as error:
            raise self._odd(f"an event {self._plain(name)!r} that cannot be read") from error
        told = f"{self.url}: {_named(self._plain(param), self._plain(message))}"
        raise UserError(told) if kind == "invalid_request_error" else StageFailed(told)

    def _odd(self, what: str) -> StageFailed:
        return StageFailed(f"{self.url} answered what no `layered serve` does: {what}")

    def _refusal(self, response: httpx.Response) -> UserError | StageFailed:
        """The error of an answer that is no success."""
        status, told = response.status_code, self._told(response)
        if response.has_redirect_location:
            where = self._plain(response.headers["location"])
            return UserError(f"{self.url} sends on to {where}; if that is right, give its URL")
        if status == 401:
            state = "is set; give another" if self._key else "is not set; give one"
            return UserError(f"{told} (the key in the environment's {KEY_VARIABLE} {state})")
        if status in (404, 405):
            return UserError(f"{told} (is that the URL of a `layered serve`?)")
        if 400 <= status < 500 and status != 408:
            return UserError(told)
        return StageFailed(told)

    def _told(self, response: httpx.Response) -> str:
        """Server, status, and what the server says about it, in one line."""
        return f"{self.url} answered {response.status_code}: {_named(*self._message(response))}"

    def _message(self, response: httpx.Response) -> tuple[str, str]:
        """Which parameter is wrong, where the server says so, and what it says."""
        try:
            _, param, message = read_error(response.content)
        except UNREADABLE:  # of a proxy, say
            param, message = "", response.reason_phrase or "no reason given"
        return self._plain(param), self._plain(message)

    def _plain(self, text: object) -> str:
        """Somebody else's text, in one line, with nothing in it that a terminal obeys, and never with the key."""
        shown = str(text).replace(self._key, KEY_VARIABLE) if self._key else str(text)
        line = " ".join(shown.split())[:LONGEST_TOLD]
        return "".join(character for character in line if character.isprintable())


def base_url(url: str) -> str:
    """A server's URL, without ``/v1`` and slashes at its end.

    Raises:
        UserError: it is not that of a server.
    """
    right = "must be a URL such as http://127.0.0.1:8000"
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UserError(f"server {right}: {error}") from error
    if parsed.userinfo:
        raise UserError(f"server {right}, without a name or password; a key is in {KEY_VARIABLE}")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UserError(f"server={url!r} {right}")
    path = parsed.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return str(parsed.copy_with(path=path)).rstrip("/")


def _encoded(fields: dict[str, object]) -> bytes:
    """A request's JSON.

    Raises:
        UserError: JSON cannot hold it: a number that is not finite, half a character.
    """
    try:
        return json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise UserError(
            f"prompt and guidance must be a text and a finite number: {error}"
        ) from error


def _named(param: str, message: str) -> str:
    """A message that names the parameter it is about."""
    return f"{param}: {message}" if param and param not in message else message


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds until the server wants to be asked again; None where it names none, or a date, as proxies may."""
    named = re.fullmatch("0*([1-9][0-9]{0,8})", response.headers.get("retry-after", ""))
    return float(named[1]) if named else None
