"""Prepared dataset -> trained model, on Ray Train.

The driver checks everything, starts the workers (`trainer`), and follows their log for the progress bar. ``RUN/config.yaml``
says what the run is; the same command again goes on from the newest checkpoint, or says that nothing is left to do. A run
directory is refused to a configuration that would train another model. Run by `cli`.
"""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator

from layered_model import checkpoint
from layered_model.growth import check_growth
from pipelines import paths, recipe, running_score, storage, trackers
from pipelines.checkpoints import newest
from pipelines.config import Config, differences, from_yaml, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.errors import StageFailed, UserError
from pipelines.runs import split_text, step_split
from pipelines.schema import RunDir
from pipelines.session import Needs, Progress, connect, event, warning

logger = logging.getLogger(__name__)

RESIZE_SECONDS = 60.0
"""Between two looks for nodes that have come back, of a run with fewer workers than it may have."""

LINE_BYTES = 2**16
"""The last line of the log is shorter."""

RAY_TRAIN_FOLDER = "ray_train"
"""In the run's directory; what Ray Train keeps for itself."""

MAY_CHANGE = (
    "preset",
    "data.",
    "text.batch_size",
    "text.num_actors",
    "text.use_gpu",
    "train.num_images",
    "train.cooldown_images",
    "train.accumulation_steps",
    "train.num_workers",
    "train.min_workers",
    "train.compile",
    "train.cpus_per_worker",
    "train.use_gpu",
    "train.trackers",
    "train.log_every_images",
    "train.checkpoint_every_images",
    "train.num_checkpoints_kept",
    "train.keep_",
    "train.validate_every_images",
    "train.num_validation_images",
    "train.score_every_images",
    "train.num_score_images",
    "train.grid_every_images",
    "train.checkpoint_upper_layers",
    "train.max_failures",
    "train.max_skipped_steps",
    "sample.",
    "evaluate.",
    "ray.",
)
"""Keys that may differ when a run goes on; all others decide what the model becomes."""


def check(config: Config) -> list[str]:
    """Checks all input without starting Ray.

    Returns:
        Lines that say what would be done.

    Raises:
        UserError: no dataset, a dataset of another kind, a model that this one cannot grow from, a run directory of another
            configuration, or a score on the way that could not be computed.
    """
    dataset = PreparedDataset.open(config.dataset)
    dataset.check_matches(config)
    train, num_rows = config.train, dataset.num_images("train")
    if num_rows < 1:
        raise UserError(f"dataset={config.dataset!r}: its train split is empty")
    _check_growth(config, dataset)
    trackers.check(train.trackers)
    layout = RunDir(storage.absolute(config.run))
    _check_same_run(config, layout)
    trained = _num_images_trained(layout)
    if trained >= train.num_images:
        return [f"run {layout.path} is finished: {trained} of {train.num_images} pictures"]
    running_score.check(config, dataset)
    lines = [
        f"run {layout.path} would train on {train.num_images} pictures "
        f"({train.num_images / num_rows:.1f} times {num_rows}) with {train.num_workers} workers"
    ]
    if (reached := recipe.peak_learning_rate(train)) < 0.99 * train.learning_rate:
        lines.append(
            f"the learning rate reaches {reached:.2g} of {train.learning_rate:.2g}: train.warmup_images={train.warmup_images} "
            f"and train.cooldown_images={train.cooldown_images} are more than train.num_images={train.num_images}"
        )
    return lines


def needs(config: Config) -> Needs:
    """What a cluster must be able to give, before training begins."""
    train = config.train
    return Needs(
        stage="train",
        workers=train.min_workers or train.num_workers,
        cpus_per_worker=train.cpus_per_worker,
        gpus_per_worker=float(train.use_gpu),
        cpus_for_tasks=0.0,
        paths=tuple(filter(None, (config.run, config.dataset, train.grow_from))),
    )


def run(config: Config) -> str:
    """Trains, or goes on training.

    Returns:
        The model's directory.

    Raises:
        UserError: as `check`, or the cluster has no room for the workers.
        StageFailed: workers were lost more often than ``train.max_failures``.
    """
    for line in check(config)[1:]:
        warning(logger, "note", what=line)
    layout = RunDir(storage.absolute(config.run))
    if (trained := _num_images_trained(layout)) >= config.train.num_images:
        event(logger, "kept", model=layout.model, images=trained, state="finished already")
        return layout.model
    storage.require_writable(layout.path, "run")
    storage.write_atomically(layout.config, to_yaml(config).encode())
    # With the dashboard, because Ray Train watches its own controller through it.
    with connect(config, needs(config), dashboard=True), _followed(config, layout):
        _fit(config, layout)
    event(logger, "trained", images=config.train.num_images)
    event(logger, "step", split=step_split(layout))
    event(logger, "wrote", run=layout.path, model=layout.model, log=layout.metrics_log)
    return layout.model


def _check_same_run(config: Config, layout: RunDir) -> None:
    if not storage.exists(layout.config):
        return
    before = from_yaml(storage.read_bytes(layout.config).decode(), layout.config)
    changes = [
        f"{key} was {old!r} and is now {new!r}"
        for key, old, new in differences(before, config)
        if key not in ("run", "dataset") and not key.startswith(MAY_CHANGE)
    ]
    if changes:
        raise UserError(
            f"run={config.run!r} was begun with other settings: {'; '.join(changes)}; "
            "give another run=DIR, or delete this one"
        )


def _check_growth(config: Config, dataset: PreparedDataset) -> None:
    path = config.train.grow_from
    if path is None:
        return
    try:
        lower = checkpoint.load_config(storage.absolute(path))
        check_growth(lower.network, config.model)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"train.grow_from={path!r}: {error}") from error
    shared = ("prediction", "reference_resolution", "detail_resolution", "logsnr_min", "logsnr_max")
    pairs = {
        "text.encoder": (lower.text.weights, dataset.manifest.settings.encoder_weights),
        **{
            f"diffusion.{name}": (getattr(lower.diffusion, name), getattr(config.diffusion, name))
            for name in shared
        },
    }
    for key, (have, want) in pairs.items():
        if have != want:
            raise UserError(
                f"train.grow_from={path!r} was trained with {key} {have!r}, which must stay: "
                f"here it is {want!r}"
            )


def _num_images_trained(layout: RunDir) -> int:
    """What the finished model saw; 0 if there is none yet."""
    path = storage.join(layout.model, checkpoint.CONFIG_FILE)
    if not storage.exists(path):
        return 0
    return int(json.loads(storage.read_bytes(path))["num_images_trained"])


def _fit(config: Config, layout: RunDir) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from pipelines.trainer import run_worker

    train = config.train
    fewest = train.num_workers if train.min_workers is None else train.min_workers
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"config": to_yaml(paths.placed(config))},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers
            if fewest == train.num_workers
            else (fewest, train.num_workers),
            use_gpu=train.use_gpu,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": float(train.use_gpu)},
        ),
        # Ray Train replaces workers; what they go on from is ours (`checkpoints`).
        run_config=RunConfig(
            name=RAY_TRAIN_FOLDER,
            storage_path=layout.path,
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    try:
        stopped = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _failed(config, layout, error) from error
    if stopped is not None:
        raise UserError(stopped)


def _failed(config: Config, layout: RunDir, error: Exception) -> Exception:
    """What to tell when workers were lost more often than they may be."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [getattr(cause, "health_check_failure", cause) for cause in causes]  # why it failed
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    lines = dict.fromkeys(f"{type(cause).__name__}: {_first_line(cause)}" for cause in causes)
    hint = ""
    if any(_is_out_of_memory(cause) for cause in causes):
        hint = (
            "; less memory is needed with a higher train.accumulation_steps, "
            "train.checkpoint_upper_layers=true, train.crop_resolution or a lower train.batch_size"
        )
    return StageFailed(
        f"training failed, and train.max_failures={config.train.max_failures} allows no new start: "
        f"{' and '.join(lines)}{hint}; {newest(layout)}, from which the same command goes on"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of this process, or, by Ray, of the machine."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
        or "running low on memory" in said
    )


@contextlib.contextmanager
def _followed(config: Config, layout: RunDir) -> Iterator[None]:
    """Shows progress by reading the log that rank 0 writes, wherever that runs."""
    finished = threading.Event()
    follower = threading.Thread(target=_follow, args=(config, layout, finished), daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()


def _follow(config: Config, layout: RunDir, finished: threading.Event) -> None:
    start = _last_line(layout).get("images", 0)
    with Progress("train", config.train.num_images, "images", int(start)) as bar:
        while True:
            last = finished.wait(timeout=1.0)
            line = _last_line(layout)
            if line.get("images", 0) != bar.done:
                bar.update(int(line["images"]) - bar.done, **_shown(line))
            if last:
                return


def _shown(line: dict[str, float]) -> dict[str, object]:
    """What the progress shows of a line of the log: losses of layers but not of bins, speed, and where the time goes."""
    shown: dict[str, object] = {
        key.replace("/", "_"): value
        for key, value in line.items()
        if key.startswith("loss/") and key.count("/") == 1
    }
    shown |= {key: line[key] for key in ("val/loss", "images_per_second") if key in line}
    parts = {key.removeprefix("time/"): line[key] for key in line if key.startswith("time/")}
    return shown | ({"step": split_text(parts)} if parts else {})


def _last_line(layout: RunDir) -> dict[str, float]:
    if not storage.exists(layout.metrics_log):
        return {}
    lines = storage.read_end(layout.metrics_log, LINE_BYTES).splitlines()
    values: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return values


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))
