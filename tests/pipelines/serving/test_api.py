"""The HTTP interface in front of a real small model: what is drawn, what is refused, who may ask."""

import base64
import contextlib
import io
import json
import logging
import random
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from pipelines.serving import guard
from pipelines.serving.engine import Load

# The network's own tests check its shapes; here that would make drawing three times as slow.
pytestmark = pytest.mark.usefixtures("unchecked")

RED = {"prompt": "a red apple", "seed": 7, "num_steps": 8, "guidance": 2.0}
KEY = "correct-horse-battery-staple"
GENERATIONS = "/v1/images/generations"


def post(server, path=GENERATIONS, key=None, **body):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(server.url + path, json=RED | body, headers=headers, timeout=60)


def post_form(server, path, image, **fields):
    data = {name: str(value) for name, value in (RED | fields).items()}
    files = {"image": ("picture.png", png(image), "image/png")}
    return httpx.post(f"{server.url}/v1/images/{path}", data=data, files=files, timeout=60)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def opened(item):
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def picture(response):
    assert response.status_code == 200, response.text
    return np.asarray(opened(response.json()["data"][0]))


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block.startswith("event: ")]
    pairs = [block.split("\n", 1) for block in blocks]
    told = [(n.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for n, d in pairs]
    assert all(name == data["type"] for name, data in told)
    return [data for _, data in told]


@pytest.fixture
def drawn(small_pipeline):
    """What the model draws without a server."""

    def draw(resolution=32, prompt="a red apple", seed=7, **options):
        options = {"num_steps": 8, "guidance": 2.0} | options
        out = small_pipeline(prompt, seed=seed, resolution=resolution, **options)
        return np.asarray(out.images[resolution][0])

    return draw


# What is drawn.


def test_a_picture_is_the_models_to_the_bit(server, drawn):
    answer = post(server)
    assert np.array_equal(picture(answer), drawn())
    body = answer.json()
    assert (body["size"], body["output_format"], body["background"]) == ("32x32", "png", "opaque")
    assert body["model"] == "small"
    assert abs(body["created"] - time.time()) < 60


def test_several_pictures_have_seeds_that_follow_each_other(server, drawn):
    data = post(server, n=3, size="16x16").json()["data"]
    assert [item["seed"] for item in data] == [7, 8, 9]
    for item in data:
        assert np.array_equal(np.asarray(opened(item)), drawn(16, seed=item["seed"]))


def test_a_png_says_all_it_takes_to_draw_it_again(server):
    options = {"negative_prompt": "two dogs", "layer_prompts": {"16": "white cat"}, "seed": 2**62}
    item = post(server, **options, guidance=[1.0, 2.0, 3.5]).json()["data"][0]
    told = opened(item).text
    again = {
        "prompt": told["prompt"],
        "negative_prompt": told["negative_prompt"],
        "layer_prompts": json.loads(told["layer_prompts"]),
        "size": told["size"],
        "seed": int(told["seed"]),
        "num_steps": int(told["num_steps"]),
        "guidance": json.loads(told["guidance"]),
    }
    assert post(server, **again).json()["data"][0] == item
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert told["model_sha256"] == model["weights_sha256"]
    assert told["sampler"] == model["sampler"] == "dpmpp_2m"


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_other_formats_hold_the_same_picture(server, drawn, name):
    for quality in (10, 95):
        expected = io.BytesIO()
        Image.fromarray(drawn()).save(expected, name, quality=quality)
        answer = post(server, output_format=name, output_compression=quality)
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == expected.getvalue()


def test_a_picture_can_be_fetched_for_a_while(serve_app, drawn):
    with serve_app(url_seconds=1.5) as server:
        body = post(server, response_format="url").json()
        url = body["data"][0]["url"]
        assert url.startswith(f"{server.url}/v1/images/files/")
        fetched = httpx.get(url)
        assert fetched.headers["content-type"] == "image/png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(fetched.content))), drawn())
        time.sleep(1.6)
        gone = httpx.get(url)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_an_edit_starts_from_the_picture_cropped_to_a_square(server, drawn):
    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    wide = np.pad(start, ((0, 0), (8, 8), (0, 0)))
    expected = drawn(image=torch.from_numpy(start)[None], strength=0.5)
    answer = post_form(server, "edits", wide, strength=0.5)
    assert np.array_equal(picture(answer), expected)
    told = opened(answer.json()["data"][0]).text
    assert told["strength"] == "0.5"
    assert len(told["image_sha256"]) == 64


def test_an_upscale_is_the_low_picture_larger(server, drawn):
    low = drawn(8)
    answer = post_form(server, "upscales", low)
    assert np.array_equal(picture(answer), drawn(finish=torch.from_numpy(low.copy())[None]))
    middle = picture(post_form(server, "upscales", low, size="16x16"))
    assert np.abs(middle.reshape(8, 2, 8, 2, 3).mean((1, 3)) - low).mean() < 25


def test_a_stream_shows_low_layers_first_and_ends_with_the_picture(server, drawn):
    *previews, last = events(post(server, stream=True, partial_images=3))
    assert [p["type"] for p in previews] == ["image_generation.partial_image"] * 3
    shown = [
        (p["partial_image_index"], p["step"], p["num_steps"], p["resolution"]) for p in previews
    ]
    assert shown == [(0, 2, 8, 8), (1, 4, 8, 16), (2, 6, 8, 32)]
    assert [opened(p).size for p in previews] == [(8, 8), (16, 16), (32, 32)]
    assert opened(previews[0]).text["preview_after_steps"] == "2"
    assert last["type"] == "image_generation.completed"
    assert np.array_equal(np.asarray(opened(last)), drawn())


def test_a_stream_begins_when_its_pictures_are_accepted(serve_app):
    with serve_app(max_pictures=1) as server:
        slow = threading.Thread(target=lambda: post(server, num_steps=100))
        slow.start()
        wait_until(lambda: server.painter.load().active)
        body = RED | {"stream": True}
        with httpx.stream("POST", server.url + GENERATIONS, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": accepted, 0 before it"
            assert server.painter.load() == Load(1, 1)
            assert any(line.startswith("event: image_generation.completed") for line in lines)
        slow.join()


def test_a_stream_of_several_pictures_says_which_is_which(server, drawn):
    told = events(post(server, stream=True, partial_images=1, n=2))
    completed = [event for event in told if event["type"].endswith("completed")]
    assert sorted((event["image_index"], event["seed"]) for event in completed) == [(0, 7), (1, 8)]
    for event in completed:
        assert np.array_equal(np.asarray(opened(event)), drawn(seed=event["seed"]))


def test_an_edit_can_be_streamed(server):
    image = np.zeros((32, 32, 3), np.uint8)
    told = events(post_form(server, "edits", image, stream="true", partial_images=1))
    assert [event["type"] for event in told] == ["image_edit.partial_image", "image_edit.completed"]


# OpenAI's own client.


def connected(server, key="nobody-asks"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server):
    with connected(server) as client:
        yield client


def test_openais_client_generates(client, drawn):
    answer = client.images.generate(
        prompt="a red apple",
        model="small",
        n=2,
        size="32x32",
        quality="auto",
        user="somebody",
        extra_body={"seed": 7, "num_steps": 8, "guidance": 2.0},
    )
    pictures = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in answer.data]
    assert np.array_equal(np.asarray(pictures[0]), drawn())
    assert np.array_equal(np.asarray(pictures[1]), drawn(seed=8))
    assert (answer.size, answer.output_format) == ("32x32", "png")


def test_openais_client_streams_partial_images(client, drawn):
    stream = client.images.generate(
        prompt="a red apple",
        stream=True,
        partial_images=2,
        extra_body={"seed": 7, "num_steps": 8, "guidance": 2.0},
    )
    *partial, last = list(stream)
    assert [(e.type, e.partial_image_index) for e in partial] == [
        ("image_generation.partial_image", 0),
        ("image_generation.partial_image", 1),
    ]
    assert last.type == "image_generation.completed"
    final = Image.open(io.BytesIO(base64.b64decode(last.b64_json)))
    assert np.array_equal(np.asarray(final), drawn())


def test_openais_client_edits_and_lists(client):
    image = png(np.zeros((40, 40, 3), np.uint8))
    answer = client.images.edit(image=("a.png", image), prompt="a cat", size="16x16")
    assert answer.data[0].b64_json
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "layered-diffusion"


def test_openais_client_raises_typed_errors(client, serve_app):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", size="1024x1024")
    assert refused.value.param == "size"
    assert "8x8, 16x16, 32x32" in refused.value.message
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(prompt="a cat", model="dall-e-3")
    assert refused.value.code == "model_not_found"
    with serve_app(requests_per_minute=1) as server, connected(server) as other:
        other.images.generate(prompt="", extra_body={"num_steps": 1})
        with pytest.raises(openai.RateLimitError) as refused:
            other.images.generate(prompt="", extra_body={"num_steps": 1})
    assert refused.value.code == "rate_limit_exceeded"
    with (
        serve_app(max_seconds=0.05) as server,
        connected(server) as other,
        pytest.raises(openai.APIError, match="deadline"),
    ):
        list(
            other.images.generate(
                prompt="a cat", stream=True, partial_images=3, extra_body={"num_steps": 200}
            )
        )


# What is refused.


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": "apple " * 99}, "prompt", "100 tokens; the model reads at most 16"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters; at most 4000"),
        ({"prompt": ["a"]}, "prompt", "valid string"),
        ({"n": 0}, "n", "n=0: "),
        ({"n": 11}, "n", "n=11 must be at most 10"),
        ({"num_steps": 251}, "num_steps", "at most 250"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"partial_images": 17}, "partial_images", "at most 16"),
        ({"guidance": [1.0]}, "guidance", "one scale for each of 3 layers"),
        ({"guidance": "much"}, "guidance", "guidance='much'"),
        ({"size": "32"}, "size", "auto or one of 8x8, 16x16, 32x32"),
        ({"layer_prompts": {"8": "a"}}, "layer_prompts", r"one of (16, 32)"),
        ({"layer_prompts": {"sixteen": "a"}}, "layer_prompts", "valid integer"),
        ({"response_format": "xml"}, "response_format", "'b64_json' or 'url'"),
        ({"steps": 5}, "steps", "steps is unknown; known are prompt, model, n,"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
    ],
)
def test_a_mistake_is_named(server, change, param, message):
    answer = post(server, **change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("edits", b"I am no picture", "not a png, jpeg or webp"),
        ("edits", png(np.zeros((9, 9, 3), np.uint8))[:60], "image"),
        ("upscales", png(np.zeros((9, 9, 3), np.uint8)), "9x9 pixels must be of a size below"),
        ("upscales", png(np.zeros((32, 32, 3), np.uint8)), "8x8, 16x16"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(server, path, content, message):
    answer = httpx.post(
        f"{server.url}/v1/images/{path}", data={"prompt": ""}, files={"image": content}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "image"
    assert message in answer.json()["error"]["message"]
    assert "0x" not in answer.json()["error"]["message"]


def test_a_picture_of_too_many_pixels_is_refused(server):
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "png")
    answer = httpx.post(
        f"{server.url}/v1/images/edits", data={"prompt": ""}, files={"image": bomb.getvalue()}
    )
    assert "9000 x 9000 pixels are more than" in answer.json()["error"]["message"]


def test_null_is_absence(server):
    assert post(server, n=None, size=None, seed=None, negative_prompt=None).status_code == 200


@pytest.mark.parametrize(
    ("headers", "content", "message"),
    [
        ({"content-type": "text/plain"}, b"{}", "content-type: application/json"),
        ({"content-type": "application/json"}, b"{", "not JSON"),
        ({"content-type": "application/json"}, b"[1]", "must be a JSON object"),
        ({"content-type": "application/json"}, b"\xff\xfe", "not JSON"),
        ({"content-type": "application/json"}, b"[" * 100_000, "not JSON"),
        ({"content-type": "application/json"}, b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
        ({"content-type": "application/json"}, b'{"prompt": "\\ud800"}', "surrogate"),
        ({"content-type": "application/json"}, b'{"prompt": "", "guidance": NaN}', "finite"),
    ],
)
def test_a_body_that_is_none_is_refused(server, headers, content, message):
    answer = httpx.post(server.url + GENERATIONS, headers=headers, content=content)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_form_that_is_none_is_refused(server):
    url = f"{server.url}/v1/images/edits"
    assert "form" in httpx.post(url, json={}).json()["error"]["message"]
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, headers=broken, content=b"--x\r\nno").status_code == 400
    twice = [("image", b"a"), ("image", b"b")]
    assert httpx.post(url, data={"prompt": ""}, files=twice).status_code == 400


def test_what_is_not_here_is_told_in_the_same_form(server):
    assert httpx.get(f"{server.url}/v2").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert httpx.get(server.url + GENERATIONS).status_code == 405


def test_a_large_body_is_refused_with_and_without_its_length(serve_app):
    with serve_app(max_body_bytes=1000) as server:
        assert post(server, prompt="x" * 2000).json()["error"]["code"] == "body_too_large"
        chunks = (b" " * 100 for _ in range(50))
        answer = httpx.post(
            server.url + GENERATIONS, content=chunks, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413


def test_a_slow_body_is_given_up(server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with socket.create_connection(httpx.URL(server.url).netloc.decode().split(":")) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 50\r\n\r\n{")
        connection.settimeout(10)
        assert b" 408 " in connection.recv(1000)


def test_what_fails_inside_is_told_by_a_number_alone(server, monkeypatch, caplog):
    async def broken():
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.painter, "facts", broken)
    answer = post(server)
    monkeypatch.undo()
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "secret detail" in caplog.text
    assert post(server).status_code == 200


# How much.


def test_a_full_queue_answers_429_and_serves_the_rest(serve_app):
    answers = []
    with serve_app(max_images=2, max_pictures=1, max_queued=1, max_concurrent=100) as server:
        threads = [
            threading.Thread(target=lambda: answers.append(post(server, num_steps=60)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.json()["error"]["code"] == "queue_full"
    assert int(full.headers["retry-after"]) >= 1


def test_all_pictures_of_a_request_are_accepted_or_none(serve_app):
    with serve_app(max_images=2, max_pictures=1, max_queued=1) as server:
        slow = threading.Thread(target=lambda: post(server, num_steps=100))
        slow.start()
        wait_until(lambda: server.painter.load().active)
        assert post(server, n=2).status_code == 429
        wait_until(lambda: not server.painter.load().waiting)
        slow.join()
        assert post(server, n=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_frees_the_place(serve_app, stream):
    body = RED | {"num_steps": 250, "stream": stream, "partial_images": 16}
    with serve_app(max_pictures=1) as server:
        for _ in range(2):
            if (
                stream
            ):  # after the first preview: on a quick machine the next one comes before any timeout
                with httpx.stream(
                    "POST", server.url + GENERATIONS, json=body, timeout=30
                ) as answer:
                    next(line for line in answer.iter_lines() if "partial_image" in line)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(server.url + GENERATIONS, json=body, timeout=0.4).read()
        wait_until(lambda: server.painter.load() == Load(0, 0))


def test_a_request_may_have_a_deadline_of_its_own(server):
    answer = post(server, num_steps=250, deadline_seconds=0.05)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    told = events(post(server, num_steps=250, deadline_seconds=0.3, stream=True, partial_images=9))
    assert told[-1]["type"] == "error"
    assert told[-1]["error"]["code"] == "deadline"
    assert post(server, deadline_seconds=0).json()["error"]["param"] == "deadline_seconds"


def test_requests_of_one_client_at_once_are_limited(serve_app):
    with serve_app(max_concurrent=1) as server:
        slow = threading.Thread(target=lambda: post(server, num_steps=100))
        slow.start()
        wait_until(lambda: server.painter.load().active)
        answer = post(server)
        slow.join()
        assert answer.json()["error"]["code"] == "too_many_concurrent"
        assert post(server).status_code == 200


# Who.


@pytest.fixture(scope="module")
def locked(serve_app, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text(f"# who: key\nsomebody: {KEY}\nother: {KEY}-2\n")
    with serve_app(require_key=True, keys_file=str(path), requests_per_minute=5) as server:
        yield server


@pytest.mark.parametrize("path", ["generations", "edits", "upscales"])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"]
)
def test_without_the_right_key_nothing_is_drawn(locked, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    answer = httpx.post(f"{locked.url}/v1/images/{path}", json=RED, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.painter.load().active == 0


def test_models_and_metrics_want_the_key_and_health_does_not(locked):
    statuses = {
        path: httpx.get(locked.url + path).status_code
        for path in ("/v1/models", "/v1/models/small", "/metrics", "/healthz", "/readyz", "/v1/x")
    }
    assert statuses == {
        "/v1/models": 401,
        "/v1/models/small": 401,
        "/metrics": 401,
        "/healthz": 200,
        "/readyz": 200,
        "/v1/x": 401,
    }


def test_openais_client_is_told_of_a_wrong_key(locked):
    with connected(locked, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.images.generate(prompt="a cat")


def test_each_key_has_limits_of_its_own_and_is_in_no_log(locked, caplog):
    caplog.set_level(logging.DEBUG)
    answers = [post(locked, key=KEY, num_steps=1) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    other = post(locked, key=f"{KEY}-2", response_format="url")
    assert other.status_code == 200
    assert httpx.get(other.json()["data"][0]["url"]).status_code == 200  # needs no key
    metrics = httpx.get(f"{locked.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert KEY not in caplog.text
    assert KEY not in metrics + other.text


def test_other_sites_may_not_call_unless_named(server, serve_app):
    asks = {
        "origin": "https://example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    closed = httpx.options(server.url + GENERATIONS, headers=asks)
    assert "access-control-allow-origin" not in closed.headers
    with serve_app(cors_origins=("https://example.org",)) as other:
        allowed = httpx.options(other.url + GENERATIONS, headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        refused = httpx.options(other.url + GENERATIONS, headers=asks | {"origin": "https://x.y"})
        assert "access-control-allow-origin" not in refused.headers


# What operators see.


def test_metrics_count_requests_pictures_and_passes(serve_app):
    with serve_app() as server:
        post(server, stream=True, partial_images=1)
        post(server, size="8x8")
        post(server, n=0)
        text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['layered_requests_total{route="/v1/images/generations",status="200"}'] == "2.0"
    assert lines['layered_requests_total{route="/v1/images/generations",status="400"}'] == "1.0"
    assert lines['layered_picture_seconds_count{size="32x32"}'] == "1.0"
    assert lines['layered_first_preview_seconds_count{size="32x32"}'] == "1.0"
    assert lines['layered_active_pictures{replica="0"}'] == "0.0"
    assert lines['layered_waiting_pictures{replica="0"}'] == "0.0"
    assert lines['layered_pass_seconds_count{replica="0"}'] == "16.0"
    assert lines['layered_pass_rows_sum{replica="0"}'] == "32.0"


def test_every_answer_has_a_number_and_careful_headers(server):
    for answer in (httpx.get(f"{server.url}/healthz"), post(server, n=0)):
        assert len(answer.headers["x-request-id"]) == 32
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]


# Strangers.


def test_malformed_bodies_leave_the_server_standing(server):
    random_source = random.Random(0)
    whole = json.dumps(RED | {"layer_prompts": {"16": "x"}}).encode()
    words = [b'"', b"{", b"}", b"null", b"1e999", b"\x00", b"\xff", b"-1", b"[]", "\u202e".encode()]
    statuses = set()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(1000):
            body = bytearray(whole)
            for _ in range(random_source.randint(1, 4)):
                place = random_source.randrange(len(body))
                body[place : place + random_source.randint(0, 5)] = random_source.choice(words)
            kind = random_source.choice(["application/json"] * 9 + ["multipart/form-data"])
            path = random_source.choice(["generations"] * 3 + ["edits", "upscales"])
            answer = client.post(
                f"/v1/images/{path}", content=bytes(body), headers={"content-type": kind}
            )
            statuses.add(answer.status_code)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
    assert statuses <= {200, 400, 429}
    assert 400 in statuses


@pytest.mark.parametrize(
    "prompt",
    ["\u0000", "\u202egnirts", "👩‍👩‍👧‍👦", "\ufdfd" * 3, "ﷺ a", "a\u0301" * 5, "​", "\r\n\t"],
)
def test_any_text_is_a_prompt(server, prompt):
    answer = post(server, prompt=prompt, num_steps=1)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["data"][0]).text["prompt"] == prompt


def test_half_open_connections_do_no_harm(server):
    netloc = httpx.URL(server.url).netloc.decode().split(":")
    with contextlib.ExitStack() as stack:
        for i in range(100):
            connection = stack.enter_context(socket.create_connection(netloc))
            half = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            connection.sendall(half.encode() + (b"\r\n{" if i % 2 else b""))
        assert post(server).status_code == 200
    assert post(server).status_code == 200


def test_the_description_names_every_route(server):
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/images/upscales",
        "/v1/images/files/{name}",
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    body = document["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]
    assert {"prompt", "seed", "num_steps", "guidance"} <= set(body["schema"]["properties"])
