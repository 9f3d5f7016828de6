"""What trackers are told, where they fail, and that a run that goes on is the same run to them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipelines import storage, trackers
from pipelines.config import UserError
from pipelines.schema import RunDir
from pipelines.trackers import Trackers


@pytest.fixture
def layout(tmp_path) -> RunDir:
    layout = RunDir(str(tmp_path / "run"))
    storage.write_atomically(layout.config, b"train: {trackers: [tensorboard]}\n")
    return layout


def tell(names: list[str], layout: RunDir, *positions: int, start: int = 0) -> None:
    telling = Trackers(names, layout, start)
    for position in positions:
        telling.log(position, {"loss/32": 1.0 / position, "loss/32/logsnr_-5": 0.5})
        telling.show(position, "samples", Image.new("RGB", (16, 16)))
    telling.close()


def events_of(folder: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder).Reload()


def scalars(folder: str) -> list[tuple[int, float]]:
    events = events_of(folder)
    assert events.Images("samples")
    return [(event.step, event.value) for event in events.Scalars("loss/32")]


def test_tensorboard_has_the_events_of_a_run_that_went_on(layout):
    tell(["tensorboard"], layout, 10, 20, 30)
    tell(["tensorboard"], layout, 25, 30, start=20)
    found = scalars(layout.tensorboard)
    assert [step for step, _ in found] == [10, 20, 25, 30]
    assert found[1][1] == pytest.approx(0.05)


def test_what_is_added_later_is_beside_all_that_was_told(layout):
    tell(["tensorboard"], layout, 10, 20)
    values = {"evaluate/fid/512": 12.5, "evaluate/is/512": 28.0}
    trackers.add(layout, 20, values, {"evaluate/grid": Image.new("RGB", (16, 16))})
    events = events_of(layout.tensorboard)
    assert [step for step, _ in scalars(layout.tensorboard)] == [10, 20]
    for name, value in values.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(20, value)]
    assert [e.step for e in events.Images("evaluate/grid")] == [20]
    tell(["tensorboard"], layout, 30, start=20)  # training goes on
    assert "evaluate/fid/512" in events_of(layout.tensorboard).Tags()["scalars"]


@pytest.mark.parametrize("config", [None, b"seed: 1", b"train: [", b"\xff"])
def test_a_run_that_names_no_trackers_gets_a_warning(layout, config, caplog):
    storage.remove(layout.config)
    if config is not None:
        storage.write_atomically(layout.config, config)
    trackers.add(layout, 20, {"evaluate/fid/512": 12.5}, {})
    assert "config.yaml" in caplog.text
    assert not storage.exists(layout.tensorboard)


def test_tensorboard_writes_to_an_object_store(layout, tmp_path):
    remote = RunDir(f"memory://{tmp_path.name}/run")
    tell(["tensorboard"], remote, 10, 20)
    for name in storage.walk(remote.tensorboard):
        content = storage.read_bytes(storage.join(remote.tensorboard, name))
        storage.write_atomically(str(tmp_path / "copy" / name), content)
    assert [step for step, _ in scalars(str(tmp_path / "copy"))] == [10, 20]


def test_a_tracker_that_fails_is_a_warning(layout, caplog):
    Path(layout.tensorboard).write_text("in the way")
    tell(["tensorboard"], layout, 10)
    assert "tracker of=tensorboard error=" in caplog.text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("no_such_package", trackers.MLflow))
    with pytest.raises(UserError, match="needs the package no_such_package"):
        trackers.check(["tensorboard", "mlflow"])


def test_mlflow_sees_one_run(layout, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tell(["mlflow"], layout, 10, 20)
    tell(["mlflow"], layout, 30, start=20)
    storage.write_atomically(layout.config, b"train: {trackers: [mlflow]}\n")
    trackers.add(layout, 30, {"evaluate/fid/512": 12.5}, {})
    known = json.loads(storage.read_bytes(f"{layout.path}/trackers.json"))
    client = mlflow.MlflowClient()
    history = client.get_metric_history(known["mlflow"], "loss/32")
    assert {metric.step for metric in history} == {10, 20, 30}
    assert client.get_run(known["mlflow"]).info.status == "FINISHED"
    (run,) = client.search_runs(["0"])
    assert run.info.run_id == known["mlflow"]
    assert run.data.metrics["evaluate/fid/512"] == 12.5
    assert len(client.list_artifacts(known["mlflow"], "samples")) == 3


def test_weights_and_biases_sees_one_run(layout, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(["wandb"], layout, 10, 20)
    tell(["wandb"], layout, 30, start=20)
    storage.write_atomically(layout.config, b"train: {trackers: [wandb]}\n")
    trackers.add(layout, 30, {"evaluate/fid/512": 12.5}, {})
    known = json.loads(storage.read_bytes(f"{layout.path}/trackers.json"))
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{known['wandb']}/*.wandb"))
    assert len(files) == 3
