"""Stages on a cluster that grows: Ray's own autoscaler, with a provider whose nodes are processes of this machine."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines import prepare
from pipelines.config import to_yaml
from tests.pipelines.conftest import SMALL_MODEL
from tests.pipelines.nodes import free_ports, node, shell

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

HEAD = "ray.head.default"
HEAD_ID = "f" * 51 + "00000"
"""What the provider calls the head."""

ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "RAY_NODE_TYPE_NAME": HEAD,
    "RAY_enable_autoscaler_v2": "1",
    "RAY_AUTH_MODE": "disabled",
    # Looks every second, not every five; and Ray Data asks for more every second, not every ten.
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1",
}

COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""What would be run on nodes that are machines."""

DRIVER = """
import importlib, json, os, sys, threading, time
import ray
from pipelines import session
from pipelines.config import from_yaml

stage = importlib.import_module(f"pipelines.{sys.argv[1]}")
session.set_environment()
ray.init(address=os.environ["RAY_ADDRESS"])
began = time.monotonic()
changes, done = [], threading.Event()

def watch():
    while not done.wait(0.2):
        count = sum(node["Alive"] for node in ray.nodes()) - 1
        if not changes or count != changes[-1][1]:
            changes.append((round(time.monotonic() - began, 1), count))

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
stage.run(from_yaml(open(sys.argv[2]).read()))
ended = round(time.monotonic() - began, 1)
while changes[-1][1] and time.monotonic() < began + ended + 60:
    time.sleep(0.2)
done.set()
watcher.join()
print(json.dumps({"changes": changes, "ended": ended}))
"""
"""Runs a stage; tells when it ended, and when there came to be how many nodes beside the head, until none is left."""

NUM_PICTURES = 1500
TIMEOUT = 400
"""Seconds after which a driver waits in vain: its cluster has ended."""


def launcher(address: str) -> dict[str, object]:
    """A head without a CPU of its own, and up to two nodes of one."""
    return {
        "cluster_name": "test",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 2},
        },
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{name: [] for name in COMMANDS},
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster that grows."""
    port, agent = free_ports(2)
    address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
    path = tmp_path_factory.mktemp("cluster") / "launcher.yaml"
    path.write_text(yaml.safe_dump(launcher(address)))
    arguments = [
        *("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"),
        *(f"--dashboard-agent-listen-port={agent}", f"--autoscaling-config={path}"),
    ]
    with node(arguments, shell(**ENVIRONMENT)):
        yield address


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures with a text beside each."""
    folder = tmp_path_factory.mktemp("photos")
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(coarse).resize((640, 480)).save(folder / "0.jpg")
    for number in range(NUM_PICTURES):
        with contextlib.suppress(FileExistsError):
            os.link(folder / "0.jpg", folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("a red apple")
    return folder


@pytest.fixture
def counts(cluster, tmp_path):
    """Runs a stage; returns how many nodes there were beside the head, one number after the other."""

    def run(stage, config) -> list[int]:
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, stage, str(tmp_path / "config.yaml")],
            env=shell(**ENVIRONMENT, RAY_ADDRESS=cluster),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()[-1]
        sys.stdout.write(f"{stage} {told}\n")
        return [count for _, count in json.loads(told)["changes"]]

    return run


def test_prepare_makes_nodes_come_uses_them_and_lets_them_go(configure, photos, counts, tmp_path):
    config = configure(
        f"data.train_images={photos}",
        *(f"data.{key}=null" for key in ("train_annotations", "val_annotations", "val_images")),
        "data.rows_per_file=25",
        "text.encoder=none",
        "ray.shared_paths=true",
    )
    seen = counts("prepare", config)
    # None of the work can be done on the head, so the nodes did it.
    assert (seen[0], seen[-1]) == (0, 0)
    assert 1 <= max(seen) <= 2
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["counts"]["images"] == NUM_PICTURES


def test_two_workers_of_train_get_a_node_each(configure, without_ray, counts, tmp_path):
    config = configure(
        *SMALL_MODEL,
        f"run={json.dumps(str(tmp_path / 'run'))}",
        *("train.num_images=640", "train.batch_size=4", "train.num_workers=2"),
        *("train.log_every_images=64", "train.num_validation_images=0", "train.trackers=[]"),
        "ray.shared_paths=true",
    )
    prepare.run(config)
    seen = counts("train", config)
    assert (seen[0], max(seen), seen[-1]) == (0, 2, 0)
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in log] == list(range(64, 641, 64))
    assert {json.loads(line)["num_workers"] for line in log} == {2}


def test_local_paths_on_a_cluster_that_may_grow_are_refused(configure, photos, cluster, tmp_path):
    config = configure(f"data.train_images={photos}", "data.train_annotations=null")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", "--run", str(tmp_path)],
        env=shell(**ENVIRONMENT, RAY_ADDRESS=cluster),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    assert "is a local path, and the cluster has or may get several nodes" in done.stderr
