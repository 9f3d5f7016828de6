"""A cluster of several hosts that share no directory, one of which is cut off at a time. Nothing is lost, and work goes on."""

import contextlib
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
import yaml

from tests.pipelines.hosts import Host, Hosts, why_not
from tests.pipelines.nodes import ROOT, ask, descendants, kill, node, shell

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

TIMEOUT = 600
CPUS = 2
"""Of a worker's host, which has room for one worker of train."""

SETTINGS = dict(
    re.findall(r"(RAY_grpc_client_keepalive_\w+)=(\d+)", (ROOT / "cluster/Dockerfile").read_text())
)
"""Of the image: after which silence a host is given up."""

EMOJI = "package:pipelines/emoji"
NUM_PICTURES = {"train": 1200, "val": 300}
NUM_IMAGES, CHECKPOINT_IMAGES, LOG_IMAGES = 1280, 320, 64

ARGUMENTS = (
    *("--preset", "demo", "--dataset", "s3://bucket/data", "--run", "s3://bucket/run"),
    f"data.train_annotations={EMOJI}/annotations/captions_train.json",
    f"data.val_annotations={EMOJI}/annotations/captions_val.json",
    *("data.rows_per_file=16", "sample.num_steps=2"),
    *(f"train.num_images={NUM_IMAGES}", "train.num_workers=2", "train.min_workers=1"),
    f"train.cpus_per_worker={CPUS}",
    f"train.checkpoint_every_images={CHECKPOINT_IMAGES}",
    f"train.log_every_images={LOG_IMAGES}",
    *("train.warmup_images=320", "train.cooldown_images=0"),
    *("train.num_validation_images=0", "train.grid_every_images=1000000"),
)


@dataclass
class Cluster:
    """A head without CPUs, workers, and a store, each on a host of its own."""

    hosts: Hosts
    stack: contextlib.ExitStack
    user: dict[str, str]
    "Environment of its user, on this machine."
    head: Host
    workers: list[Host] = field(default_factory=list)

    def start_head(self) -> None:
        at = ("--dashboard-host", self.head.address, "--node-ip-address", self.head.address)
        arguments = ["--head", "--port=6379", "--num-cpus=0", *at]
        self.stack.enter_context(node(arguments, self.user, inside=self.head.inside))

    def add_worker(self) -> None:
        host = self.hosts.add()
        at = ("--address", f"{self.head.address}:6379", "--node-ip-address", host.address)
        arguments = [*at, f"--num-cpus={CPUS}"]
        self.stack.enter_context(node(arguments, self.user, inside=host.inside))
        self.workers.append(host)

    def lose_worker(self, host: Host) -> None:
        host.cut_off()
        self.workers.remove(host)

    def ask(self, *command: str) -> str:
        code, out, err = ask(command, self.user, TIMEOUT)
        assert code == 0, out + err
        return out

    def layered(self, *arguments: str) -> str:
        code = "import sys; from pipelines.cli import main; sys.exit(main())"
        return self.ask(sys.executable, "-c", code, *arguments)

    def read(self, path: str) -> str:
        code = (
            f"from pipelines import storage; print(storage.read_bytes({path!r}).decode(), end='')"
        )
        return self.ask(sys.executable, "-c", code)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Hosts() as hosts, contextlib.ExitStack() as stack:
        store, head = hosts.add(), hosts.add()
        user = shell(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_API_SERVER_ADDRESS=f"http://{head.address}:8265",
            AWS_ENDPOINT_URL=f"http://{store.address}:9000",
            AWS_ACCESS_KEY_ID="anybody",
            AWS_SECRET_ACCESS_KEY="anything",
            AWS_DEFAULT_REGION="us-east-1",
            **SETTINGS,
        )
        server = [sys.executable, str(ROOT / "tests/pipelines/s3_server.py"), "9000", store.address]
        process = subprocess.Popen([*store.inside, *server], stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(lambda: kill(*descendants(process.pid), process.pid))
        made = Cluster(hosts=hosts, stack=stack, user=user, head=head)
        code = "from pipelines import storage; fs, name = storage._remote('s3://bucket'); fs.mkdir(name)"
        made.ask(sys.executable, "-c", code)
        made.start_head()
        for _ in range(2):
            made.add_worker()
        yield made


class Job:
    """A job, and its log as it comes."""

    def __init__(self, cluster: Cluster, stage: str) -> None:
        command = [sys.executable, "-m", "pipelines.submit", stage, *ARGUMENTS, "--wait"]
        self._process = subprocess.Popen(
            command,
            env=cluster.user,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        self._guard = threading.Timer(TIMEOUT, self._process.kill)
        self._guard.daemon = True
        self._guard.start()

    def wait_for(self, pattern: str) -> None:
        for line in self._process.stdout:
            self.log.append(line)
            sys.stdout.write(f"{time.strftime('%X')} {line}")
            if re.search(pattern, line):
                return
        raise AssertionError("".join(self.log))

    def succeeds(self) -> str:
        self.wait_for("status=SUCCEEDED exit_code=0")
        self._guard.cancel()
        self._process.communicate()
        assert self._process.returncode == 0
        return "".join(self.log)


def test_a_host_is_lost_while_pictures_are_prepared(cluster) -> None:
    job = Job(cluster, "prepare")
    job.wait_for(r"progress stage=prepare done=[1-9]\d\d")
    cluster.lose_worker(cluster.workers[0])
    job.succeeds()  # on one host, whose CPUs its encoders could take all
    cluster.add_worker()
    cluster.layered("inspect", "s3://bucket/data", "--check", "--no-sheet")
    manifest = json.loads(cluster.read("s3://bucket/data/manifest.json"))
    for name, split in manifest["splits"].items():
        assert split["counts"]["images"] + split["counts"]["rejects"] == NUM_PICTURES[name]
    assert manifest["splits"]["train"]["counts"]["rejects"] == 0


def test_a_host_is_lost_while_training(cluster) -> None:
    job = Job(cluster, "train")
    job.wait_for(r"progress stage=train done=([4-9]\d\d|\d{4})")  # past a checkpoint
    cluster.lose_worker(cluster.workers[0])
    told = job.succeeds()
    lines = [
        json.loads(line) for line in cluster.read("s3://bucket/run/metrics.jsonl").splitlines()
    ]
    assert [line["images"] for line in lines] == list(range(LOG_IMAGES, NUM_IMAGES + 1, LOG_IMAGES))
    workers = [line["num_workers"] for line in lines]
    assert (workers[0], workers[-1]) == (2, 1)
    # Done again is what came after the newest checkpoint, no more.
    resumed = int(re.findall(r"resumed images=(\d+)", told)[-1])
    assert resumed % CHECKPOINT_IMAGES == 0
    assert workers.index(1) * LOG_IMAGES == resumed
    cluster.layered("status", "s3://bucket/run")
    cluster.add_worker()


RUN = """
import sys
from pathlib import Path
from pipelines import served, storage

folder = Path(sys.argv[1])
served.write_run(served.configuration(1, (), str(folder)))
for path in folder.rglob("*.*"):
    storage.write_atomically(f"{sys.argv[2]}/{path.relative_to(folder)}", path.read_bytes())
"""
"""Puts a run with random weights into the store."""


def test_a_host_is_lost_while_serving(cluster, tmp_path) -> None:
    cluster.ask(sys.executable, "-c", RUN, str(tmp_path / "run"), "s3://bucket/served")
    content = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    content["http_options"]["host"] = "0.0.0.0"
    (application,) = content["applications"]
    application["args"] = {
        "run": "s3://bucket/served",
        # Two replicas hold all CPUs of the host that is left.
        "overrides": ["serve.min_replicas=2", "serve.max_replicas=2"],
    }
    # As if this source were installed on the nodes, and no other.
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(content))
    at = ("--address", cluster.user["RAY_API_SERVER_ADDRESS"])
    cluster.ask("serve", "deploy", str(tmp_path / "serve.yaml"), *at)
    before = _answer(cluster)
    # The interface may run on any node, as Ray likes: where it can be lost, it is.
    address = _ingress_address(cluster)
    lost_with_it = [worker for worker in cluster.workers if worker.address == address]
    host = (lost_with_it or cluster.workers)[0]
    cluster.lose_worker(host)
    lost = time.monotonic()
    assert _answer(cluster) == before
    seconds = time.monotonic() - lost
    sys.stdout.write(
        f"answered after {seconds:.0f} s, {'with' if lost_with_it else 'without'} the interface lost\n"
    )
    assert _ingress_address(cluster) != host.address
    cluster.ask("serve", "shutdown", "-y", *at)


def _answer(cluster) -> str:
    """A picture, as soon as there is one."""
    url = f"http://{cluster.head.address}:8000/v1/images/generations"
    order = {"prompt": "a rocket", "seed": 7, "num_steps": 2}
    deadline = time.monotonic() + TIMEOUT
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(url, json=order, timeout=10)
            if answer.status_code == 200:
                return answer.json()["data"][0]["b64_json"]
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _ingress_address(cluster) -> str:
    """Of the host that the interface runs on."""
    answer = httpx.get(
        f"http://{cluster.head.address}:8265/api/serve/applications/",
        headers={"Authorization": f"Bearer {cluster.user['RAY_AUTH_TOKEN']}"},
    )
    deployments = answer.raise_for_status().json()["applications"]["layered"]["deployments"]
    (replica,) = (one for one in deployments["ingress"]["replicas"] if one["state"] == "RUNNING")
    return replica["node_ip"]
