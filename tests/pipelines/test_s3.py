"""From an S3 API to an S3 API, while requests fail."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from layered_model import LayeredPipeline
from pipelines import evaluate, extractors, prepare, storage, train
from pipelines.config import UserError, load_config
from pipelines.dataset import PreparedDataset
from pipelines.loader import Share, batches
from tests.pipelines.conftest import SMALL_MODEL


@pytest.fixture
def faults(s3_server, s3_port: int) -> Iterator[Callable[[int], int]]:
    """Lets every so many requests fail; returns how many have so far."""

    def set_faults(every: int) -> int:
        address = f"http://127.0.0.1:{s3_port}/faults/{every}"
        with urllib.request.urlopen(urllib.request.Request(address, method="PUT")) as answer:
            return int(answer.read())

    yield set_faults
    set_faults(0)


@pytest.fixture
def bucket(s3_server, tmp_path) -> str:
    """A place of this test's own."""
    return f"s3://bucket/{tmp_path.name}"


def upload(folder: Path, target: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            storage.write_atomically(storage.join(target, name), path.read_bytes())


def files_of(dataset: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(dataset, name)) for name in storage.walk(dataset)}


def test_requests_that_fail_are_made_again(bucket, faults):
    content = {f"{bucket}/{k}": np.random.default_rng(k).bytes(20_000) for k in range(20)}
    before = faults(3)
    for path, part in content.items():
        storage.write_atomically(path, part)
    assert list(storage.read_each(list(content))) == list(content.values())
    for path, part in list(content.items())[:5]:
        with storage.open_input(path) as file:
            assert file.seek(10_000) == 10_000
            assert file.read() == part[10_000:]
    assert storage.walk(bucket) == sorted(str(k) for k in range(20))
    assert storage.is_directory(bucket)
    assert not storage.exists(f"{bucket}/20")
    assert faults(0) >= before + 10


def test_training_reads_the_same_batches_while_requests_fail(
    configure, without_ray, bucket, faults, tmp_path
):
    prepare.run(configure())
    upload(tmp_path / "dataset", f"{bucket}/dataset")
    share = Share(seed=0, batch_size=4, text_dropout=0.1, num_threads=2)
    taken = []
    before = faults(0)
    for path in (str(tmp_path / "dataset"), f"{bucket}/dataset"):
        with closing(batches(PreparedDataset.open(path), "train", share)) as stream:
            taken.append([next(stream) for _ in range(8)])
        faults(4)
    assert faults(0) > before
    for local, remote in zip(*taken, strict=True):
        for one, other in zip(local, remote, strict=True):
            assert torch.equal(one, other)


def test_what_one_process_writes_another_sees(bucket):
    assert storage.is_empty(bucket)
    assert storage.list_directory(bucket) == []
    code = f"from pipelines import storage; storage.write_atomically({bucket + '/a/b'!r}, b'x')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not storage.is_empty(bucket)
    assert storage.list_directory(bucket) == ["a"]


def test_a_missing_object_is_a_fault_of_its_own_and_a_refused_key_is_not(bucket):
    (missing,) = storage.read_each([f"{bucket}/none"])
    assert isinstance(missing, FileNotFoundError)
    assert missing.strerror == "No such file or directory"
    with pytest.raises(PermissionError):
        list(storage.read_each([f"{bucket}/forbidden"]))


def test_an_extractors_weights_are_read(bucket, seeded_inception) -> None:
    content, path = seeded_inception.read_bytes(), f"{bucket}/weights.pth"
    storage.write_atomically(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    options = load_config("demo").evaluate
    ours = dataclasses.replace(
        options, extractor="inception", extractor_weights=path, extractor_sha256=sha256
    )
    assert extractors.load(ours).weights_sha256 == sha256
    with pytest.raises(UserError, match=r"evaluate.extractor_weights=.*nothing.pth': "):
        extractors.load(dataclasses.replace(ours, extractor_weights=f"{bucket}/nothing.pth"))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on copying its settings
def test_a_failing_store_changes_nothing_in_the_dataset(
    coco, configure, local_ray, bucket, faults, tmp_path
):
    """Also where an earlier run was interrupted."""
    upload(coco, bucket)
    source = [
        f"data.{split}_{kind}={bucket}/{path}"
        for split in ("train", "val")
        for kind, path in (("annotations", f"captions_{split}.json"), ("images", split))
    ]
    sure = configure(*source, "text.encoder=none")
    expected = prepare.run(sure)
    target = f"{bucket}/dataset"
    before = faults(6)
    config = configure(*source, "text.encoder=none", f"dataset={target}")
    assert prepare.run(config) == expected
    whole = files_of(target)
    assert whole == files_of(sure.dataset)
    settings = json.dumps(json.loads(storage.read_bytes(f"{target}/manifest.json"))["settings"])
    for name in ("manifest.json", "train/00001.parquet"):
        storage.remove(f"{target}/{name}")
    storage.write_atomically(f"{target}/preparing.json", settings.encode())
    assert prepare.run(config) == expected
    assert faults(0) > before + 10
    assert files_of(target) == whole
    remote, local = PreparedDataset.open(target), PreparedDataset.open(sure.dataset)
    assert remote.read("train", ["image"]).equals(local.read("train", ["image"]))


@pytest.mark.ray
@pytest.mark.soak
def test_an_evaluation_is_the_same_on_a_failing_store(judged, local_ray, bucket, faults) -> None:
    options = dataclasses.replace(judged.evaluate, num_images=30)
    here = dataclasses.replace(judged, evaluate=options)
    there = dataclasses.replace(here, dataset=f"{bucket}/dataset", run=f"{bucket}/run")
    upload(Path(here.dataset), there.dataset)
    upload(Path(here.run, "model"), f"{there.run}/model")
    expected = evaluate.run(here)
    before = faults(6)
    assert evaluate.run(there) == expected
    assert faults(0) > before + 10
    for name in ("metrics.json", "grid.png", "nearest.png", "evaluation.html"):
        written = storage.read_bytes(f"{there.run}/{name}")
        assert written == Path(here.run, name).read_bytes()


@pytest.mark.ray
@pytest.mark.soak
def test_a_store_that_stops_for_a_minute_holds_training_up_and_no_more(
    configure, without_ray, local_ray, bucket, s3_server, tmp_path
):
    config = configure(
        *SMALL_MODEL,
        "train.num_images=1280",
        "train.batch_size=8",
        "train.num_workers=1",
        "train.log_every_images=160",
        "train.checkpoint_every_images=320",
        "train.validate_every_images=640",
        "train.grid_every_images=640",
    )
    prepare.run(config)
    upload(Path(config.dataset), f"{bucket}/dataset")
    here = dataclasses.replace(config, run=str(tmp_path / "run"))
    there = dataclasses.replace(config, dataset=f"{bucket}/dataset", run=f"{bucket}/run")
    train.run(here)
    stage = threading.Thread(target=train.run, args=(there,))
    stage.start()
    while not storage.exists(f"{bucket}/run/checkpoints/000000000320/about.json"):
        assert stage.is_alive()
        time.sleep(0.1)
    s3_server.send_signal(signal.SIGSTOP)
    try:
        stage.join(60)
        assert stage.is_alive()
    finally:
        s3_server.send_signal(signal.SIGCONT)
    stage.join()

    def lines(run: str) -> list[dict]:
        log = [json.loads(line) for line in storage.read_bytes(f"{run}/metrics.jsonl").splitlines()]
        return [{key: line[key] for key in ("images", "loss/32", "grad_norm")} for line in log]

    assert lines(there.run) == lines(here.run)
    model = f"{there.run}/model"
    for name in storage.walk(model):
        path = tmp_path / "copy" / name
        storage.write_atomically(str(path), storage.read_bytes(f"{model}/{name}"))
    copy, own = (
        LayeredPipeline.from_pretrained(p) for p in (tmp_path / "copy", f"{here.run}/model")
    )
    assert copy.weights_sha256 == own.weights_sha256
    assert storage.walk(f"{there.run}/tensorboard")
