"""Training on a cluster that loses nodes and gets one: with as many workers as fit, and every picture once an epoch."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines import prepare
from pipelines.config import to_yaml
from tests.pipelines.conftest import SMALL_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.soak]

NUM_PICTURES = 8
"""Of the training split: two steps an epoch."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A node that was lost a moment ago may be counted still; then Ray looks again after so many seconds.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # It is noticed after three missed signs of life, one a second.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

DRIVER = """
import functools, hashlib, json, os, subprocess, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipelines import train, trainer
from pipelines.config import from_yaml

def run_worker(folder, arguments):
    def backward(self, batch):
        seen = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in batch.pictures]
        record = [time.time(), self.num_images, self.world_size, self.rank, seen]
        with open(f"{folder}/{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\\n")
        return original(self, batch)

    original = trainer.Worker._backward
    trainer.Worker._backward = backward
    return trainer.run_worker(arguments)

def lines():
    try:
        return [json.loads(line) for line in Path(config.run, "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []

def wait_for(workers, more, count=3):
    while sum(line.get("num_workers") == workers for line in lines()[more:]) < count:
        assert training.is_alive(), "it ended early"
        time.sleep(0.2)
    print("workers", workers, "after", lines()[-1]["images"], file=sys.stderr, flush=True)
    return len(lines())

def change_nodes():
    before = wait_for(2, 0, 12)  # past the first checkpoint
    cluster.remove_node(nodes[1], allow_graceful=False)
    before = wait_for(1, before)
    leaving = cluster.add_node(num_cpus=1)
    before = wait_for(2, before)
    drain = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 6"
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    subprocess.run([*command, "--node-id", leaving.node_id, *drain.split()], check=True)
    print("announced after", lines()[-1]["images"], file=sys.stderr, flush=True)
    wait_for(1, before)

config = from_yaml(open(sys.argv[1]).read())
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
os.environ["RAY_ADDRESS"] = cluster.address
train.RESIZE_SECONDS = 2.0
trainer.run_worker = functools.partial(run_worker, sys.argv[2])
ended = []

def run_train():
    ended.append(train.run(config))

training = threading.Thread(target=run_train)
training.start()
change_nodes()  # in the main thread, which alone may start nodes
training.join()
cluster.shutdown()
raise SystemExit(0 if ended else 1)
"""


def test_a_node_is_lost_and_one_comes_back(
    configure, without_ray, tmp_path, descendants, kill
) -> None:
    config = configure(
        *SMALL_MODEL,
        f"run={json.dumps(str(tmp_path / 'run'))}",
        "train.num_images=3200",
        "train.batch_size=4",
        "train.num_workers=2",
        "train.min_workers=1",
        "train.log_every_images=40",
        "train.checkpoint_every_images=400",
        "train.grid_every_images=100000",
        "train.num_validation_images=0",
        "ray.shared_paths=true",
    )
    prepare.run(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "seen").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml"), str(tmp_path / "seen")],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, told = process.communicate(timeout=240)
    finally:
        kill(*descendants(process.pid), process.pid)
    assert process.returncode == 0, told[-5000:]
    log = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    workers = [json.loads(line)["num_workers"] for line in log]
    changes = [n for k, n in enumerate(workers) if k == 0 or n != workers[k - 1]]
    assert changes == [2, 1, 2, 1]
    # The second loss was announced, and a checkpoint written at the next line of the log.
    (announced,) = re.findall(r"announced after (\d+)", told)
    assert int(re.findall(r"resumed images=(\d+)", told)[-1]) >= int(announced)
    images = [json.loads(line)["images"] for line in log]
    assert images == list(range(40, 3201, 40))
    losses = [json.loads(line)["loss/32"] for line in log]
    assert max(losses[len(losses) // 2 :]) < losses[0]
    _assert_each_picture_is_seen_once_an_epoch(tmp_path / "seen", num_images=3200)


def _assert_each_picture_is_seen_once_an_epoch(folder: Path, num_images: int) -> None:
    records = [
        json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()
    ]
    steps: dict[int, dict[tuple[int, int], list[str]]] = {}
    for _, images, size, rank, seen in sorted(records):
        # A step that was done again counts as the last number of workers did it.
        done = {who: what for who, what in steps.get(images, {}).items() if who[0] == size}
        steps[images] = done | {(size, rank): seen}
    pictures = [
        picture
        for images in sorted(steps)
        for who in sorted(steps[images])
        for picture in steps[images][who]
    ]
    assert len(pictures) == num_images
    epochs = [
        pictures[start : start + NUM_PICTURES] for start in range(0, num_images, NUM_PICTURES)
    ]
    # Two of the files look like two others, so what is compared is how often each comes.
    assert len(set(epochs[0])) == NUM_PICTURES - 2
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
