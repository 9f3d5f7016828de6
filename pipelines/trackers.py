"""Where a run's numbers and pictures are shown beside ``metrics.jsonl``: TensorBoard, MLflow, Weights & Biases.

MLflow and Weights & Biases take their server and keys from their own environment variables (``MLFLOW_TRACKING_URI``,
``WANDB_API_KEY``, ``WANDB_MODE``, ...), which the workers need too. A run that goes on is theirs as before: its name there is
kept in `NAMES_FILE`. What they are told goes through a thread, and what they fail to do is a warning: training does not
wait for a service, and ``metrics.jsonl`` has all of it.

To add one, write a class with the methods of `Tracker`, and give it its place in `TRACKERS` and its name in `sections`. Called by
`runlog`, on rank 0, and by `evaluate`, which adds to a run that is trained; `train` asks `check` before it starts anything.
"""

import importlib.util
import json
import logging
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.config import UserError
from pipelines.schema import RunDir
from pipelines.session import warning

logger = logging.getLogger(__name__)

NAMES_FILE = "trackers.json"
"""In the run's directory; what the trackers call the run."""


class Tracker(Protocol):
    """Shows what a run does."""

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Numbers, after so many pictures."""

    def show(self, num_images: int, name: str, sheet: Image.Image) -> None:
        """A picture, after so many pictures."""

    def close(self) -> None:
        """Nothing more comes from this process."""


class TensorBoard:
    """Events in the run's directory; on an object store, which cannot add to a file, the file is put there anew each time."""

    def __init__(self, layout: RunDir, known: dict[str, str], num_images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._place, self._folder = layout.tensorboard, layout.tensorboard
        if storage.is_remote(layout.path):
            self._folder = tempfile.mkdtemp(prefix="tensorboard-")
        # Events of an interrupted run beyond the position it goes on from are dropped.
        purged = num_images + 1 if num_images else None
        self._writer: Any = SummaryWriter(self._folder, purge_step=purged)

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Numbers, after so many pictures."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, num_images)
        self._flush()

    def show(self, num_images: int, name: str, sheet: Image.Image) -> None:
        """A picture, after so many pictures."""
        self._writer.add_image(name, np.asarray(sheet), num_images, dataformats="HWC")
        self._flush()

    def close(self) -> None:
        """Nothing more comes from this process."""
        self._writer.close()
        if self._folder != self._place:
            shutil.rmtree(self._folder)

    def _flush(self) -> None:
        self._writer.flush()
        if self._folder != self._place:
            for file in Path(self._folder).iterdir():
                storage.write_atomically(storage.join(self._place, file.name), file.read_bytes())


class MLflow:
    """A run of the experiment that ``MLFLOW_EXPERIMENT_NAME`` names."""

    def __init__(self, layout: RunDir, known: dict[str, str], num_images: int) -> None:
        import mlflow

        # Not `start_run` alone, which would be a run of this thread, and end with the process.
        self._client: Any = mlflow.MlflowClient()
        if "mlflow" in known:
            self._client.update_run(known["mlflow"], status="RUNNING")
        else:
            with mlflow.start_run(run_name=posixpath.basename(layout.path)) as run:
                known["mlflow"] = run.info.run_id
                mlflow.log_text(storage.read_bytes(layout.config).decode(), "config.yaml")
            self._client.update_run(known["mlflow"], status="RUNNING")
        self._run = known["mlflow"]

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Numbers, after so many pictures."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, num_images) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def show(self, num_images: int, name: str, sheet: Image.Image) -> None:
        """A picture, after so many pictures."""
        self._client.log_image(self._run, sheet, f"{name}/{num_images:09d}.png")

    def close(self) -> None:
        """Nothing more comes from this process."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of the project that ``WANDB_PROJECT`` names."""

    def __init__(self, layout: RunDir, known: dict[str, str], num_images: int) -> None:
        import wandb
        import yaml

        self._run: Any = wandb.init(
            id=known.get("wandb"),
            name=posixpath.basename(layout.path),
            resume="allow",
            config=yaml.safe_load(storage.read_bytes(layout.config)),
        )
        known["wandb"] = self._run.id
        # Its own steps may not go back, as a run does that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="images")

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Numbers, after so many pictures."""
        self._run.log({"images": num_images, **values})

    def show(self, num_images: int, name: str, sheet: Image.Image) -> None:
        """A picture, after so many pictures."""
        import wandb

        self._run.log({"images": num_images, name: wandb.Image(sheet)})

    def close(self) -> None:
        """Nothing more comes from this process."""
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[RunDir, dict[str, str], int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
}
"""Of each name in ``train.trackers``, the package that it needs, and what it is."""


def check(names: Sequence[str]) -> None:
    """Refuses trackers whose packages are missing.

    Raises:
        UserError: naming the package.
    """
    for name in names:
        package, _ = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.trackers={list(names)} needs the package {package}, which is not installed; "
                f"`pip install {package}`, or leave {name} out"
            )


class Trackers:
    """Those of a run, told in a thread.

    Args:
        names: of `TRACKERS`.
        layout: the run's directory.
        num_images: pictures seen, where the run goes on; what is known of later ones is dropped.
    """

    def __init__(self, names: Sequence[str], layout: RunDir, num_images: int) -> None:
        self._thread = ThreadPoolExecutor(1, "tracker")
        self._trackers: dict[str, Tracker] = {}
        self._thread.submit(self._open, names, layout, num_images)

    def log(self, num_images: int, values: Mapping[str, float]) -> None:
        """Numbers, after so many pictures."""
        self._tell(lambda tracker: tracker.log(num_images, values))

    def show(self, num_images: int, name: str, sheet: Image.Image) -> None:
        """A picture, after so many pictures."""
        self._tell(lambda tracker: tracker.show(num_images, name, sheet))

    def close(self) -> None:
        """Nothing more comes from this process; waits until all is told."""
        self._tell(lambda tracker: tracker.close())
        self._thread.shutdown()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        self._thread.submit(self._tell_each, what)

    def _tell_each(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            with _warned(name):
                what(tracker)

    def _open(self, names: Sequence[str], layout: RunDir, num_images: int) -> None:
        path = storage.join(layout.path, NAMES_FILE)
        for name in names:
            _, make = TRACKERS[name]
            with _warned(name):
                known = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
                before = dict(known)
                self._trackers[name] = make(layout, known, num_images)
                if known != before:
                    storage.write_atomically(path, (json.dumps(known) + "\n").encode())


def add(
    layout: RunDir,
    num_images: int,
    values: Mapping[str, float],
    sheets: Mapping[str, Image.Image],
) -> None:
    """Adds to a run that is trained, in the trackers that its ``config.yaml`` names; returns when all is told.

    It stays the same run to them: TensorBoard gets one more file of events, MLflow and Weights & Biases open theirs again.

    Args:
        layout: the run's directory.
        num_images: pictures that its model was trained on.
        values: finite numbers by name.
        sheets: pictures by name.
    """
    import yaml

    try:
        configured = yaml.safe_load(storage.read_bytes(layout.config))["train"]["trackers"]
        names = [name for name in configured if name in TRACKERS]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        warning(logger, "trackers", config=layout.config, error=f"{type(error).__name__}: {error}")
        return
    # From 0, as nothing that is there is to be dropped.
    telling = Trackers(names, layout, 0)
    telling.log(num_images, values)
    for name, sheet in sheets.items():
        telling.show(num_images, name, sheet)
    telling.close()


@contextmanager
def _warned(name: str) -> Iterator[None]:
    """What a tracker fails to do, for whatever reason, is a warning."""
    try:
        yield
    except Exception as error:
        warning(logger, "tracker", of=name, error=f"{type(error).__name__}: {error}")
