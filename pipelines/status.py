"""``layered status``: how far a run is, or a dataset, by what stands in its directory, local or ``s3://``; starts no Ray.

Whether a run goes on cannot be seen from its directory. It is guessed: the log gets a line every so many pictures, and a last
line that is much older than the usual pause means that nobody trains. Run by `cli`.
"""

import datetime
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pipelines import schema, score_report, storage
from pipelines.checkpoints import STATE_FILE, Store
from pipelines.errors import UserError
from pipelines.run_state import CONFIG_OF_MODEL, Run, Times, duration, find, times, tree_of
from pipelines.schema import Manifest, RunDir
from pipelines.score_tables import warnings_of

PATIENCE = 5
"""Usual pauses between two lines of the log, after which a run counts as stopped: validation and grids come in between."""
LEAST_PATIENCE = 120.0
"""The same in seconds: a start, or a checkpoint, takes a while in a quick run too."""

Facts = dict[str, Any]


def run(path: str, *, as_json: bool = False) -> str:
    """Tells what stands in a directory.

    Raises:
        UserError: there is neither a run nor a dataset, or it cannot be read.
    """
    now = datetime.datetime.now(datetime.UTC)
    try:
        facts = tell(path, now)
    except UserError:
        raise
    except Exception as error:  # object stores have exceptions of their own
        raise UserError(f"{path!r} cannot be read: {error}") from error
    if as_json:
        return json.dumps(_finite(facts), indent=1)
    lines = _run_lines(facts) if facts["kind"] == "run" else _dataset_lines(facts)
    return "\n".join(f"{name:11} {value}".rstrip() for name, value in lines)


def tell(path: str, now: datetime.datetime) -> Facts:
    """What is known, as values that fit into JSON.

    Args:
        path: of the directory.
        now: with a time zone.

    Raises:
        UserError: see `run`.
    """
    absolute = storage.absolute(path)
    for name in (schema.MANIFEST, schema.SETTINGS):
        if storage.exists(storage.join(absolute, name)):
            return _dataset(absolute, name, now)
    found = find(path)
    if found is None:
        raise UserError(
            f"{path!r}: neither a run nor a dataset is there; `layered train` and `layered prepare` make them"
        )
    return _run(found, now)


def _run(found: Run, now: datetime.datetime) -> Facts:
    spent = times(found)
    logged = _age(found.logged, now)
    written = _written(found.layout, now)
    columns = found.history.columns
    planned = found.num_planned
    scores = tree_of(found.layout.scores)
    return {
        "kind": "run",
        "path": found.layout.path,
        "state": _state(found, spent, logged),
        "preset": found.config.get("preset"),
        "resolutions": found.resolutions,
        "num_images": found.num_seen,
        "num_images_planned": planned,
        "fraction": min(found.num_seen / planned, 1.0) if planned else None,
        "seconds": spent and spent.seconds,
        "images_per_second": spent and spent.latest_speed,
        "seconds_left": spent and spent.seconds_left,
        "seconds_since_line": logged,
        "usual_pause_seconds": spent and spent.pause,
        "losses": {
            key.partition("/")[2]: column.y[-1]
            for key, column in columns.items()
            if key.startswith("loss/") and key.count("/") == 1
        },
        "validation": {
            key.removeprefix("val/loss").lstrip("/") or "all": column.y[-1]
            for key, column in columns.items()
            if key == "val/loss" or (key.startswith("val/loss/") and key.count("/") == 2)
        },
        "validation_num_images": int(columns["val/loss"].x[-1]) if "val/loss" in columns else None,
        "checkpoints": _checkpoints(found.layout, now),
        "model": _model(found),
        "evaluation": scores if isinstance(scores, Mapping) else None,
        "damaged": [scores] if isinstance(scores, str) else [],
        "lines_unreadable": found.history.num_unreadable,
        "written": min(written.items(), key=lambda item: item[1])[0] if written else None,
        "seconds_since_written": min(written.values(), default=None),
    }


def _state(found: Run, spent: Times | None, age: float | None) -> str:
    if found.finished and found.num_exported >= found.num_seen:
        return "finished"
    if age is None or not found.history.positions:
        return "begun"
    patience = max(LEAST_PATIENCE, PATIENCE * spent.pause if spent is not None else 0.0)
    return "running" if age <= patience else "stopped"


def _checkpoints(layout: RunDir, now: datetime.datetime) -> Facts | None:
    """The newest, and how many there are."""
    store = Store(layout.checkpoints)
    found = store.all()
    if not found:
        return None
    newest = found[-1]
    path = store.path(newest.num_images)
    state = storage.join(path, STATE_FILE)
    try:
        size, age = storage.size(state), _age(storage.modified(state), now)
    except OSError:
        size, age = None, None
    return {
        "number": len(found),
        "newest": path,
        "num_images": newest.num_images,
        "bytes": newest.bytes,
        "seconds_since": age,
        # The digest of some gigabytes is for whoever loads them.
        "whole": size == newest.bytes,
    }


def _model(found: Run) -> Facts | None:
    tree = tree_of(storage.join(found.layout.model, CONFIG_OF_MODEL))
    if not isinstance(tree, Mapping):
        return None
    return {
        "path": found.layout.model,
        "num_images": found.num_exported,
        "weights_sha256": tree.get("weights_sha256"),
    }


def _written(layout: RunDir, now: datetime.datetime) -> dict[str, float]:
    """Seconds since each file of a run was written."""
    model = storage.join(layout.model, CONFIG_OF_MODEL)
    files = (layout.config, layout.metrics_log, model, layout.scores, layout.report)
    ages: dict[str, float] = {}
    for path in files:
        try:
            ages[path] = _seconds(storage.modified(path), now)
        except OSError:
            continue
    return ages


def _dataset(path: str, name: str, now: datetime.datetime) -> Facts:
    file = storage.join(path, name)
    try:
        text = storage.read_bytes(file).decode()
        age = _age(storage.modified(file), now)
        facts = {"kind": "dataset", "path": path, "seconds_since_written": age}
        if name == schema.MANIFEST:
            return facts | {"state": "finished"} | _finished_dataset(Manifest.from_json(text))
        settings = json.loads(text)
        planned, rows = settings.get(schema.PLANNED), settings["rows_per_file"]
        about = {key: settings[key] for key in ("resolution", "encoder")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    files = {split: _data_files(path, split) for split in schema.SPLITS}
    newest = [
        storage.modified(storage.join(path, split, names[-1]))
        for split, names in files.items()
        if names
    ]
    count = sum(map(len, files.values()))
    done = count * rows if planned is None else min(count * rows, planned)
    return facts | {
        "state": "begun",
        **about,
        "files": {split: len(names) for split, names in files.items()},
        "num_images_at_most": done,
        "num_images_planned": planned,
        "fraction": done / planned if planned else None,
        "seconds_since_written": min([_seconds(when, now) for when in newest], default=age),
    }


def _data_files(path: str, split: str) -> list[str]:
    names = storage.list_directory(storage.join(path, split))
    return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]


def _finished_dataset(manifest: Manifest) -> Facts:
    return {
        "resolution": manifest.settings.resolution,
        "encoder": manifest.settings.encoder,
        "fingerprint": manifest.fingerprint,
        "splits": {
            name: asdict(split.counts)
            | {"files": len(split.files), "bytes": sum(file.bytes for file in split.files)}
            for name, split in manifest.splits.items()
        },
    }


def _run_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "run", facts["path"]
    yield "state", _state_text(facts)
    if facts["preset"] is not None:
        sizes = facts["resolutions"]
        yield "preset", str(facts["preset"]) + (f", {_joined(sizes)} px" if sizes else "")
    yield "images", _of(facts["num_images"], facts["num_images_planned"], facts["fraction"])
    if facts["images_per_second"] is not None:
        left = facts["seconds_left"]
        yield (
            "speed",
            f"{facts['images_per_second']:,.3g} images a second; took {duration(facts['seconds'])}"
            + (f", {duration(left)} left" if left is not None else ""),
        )
    if facts["losses"]:
        yield "losses", _values(facts["losses"])
    if facts["validation"]:
        yield (
            "validation",
            f"{_values(facts['validation'])}  (at {facts['validation_num_images']:,})",
        )
    yield "checkpoint", _checkpoint_text(facts["checkpoints"])
    if (model := facts["model"]) is not None:
        yield "model", f"of {model['num_images']:,} images, weights {model['weights_sha256']}"
    else:
        yield "model", "none yet"
    if facts["seconds_since_written"] is not None:
        name = str(facts["written"]).rpartition("/")[2]
        yield "written", f"{duration(facts['seconds_since_written'])} ago, {name}"
    for damaged in facts["damaged"]:
        yield "damaged", damaged
    if number := facts["lines_unreadable"]:
        yield "damaged", f"{number:,} lines of the log cannot be read"
    if facts["evaluation"] is not None:
        result = facts["evaluation"]
        table = score_report.table({**result, "warnings": []}).splitlines()
        yield from zip(["scores", *[""] * (len(table) - 1)], table, strict=True)
        if number := len(warnings_of(result)):
            yield "", f"{number} warnings, in {RunDir(facts['path']).evaluation_md}"


def _state_text(facts: Facts) -> str:
    state, age, pause = (
        facts[key] for key in ("state", "seconds_since_line", "usual_pause_seconds")
    )
    if state == "begun":
        return "begun, and nothing is logged yet"
    usual = f", usually one every {duration(pause)}" if pause is not None else ""
    last = f"the last line of the log is {duration(age)} old{usual}" if age is not None else ""
    if state == "finished":
        return "finished"
    if state == "running":
        return f"running, it seems: {last}"
    return f"stopped or stalled, it seems: {last}; the same command goes on"


def _checkpoint_text(found: Facts | None) -> str:
    if found is None:
        return "none yet"
    age = found["seconds_since"]
    when = f", {duration(age)} ago" if age is not None else ""
    state = "" if found["whole"] else ", DAMAGED: not of the size that was written"
    return f"at {found['num_images']:,} images{when}, {found['bytes'] / 1e6:,.1f} MB, {found['number']} kept{state}"


def _dataset_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "dataset", facts["path"]
    age = f"{duration(facts['seconds_since_written'])} ago"
    yield "pictures", f"{facts['resolution']} px, text by {facts['encoder']}"
    if facts["state"] == "begun":
        yield "state", f"not finished; the last file was written {age}. The same command goes on"
        planned = facts["num_images_planned"]
        yield "images", "at most " + _of(facts["num_images_at_most"], planned, facts["fraction"])
        yield "files", ", ".join(f"{name} {count:,}" for name, count in facts["files"].items())
        return
    yield "state", f"finished {age}; fingerprint {facts['fingerprint']}"
    for name, split in facts["splits"].items():
        counts = (f"{split[key]:,} {key}" for key in ("images", "rejects", "captions", "files"))
        yield name, ", ".join(counts) + f", {split['bytes'] / 1e6:,.1f} MB"


def _of(done: int, planned: int | None, fraction: float | None) -> str:
    if planned is None:
        return f"{done:,}"
    return f"{done:,} of {planned:,}" + (
        f" ({100 * fraction:.0f} %)" if fraction is not None else ""
    )


def _values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name}: {value:.4g}" for name, value in values.items())


def _joined(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _age(when: datetime.datetime | None, now: datetime.datetime) -> float | None:
    return None if when is None else _seconds(when, now)


def _seconds(when: datetime.datetime, now: datetime.datetime) -> float:
    """Since then; a store's clock may be ahead of ours."""
    return max((now - when).total_seconds(), 0.0)


def _finite(value: Any) -> Any:
    """What JSON knows: None for infinite numbers and those that are none."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["status", *sys.argv[1:]]))
