"""Serving on a real Ray Serve: replicas killed, replaced and given another model while clients wait."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from layered_model import LayeredPipeline
from pipelines.config import from_yaml, load_config, to_yaml

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # The network's own tests check its shapes; here that would make drawing three times as slow.
    pytest.mark.usefixtures("unchecked"),
]

GENERATIONS = "/v1/images/generations"
REPLICAS = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def run_directory(served, t5, tmp_path_factory) -> Path:
    """A run with the small model and its configuration, as training leaves it."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    config = load_config("demo", [f"run={json.dumps(str(folder))}", "serve.cpus_per_replica=1"])
    (folder / "model").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (folder / "model" / name).write_bytes((served / "model" / name).read_bytes())
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def pipeline(run_directory) -> LayeredPipeline:
    return LayeredPipeline.from_pretrained(run_directory / "model")


def configured(run_directory, **changes):
    config = from_yaml((run_directory / "config.yaml").read_text())
    return dataclasses.replace(config, serve=dataclasses.replace(config.serve, **changes))


@pytest.fixture(scope="module")
def url(local_ray):
    """Where Serve listens; it is started once."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def deploy(url, run_directory):
    """Deploys the run with settings changed; again for an update. What is deployed already is left alone."""
    from ray import serve

    from pipelines.serving.ingress import application

    deployed: dict[str, object] = {}

    def run(**changes):
        nonlocal deployed
        settings = {
            "min_replicas": REPLICAS,
            "max_replicas": REPLICAS,
            "max_concurrent": 1000,
            "requests_per_minute": 100_000,
            "reload_seconds": 1.0,
        } | changes
        if settings != deployed:
            application_now = application(configured(run_directory, **settings))
            serve.run(application_now, name="layered", route_prefix="/")
            deployed = settings

    yield run
    serve.delete("layered")


def order(seed, **more):
    return {"prompt": "a red apple", "seed": seed, "num_steps": 30, **more}


def picture(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def post(url, seed, **more):
    answer = httpx.post(url + GENERATIONS, json=order(seed, **more), timeout=120)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    return 200, picture(answer.json()["data"][0])


def stream(url, seed, on_event=lambda: None, **more):
    """Types of the events, and the last one's content."""
    body = order(seed, stream=True, partial_images=8, **more)
    told = []
    with httpx.stream("POST", url + GENERATIONS, json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                on_event()
    return [event["type"] for event in told], told[-1]


class Load:
    """Clients that ask again and again, until told to stop."""

    def __init__(self, url, num_clients, **more):
        self.answers, self._more = [], more
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num_clients)]

    def _ask(self, client):
        seed = client
        while not self._stop.is_set():
            self.answers.append((seed, *post(self._url, seed, **self._more)))
            seed += len(self._threads)
            time.sleep(0.1)  # leaves the cores to what is being started now and then

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
def replica_pids(descendants):
    """Finds the processes that run replicas of the model."""
    return lambda: [
        pid
        for pid, line in descendants(os.getpid()).items()
        if "ServeReplica:layered:replica" in line
    ]


def test_pictures_come_from_all_replicas_and_are_the_models(deploy, url, pipeline):
    assert httpx.get(f"{url}/v1/models").status_code == 404  # nothing is deployed
    deploy()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: post(url, seed), range(16)))
    for seed, (status, found) in enumerate(answers):
        assert status == 200, found
        expected = pipeline("a red apple", seed=seed, num_steps=30).images[32][0]
        assert np.array_equal(found, np.asarray(expected))
    types, last = stream(url, 3)
    assert types == ["image_generation.partial_image"] * 8 + ["image_generation.completed"]
    assert np.array_equal(picture(last), answers[3][1])
    metrics = httpx.get(f"{url}/metrics").text
    passes = [
        line for line in metrics.splitlines() if line.startswith("layered_pass_seconds_count")
    ]
    assert len(passes) == REPLICAS
    assert all(float(line.rsplit(" ", 1)[1]) > 30 for line in passes)
    assert httpx.post(url + GENERATIONS, json=order(0, num_steps=999)).status_code == 400
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_who_goes_frees_the_place_on_the_replica(deploy, url):
    deploy()
    for streamed in (False, True):
        body = order(1, num_steps=250, stream=streamed, partial_images=16, n=8)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + GENERATIONS, json=body, timeout=1.0).read()
    deadline = time.monotonic() + 15
    while True:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        active = [line for line in lines if line.startswith("layered_active_pictures{")]
        if all(line.endswith(" 0.0") for line in active):
            return
        assert time.monotonic() < deadline, active
        time.sleep(0.2)


async def _bad_clients(address, body, seconds):
    """Clients as the internet has them, for some seconds; returns how the slow ones were answered."""
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def send(content):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(content)
        await writer.drain()
        return reader, writer

    async def half_open():
        _, writer = await send(head.encode()[:40])
        await asyncio.sleep(seconds)
        writer.close()

    async def slow():
        reader, writer = await send(head.encode())
        for byte in body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(seconds / len(body) / 2)
        answer = await asyncio.wait_for(reader.readline(), 60)
        writer.close()
        return answer

    async def deaf():
        _, writer = await send(head.encode() + body)
        await asyncio.sleep(seconds)
        writer.close()

    async def vanishing():
        _, writer = await send(head.encode() + body)
        await asyncio.sleep(0.2)
        writer.transport.abort()

    kinds = ((half_open, 40), (deaf, 6), (vanishing, 12))
    others = [asyncio.create_task(one()) for one, count in kinds for _ in range(count)]
    answers = await asyncio.gather(*(slow() for _ in range(8)))
    await asyncio.gather(*others)
    return answers


def test_slow_deaf_and_vanishing_clients_hold_up_nobody(deploy, url):
    deploy()
    address = urllib.parse.urlsplit(url)
    body = json.dumps(order(1, num_steps=5, stream=True, partial_images=2)).encode()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        bad = _bad_clients((address.hostname, address.port), body, 8.0)
        done = pool.submit(asyncio.run, bad)
        statuses = []
        while not done.done():
            statuses.append(post(url, len(statuses), num_steps=5)[0])
        slow = done.result()
    assert len(statuses) > 3
    assert set(statuses) == {200}
    assert set(slow) == {b"HTTP/1.1 200 OK\r\n"}
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_killed_replica_loses_no_picture_that_was_accepted(
    deploy, url, pipeline, kill, replica_pids
):
    deploy()
    pids = replica_pids()
    assert len(pids) == REPLICAS
    shown = threading.Semaphore(0)
    with Load(url, 4) as load, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(stream, url, 900 + i, shown.release, num_steps=100) for i in range(8)]
        for _ in range(16):  # two previews each, or near to it
            assert shown.acquire(timeout=60)
        kill(pids[0])
        streams = [future.result(timeout=120) for future in asked]
        time.sleep(2)
    assert len(load.answers) >= 8
    assert {status for _, status, _ in load.answers} == {200}, load.answers
    for seed, _, found in load.answers[::5]:
        expected = pipeline("a red apple", seed=seed, num_steps=30).images[32][0]
        assert np.array_equal(found, np.asarray(expected))
    ends = [types[-1] for types, _ in streams]
    assert set(ends) == {"error", "image_generation.completed"}, ends
    lost = next(last for types, last in streams if types[-1] == "error")
    assert lost["error"]["code"] == "unavailable"
    deadline = time.monotonic() + 60
    while len(replica_pids()) < REPLICAS:  # another takes its place
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_another_model_is_picked_up_without_dropping_anything(deploy, url, run_directory, pipeline):
    other = pipeline.untrained(1)
    for parameter in other.network.parameters():
        parameter.data.add_(0.02)
    deploy()
    first = httpx.get(f"{url}/v1/models").json()["data"][0]["weights_sha256"]
    with Load(url, 3) as load:
        time.sleep(1)
        other.save_pretrained(run_directory / "model")
        deadline = time.monotonic() + 30
        while True:
            now = httpx.get(f"{url}/v1/models").json()["data"][0]["weights_sha256"]
            if now != first:
                break
            assert time.monotonic() < deadline
            time.sleep(0.3)
        time.sleep(2)
    pipeline.save_pretrained(run_directory / "model")
    assert {status for _, status, _ in load.answers} == {200}, load.answers
    seed, _, last = load.answers[-1]
    expected = other("a red apple", seed=seed, num_steps=30).images[32][0]
    assert np.array_equal(last, np.asarray(expected))


def test_an_update_under_load_drops_nothing(deploy, url):
    deploy()
    with Load(url, 4) as load:
        time.sleep(2)
        deploy(max_rows=4)  # other settings: every process is replaced
        time.sleep(2)
    assert len(load.answers) > 8
    assert {status for _, status, _ in load.answers} == {200}, load.answers


def test_the_command_serves_until_it_is_interrupted(run_directory):
    port = free_port()
    command = [sys.executable, "-m", "pipelines.serve", "--run", str(run_directory)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [*command, f"serve.port={port}"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # Ignored signals are inherited, and whoever runs the tests in the background ignores this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert post(f"http://127.0.0.1:{port}", 1)[0] == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped by=interruption" in errors
    assert f"at http://127.0.0.1:{port} to anybody" in errors
    assert "Traceback" not in errors
