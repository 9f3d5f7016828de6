"""`layered status` tells of runs and datasets in every state, without Ray."""

import datetime
import json
import os
import subprocess
import sys

import fsspec
import pytest
import torch

from pipelines import cli, prepare, status, storage
from pipelines.checkpoints import Store
from pipelines.config import load_config, to_yaml

SHA = "ab" * 32


def line(number: int) -> str:
    """Of a log with a line every 8 seconds."""
    loss = {"loss/16": 1 / number, "loss/32": 2 / number, "loss/32/logsnr_3": 9.0}
    validation = {"val/loss": 0.5, "val/loss/16": 0.25} if number % 4 == 0 else {}
    return json.dumps({"images": 640 * number, "images_per_second": 80.0, **loss, **validation})


@pytest.fixture
def folder(tmp_path):
    """A run after a quarter of its pictures."""
    made = tmp_path / "run"
    made.mkdir()
    config = load_config("demo", ["train.num_images=25600"])
    (made / "config.yaml").write_text(to_yaml(config))
    (made / "metrics.jsonl").write_text("".join(line(n) + "\n" for n in range(1, 11)))
    Store(str(made / "checkpoints")).write(5120, {"x": torch.zeros(3)})
    return made


def age(folder, seconds: float) -> None:
    """Makes all files older."""
    for path in folder.rglob("*"):
        when = path.stat().st_mtime - seconds
        os.utime(path, (when, when))


def shown(capsys, path, *arguments: str) -> str:
    assert cli.main(["status", str(path), *arguments]) == 0
    return capsys.readouterr().out


def facts(capsys, path) -> dict:
    return json.loads(shown(capsys, path, "--json"))


def test_a_run_that_goes_on(folder, capsys) -> None:
    text = shown(capsys, folder)
    for fact in (
        "running, it seems",
        "usually one every 8 s",
        "demo, 8, 16, 32 px",
        "6,400 of 25,600 (25 %)",
        "80 images a second; took 1 min 20 s, 4 min 0 s left",
        "16: 0.1  32: 0.2",
        "all: 0.5  16: 0.25  (at 5,120)",
        "at 5,120 images, under 1 s ago",
        "none yet",
    ):
        assert fact in text
    assert text.count("\n") < 24
    assert "logsnr" not in text


def test_a_run_whose_log_stands_still(folder, capsys) -> None:
    age(folder, 3600)
    assert "stopped or stalled, it seems: the last line of the log is 1 h 0 min old" in shown(
        capsys, folder
    )
    assert facts(capsys, folder)["state"] == "stopped"


def test_a_slow_run_is_given_more_time(folder, capsys) -> None:
    slow = line(1).replace('"images_per_second": 80.0', '"images_per_second": 0.64')
    (folder / "metrics.jsonl").write_text(slow + "\n")
    age(folder, 3600)
    found = facts(capsys, folder)
    assert found["usual_pause_seconds"] == pytest.approx(1000)
    assert found["state"] == "running"


def test_a_finished_run_with_scores(folder, capsys) -> None:
    (folder / "model").mkdir()
    about = {"num_images_trained": 25600, "weights_sha256": SHA}
    (folder / "model" / "config.json").write_text(json.dumps(about))
    scores = {"16": {"fd_lite0": {"value": 12.25}}}
    (folder / "metrics.json").write_text(
        json.dumps({"scores": scores, "settings": {}, "warnings": ["few"]})
    )
    text = shown(capsys, folder)
    for fact in (
        "finished",
        f"of 25,600 images, weights {SHA}",
        "fd_lite0",
        "12.2",
        "1 warnings, in",
    ):
        assert fact in text
    found = facts(capsys, folder)
    assert found["state"] == "finished"
    assert found["model"]["weights_sha256"] == SHA
    assert found["evaluation"]["scores"] == scores


def test_a_run_that_was_made_longer_is_not_finished(folder, capsys) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"num_images_trained": 3200}')
    assert facts(capsys, folder)["state"] == "running"


def test_a_run_that_has_logged_nothing(folder, capsys) -> None:
    (folder / "metrics.jsonl").unlink()
    text = shown(capsys, folder)
    assert "begun, and nothing is logged yet" in text
    assert "0 of 25,600 (0 %)" in text


def test_damage_is_named(folder, capsys) -> None:
    state = folder / "checkpoints" / "000000005120" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    (folder / "metrics.json").write_text("{")
    log = folder / "metrics.jsonl"
    log.write_text("no line\n" + log.read_text())
    text = shown(capsys, folder)
    assert "DAMAGED: not of the size that was written" in text
    assert "metrics.json cannot be read" in text
    assert "1 lines of the log cannot be read" in text
    assert facts(capsys, folder)["checkpoints"]["whole"] is False


def test_json_has_no_number_that_is_none(folder, capsys) -> None:
    (folder / "metrics.jsonl").write_text('{"images": 640, "loss/16": NaN, "loss/32": Infinity}\n')
    assert facts(capsys, folder)["losses"] == {"16": None, "32": None}
    assert "nan" in shown(capsys, folder)


def test_an_object_store_tells_the_same(folder, capsys) -> None:
    remote = "memory://status/run"
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_atomically(f"{remote}/{path.relative_to(folder)}", path.read_bytes())
    try:
        there, here = facts(capsys, remote), facts(capsys, folder)
    finally:
        fsspec.filesystem("memory").rm("/status", recursive=True)
    assert there["path"] == remote
    same = ("state", "num_images", "losses", "validation", "fraction", "preset")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert there["checkpoints"]["whole"] is True


def test_a_dataset_that_is_finished(configure, without_ray, capsys) -> None:
    config = configure()
    prepare.run(config)
    text = shown(capsys, config.dataset)
    assert "finished under 1 s ago; fingerprint" in text
    assert "64 px, text by" in text
    found = facts(capsys, config.dataset)
    assert found["splits"]["val"]["images"] == 5


def test_a_dataset_that_is_being_prepared(configure, without_ray, capsys, monkeypatch) -> None:
    config = configure()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config)
    found = facts(capsys, config.dataset)
    assert (found["state"], found["files"]) == ("begun", {"train": 4, "val": 2})
    assert (found["num_images_at_most"], found["num_images_planned"]) == (19, 19)
    text = shown(capsys, config.dataset)
    assert "not finished; the last file was written" in text
    assert "at most 19 of 19 (100 %)" in text


def test_nothing_there_is_a_mistake(tmp_path, capsys) -> None:
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "neither a run nor a dataset is there" in capsys.readouterr().err


def test_a_clock_that_is_behind_gives_no_negative_age(folder) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    found = status.tell(str(folder), past)
    assert found["seconds_since_line"] == 0
    assert found["state"] == "running"


def test_ray_is_not_loaded(folder) -> None:
    script = (
        "import sys; from pipelines import cli\n"
        f"assert cli.main(['status', {str(folder)!r}]) == 0\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
