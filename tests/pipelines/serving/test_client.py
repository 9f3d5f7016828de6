"""The client with the real interface, and with servers that behave as no good one does."""

import contextlib
import io
import json
import logging
import socket
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StageFailed, UserError
from pipelines.serving import client as client_module
from pipelines.serving.answers import EncodedPicture, EncodedPreview
from pipelines.serving.client import Client, base_url

KEY = "sk-very-secret-0123456789"
STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}
FIELDS = {"image_index": 0, "seed": 7, "num_steps": 4, "resolution": 8}
DONE = {
    **FIELDS,
    "b64_json": b64encode(b"picture").decode(),
    "weights_sha256": "ab",
    "seconds": 0.5,
}
PART = {**FIELDS, "b64_json": b64encode(b"preview").decode(), "step": 2}


def told(name, fields):
    """An event of a stream."""
    return f"event: {name}\ndata: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


COMPLETED = told("image_generation.completed", DONE)


def refusal(message="no", param=None, kind="invalid_request_error"):
    """The body of a refusal."""
    error = {"message": message, "type": kind, "param": param, "code": None}
    return [json.dumps({"error": error}).encode()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, headers, chunks = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        for chunk in chunks:
            if callable(chunk):
                chunk()
            else:
                self.wfile.write(chunk)
                self.wfile.flush()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def scripted():
    """Starts servers that give these answers (status, headers, chunks of the body), one a request, and keep the requests."""
    with contextlib.ExitStack() as stack:

        def start(*answers):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _Handler))
            server.answers, server.requests = list(answers), []
            server.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that were waited, which take no time."""
    waited = []
    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    return waited


def draw(url, key=None, num_images=1, prompt="a cat", **options):
    with Client(url, key, **options) as client:
        return list(client.draw(prompt, seed=7, num_images=num_images))


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_the_model_is_told(server, small_pipeline) -> None:
    with Client(server.url) as client:
        model = client.model()
        assert client.models() == [model]
    assert model.name == "small"
    assert model.weights_sha256 == small_pipeline.weights_sha256
    assert model.resolutions == (8, 16, 32)
    assert (model.num_steps, model.guidance, model.max_tokens) == (2, 2.0, 16)
    assert (model.can_finish, model.max_images, model.max_steps) == (True, 10, 250)


@pytest.mark.parametrize("resolution", [None, 8, 16])
def test_a_picture_is_what_the_model_draws_here(server, small_pipeline, resolution) -> None:
    settings = {"num_steps": 3, "guidance": 3.0, "resolution": resolution}
    with Client(server.url) as client:
        drawn = list(client.draw("a red apple", seed=7, num_images=3, **settings))
    ours = small_pipeline(["a red apple"] * 3, seed=7, **settings).images[resolution or 32]
    assert sorted(picture.image_index for picture in drawn) == [0, 1, 2]
    for picture in drawn:
        assert (picture.seed, picture.resolution) == (7 + picture.image_index, resolution or 32)
        assert (picture.num_steps, picture.model) == (3, small_pipeline.weights_sha256)
        assert np.array_equal(pixels(picture.content), np.asarray(ours[picture.image_index]))


def test_previews_come_before_their_picture(server) -> None:
    with Client(f"{server.url}/v1") as client:
        drawn = list(client.draw("a cat", seed=1, num_images=2, num_steps=8, num_previews=3))
    for index in (0, 1):
        *previews, picture = [event for event in drawn if event.image_index == index]
        assert isinstance(picture, EncodedPicture)
        assert [(p.step, p.num_steps, p.resolution) for p in previews] == [
            (2, 8, 8),
            (4, 8, 16),
            (6, 8, 32),
        ]
        assert [pixels(p.content).shape[0] for p in previews] == [8, 16, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "answered 400: num_steps=0"),
        ({"num_steps": 251}, "answered 400: num_steps=251 must be at most 250"),
        ({"num_images": 11}, "answered 400: n=11 must be at most 10"),
        ({"resolution": 64}, "answered 400: size='64x64' must be auto or one of 8x8, 16x16, 32x32"),
        ({"prompt": "apple " * 99}, "answered 400: prompt has 100 tokens"),
        ({"seed": -1}, "answered 400: seed='?-1"),
        ({"model": "other"}, "answered 404: model='other' is not here; there is 'small'"),
    ],
)
def test_what_the_server_refuses_is_the_users_mistake(server, change, message) -> None:
    with Client(server.url) as client, pytest.raises(UserError, match=message):
        list(client.draw(**{"prompt": "a cat", "seed": 7} | change))


def test_the_largest_body_is_told(serve_app) -> None:
    with serve_app(max_body_bytes=1000) as server, pytest.raises(UserError, match="answered 413"):
        draw(server.url, prompt="a" * 2000)


def test_a_key_is_wanted_and_taken(serve_app, monkeypatch) -> None:
    monkeypatch.setenv("LAYERED_API_KEYS", f"me: {KEY}")
    with serve_app(require_key=True) as server:
        assert len(draw(server.url, KEY)) == 1
        for key, message in ((None, "is not set; give one"), ("x" * 20, "is set; give another")):
            with Client(server.url, key) as client, pytest.raises(UserError, match=message):
                client.models()


def test_who_stops_reading_gives_the_rest_up(server) -> None:
    with Client(server.url) as client:
        drawn = client.draw("a cat", seed=7, num_images=2, num_steps=100, num_previews=1)
        next(drawn)
        assert server.painter.load().active
        drawn.close()
        until = time.monotonic() + 60
        while server.painter.load().active and time.monotonic() < until:
            time.sleep(0.01)
        load = server.painter.load()
    assert (load.active, load.waiting) == (0, 0)


def test_a_full_queue_is_waited_for(serve_app, monkeypatch) -> None:
    with (
        serve_app(max_images=2, max_pictures=1, max_queued=1) as server,
        Client(server.url) as client,
    ):
        first = client.draw("a cat", seed=7, num_images=2, num_steps=100, num_previews=1)
        next(first)
        sleep, waited = time.sleep, []

        def pause(seconds):
            waited.append(seconds)
            first.close()
            sleep(0.05)

        monkeypatch.setattr(client_module.time, "sleep", pause)
        assert [picture.seed for picture in client.draw("a cat", seed=3)] == [3]
    assert waited


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        (" HTTPS://Example.org/pictures/v1// ", "https://example.org/pictures"),
        ("https://[::1]:8000/v1", "https://[::1]:8000"),
        ("https://example.org/v12", "https://example.org/v12"),
    ],
)
def test_a_url_is_taken_with_or_without_v1(given, url) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "127.0.0.1:8000",
        "ftp://example.org",
        "file:///etc/passwd",
        "http://",
        "http://example.org?x=1",
        "http://example.org/#x",
        "http://example.org:port",
        f"http://me:{KEY}@example.org",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url) -> None:
    with pytest.raises(UserError, match="must be a URL such as http://") as refused:
        base_url(url)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY} {KEY}", f"{KEY}ü", ""])
def test_a_key_that_no_header_can_hold_is_refused_unshown(key) -> None:
    with pytest.raises(UserError, match="LAYERED_API_KEY must be") as refused:
        Client("http://127.0.0.1", key)
    assert KEY not in str(refused.value)


def test_a_request_holds_the_key_and_what_is_asked_for(scripted) -> None:
    server = scripted((200, STREAM, [COMPLETED]))
    with Client(f"{server.url}/v1/", KEY) as client:
        drawn = client.draw("größer", seed=7, resolution=8, guidance=2.0, num_previews=3)
        assert [picture.content for picture in drawn] == [b"picture"]
    ((path, headers, body),) = server.requests
    assert path == "/v1/images/generations"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert json.loads(body) == {
        "prompt": "größer",
        "seed": 7,
        "n": 1,
        "size": "8x8",
        "guidance": 2.0,
        "partial_images": 3,
        "stream": True,
    }


def test_without_a_key_none_is_sent(scripted) -> None:
    server = scripted((200, STREAM, [COMPLETED]))
    draw(server.url)
    assert "Authorization" not in server.requests[0][1]


def test_a_stream_is_read_whatever_its_form(scripted) -> None:
    part = {**PART, "size": "größer \u2028 \u0085"}
    lines = json.dumps(DONE, indent=1).splitlines()
    stream = b"".join(
        [
            b"\xef\xbb\xbf: welcome\r\n\r\n",
            told("image_generation.partial_image", part),
            told("image_generation.from_the_future", {"x": 1}),
            b"event: image_generation.completed\r\n",
            *(f"data: {line}\r\n".encode() for line in lines),
            b"\r\n: bye",
        ]
    )
    server = scripted((200, STREAM, [stream[i : i + 1] for i in range(len(stream))]))
    assert draw(server.url) == [
        EncodedPreview(**FIELDS, step=2, content=b"preview"),
        EncodedPicture(**FIELDS, content=b"picture", model="ab", seconds=0.5),
    ]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, UserError, "answered 400: num_steps: 0 is too few"),
        (413, UserError, "answered 413: num_steps: 0 is too few"),
        (422, UserError, "answered 422"),
        (401, UserError, r"answered 401: .*\(the key .* LAYERED_API_KEY is not set; give one\)"),
        (404, UserError, r"answered 404: .*\(is that the URL of a `layered serve`\?\)"),
        (408, StageFailed, "answered 408"),
        (500, StageFailed, "answered 500: num_steps: 0 is too few"),
        (502, StageFailed, "answered 502"),
        (504, StageFailed, "answered 504"),
    ],
)
def test_a_refusal_is_one_line_and_tells_whose_fault_it_is(
    scripted, status, error, message
) -> None:
    server = scripted((status, {}, refusal("0 is\n too few\x1b[2J", "num_steps")))
    with pytest.raises(error, match=message) as refused:
        draw(server.url)
    assert server.url in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_parameter_is_not_named_twice(scripted) -> None:
    server = scripted((400, {}, refusal("num_steps=0 is too few", "num_steps")))
    with pytest.raises(UserError, match=r"400: num_steps=0 is too few$"):
        draw(server.url)


@pytest.mark.parametrize("body", [[], [b"<html>bad gateway</html>"], [b"[]"], [b'{"error": 1}']])
def test_a_refusal_that_is_not_the_servers_own_is_told_by_its_status(scripted, body) -> None:
    server = scripted((502, {}, body))
    with pytest.raises(StageFailed, match="answered 502: Bad Gateway"):
        draw(server.url)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_shows_the_key_does_not_show_it_to_others(
    scripted, status, caplog, pauses
) -> None:
    caplog.set_level(logging.DEBUG)
    server = scripted(
        (429, {}, refusal(f"busy, {KEY}")), (status, {}, refusal(f"wrong: {KEY}", KEY))
    )
    with pytest.raises((UserError, StageFailed), match="wrong: LAYERED_API_KEY") as refused:
        draw(server.url, KEY)
    assert KEY not in str(refused.value)
    assert "busy, LAYERED_API_KEY" in caplog.text
    assert KEY not in caplog.text


def test_a_wrong_key_is_told_from_none(scripted) -> None:
    server = scripted((401, {}, refusal()))
    with pytest.raises(UserError, match="LAYERED_API_KEY is set; give another"):
        draw(server.url, KEY)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_nobody_is_sent_on_to_another_server(scripted, status) -> None:
    other = scripted((200, STREAM, [COMPLETED]))
    server = scripted((status, {"Location": f"{other.url}/v1/images/generations"}, []))
    with pytest.raises(UserError, match=f"{server.url} sends on to {other.url}"):
        draw(server.url, KEY)
    assert other.requests == []


def test_a_busy_server_is_asked_again_when_it_says(scripted, pauses, caplog) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    server = scripted(
        (429, {"Retry-After": "7"}, refusal("the queue is full")),
        (503, {"Retry-After": "0"}, refusal("starting")),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [b"proxy"]),
        (200, STREAM, [COMPLETED]),
    )
    assert len(draw(server.url)) == 1
    assert pauses == [7, 2, 4]
    lines = [record.getMessage() for record in caplog.records if record.name != "httpx"]
    reasons = ['"the queue is full"', "starting", '"Service Unavailable"']
    assert lines == [
        f"waiting server={server.url} seconds={seconds:.0f} reason={reason}"
        for seconds, reason in zip(pauses, reasons, strict=True)
    ]
    assert len({body for _, _, body in server.requests}) == 1


def test_patience_ends(scripted, pauses) -> None:
    server = scripted(*[(429, {"Retry-After": "40"}, refusal("the queue is full"))] * 3)
    message = "answered 429: the queue is full; given up, for it asks for 120 seconds .* 100 are"
    with pytest.raises(StageFailed, match=message):
        draw(server.url, patience_seconds=100.0)
    assert pauses == [40, 40]
    assert server.answers == []


def test_pauses_grow_up_to_a_bound_where_the_server_names_none(scripted, pauses) -> None:
    server = scripted(*[(503, {}, [])] * 20)
    with pytest.raises(StageFailed, match="given up"):
        draw(server.url)
    assert pauses == [1, 2, 4, 8, 16, *[30] * 8]


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StageFailed, match=rf"{url}: .*refused; is it running there\?"):
            draw(url)


def test_a_lost_connection_is_told_after_what_had_come(scripted) -> None:
    server = scripted((200, STREAM | {"Content-Length": "99999"}, [COMPLETED, b"event: image"]))
    with Client(server.url) as client:
        drawn = client.draw("a cat", seed=7, num_images=2)
        assert next(drawn).content == b"picture"
        with pytest.raises(StageFailed, match=f"{server.url}: .*; the connection was lost"):
            next(drawn)


def test_silence_is_not_waited_for_without_end(scripted) -> None:
    over = threading.Event()
    server = scripted((200, STREAM, [b": wait\n\n", lambda: over.wait(30)]))
    with pytest.raises(StageFailed, match=f"{server.url}: .*timed out; the connection was lost"):
        draw(server.url, timeout_seconds=0.2)
    over.set()


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        ([COMPLETED], StageFailed, "ended with 1 of 2 pictures missing"),
        ([COMPLETED, COMPLETED], StageFailed, "picture 0 of 2 once too often"),
        (
            [told("image_generation.completed", DONE | {"image_index": 2})],
            StageFailed,
            "picture 2 of 2",
        ),
        ([b"event: image_generation.completed\ndata: [\n\n"], StageFailed, "cannot be read"),
        ([b"event: image_generation.completed\ndata: [1]\n\n"], StageFailed, "cannot be read"),
        ([told("image_generation.completed", PART)], StageFailed, "cannot be read"),
        (
            [told("image_generation.partial_image", PART | {"b64_json": "?"})],
            StageFailed,
            "cannot be read",
        ),
        (
            [told("image_generation.partial_image", PART | {"step": 1e999})],
            StageFailed,
            "cannot be read",
        ),
        ([told("error", {"error": "x"})], StageFailed, "'error' that cannot be read"),
        ([COMPLETED, b"event: error\ndata: ", *refusal("too late", None, "server_error"), b"\n\n"],
         StageFailed, "too late"),
        ([b"event: error\ndata: ", *refusal("too long", "prompt"), b"\n\n"],
         UserError, "prompt: too long"),
    ],
)  # fmt: skip
def test_a_stream_that_goes_wrong_is_one_line(scripted, stream, error, message) -> None:
    server = scripted((200, STREAM, stream))
    with pytest.raises(error, match=message) as failed:
        draw(server.url, num_images=2)
    assert str(failed.value).startswith(server.url)


def test_what_is_no_stream_is_told(scripted) -> None:
    server = scripted((200, {"Content-Type": "text/html"}, [b"<html>"]))
    with pytest.raises(StageFailed, match="no `layered serve` does: text/html, not a stream"):
        draw(server.url)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": [{"id": "gpt"}]}',
        b'{"data": [{"id": "demo", "weights_sha256": "", "resolutions": [], "limits": {}}]}',
    ],
)
def test_another_kind_of_server_is_told(scripted, body) -> None:
    server = scripted((200, {}, [body]))
    with Client(server.url) as client, pytest.raises(UserError, match="is no server of `layered"):
        client.models()


def test_a_server_without_a_model_is_told(scripted) -> None:
    server = scripted((200, {}, [b'{"object": "list", "data": []}']))
    with Client(server.url) as client, pytest.raises(StageFailed, match="has no model"):
        client.model()


@pytest.mark.parametrize(("prompt", "guidance"), [("half \ud83d", 2.0), ("a cat", float("nan"))])
def test_what_json_cannot_hold_is_refused(prompt, guidance) -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(UserError, match="must be a text"):
        list(client.draw(prompt, seed=7, guidance=guidance))
