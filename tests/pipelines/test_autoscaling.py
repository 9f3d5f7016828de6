"""`prepare` on a cluster that grows: Ray's own autoscaler, with a provider whose nodes are processes of this machine."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.config import to_yaml

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
    "RAY_USAGE_STATS_ENABLED": "0",
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
import json, os, sys, threading, time
import ray
from pipelines import prepare
from pipelines.config import from_yaml

ray.init(address=os.environ["RAY_ADDRESS"])
counts, done = [], threading.Event()

def watch():
    while not done.wait(0.2):
        counts.append(sum(node["Alive"] for node in ray.nodes()) - 1)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
prepare.run(from_yaml(open(sys.argv[1]).read()))
deadline = time.monotonic() + 60
while counts[-1] and time.monotonic() < deadline:
    time.sleep(0.2)
done.set()
watcher.join()
print(json.dumps(counts))
"""
"""Prepares, and tells how many nodes there were beside the head, five times a second, until they have gone."""

NUM_PICTURES = 1500
TIMEOUT = 240
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
def cluster(descendants, kill) -> Iterator[str]:
    """The address of a cluster that grows."""
    folder = Path(
        tempfile.mkdtemp(prefix="a-", dir="/tmp")
    )  # Ray's sockets allow a short path only
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = socket.gethostbyname(socket.gethostname())
    (folder / "launcher.yaml").write_text(yaml.safe_dump(launcher(f"{host}:{port}")))
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *(f"--port={port}", "--num-cpus=0", "--include-dashboard=false"),
        *(f"--autoscaling-config={folder / 'launcher.yaml'}", f"--temp-dir={folder / 't'}"),
        f"--object-store-memory={150 * 2**20}",
    ]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
    try:
        while "Ray runtime started" not in (folder / "log").read_text():
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"{host}:{port}"
    finally:
        kill(*descendants(head.pid), head.pid)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


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


def test_nodes_come_are_used_and_go(configure, photos, cluster, tmp_path):
    config = configure(
        f"data.train_images={photos}",
        *(f"data.{key}=null" for key in ("train_annotations", "val_annotations", "val_images")),
        "data.rows_per_file=25",
        "text.encoder=none",
        "ray.shared_paths=true",
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")],
        env=os.environ | ENVIRONMENT | {"RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    # None of the work can be done on the head, so the nodes did it.
    assert (counts[0], counts[-1]) == (0, 0)
    assert 1 <= max(counts) <= 2
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["counts"]["images"] == NUM_PICTURES


def test_local_paths_on_a_cluster_that_may_grow_are_refused(configure, photos, cluster, tmp_path):
    config = configure(f"data.train_images={photos}", "data.train_annotations=null")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", "--run", str(tmp_path)],
        env=os.environ | ENVIRONMENT | {"RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    assert "is a local path, and the cluster has or may get several nodes" in done.stderr
