"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard, grids, ``environment.json``; times and memory of a step.

Called by `trainer`, on rank 0 alone but for the stopwatch.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from typing import Any

import numpy as np
import torch

from pipelines import costs, storage
from pipelines.grid import png_bytes
from pipelines.schema import RunDir


@dataclass
class Stopwatch:
    """Seconds by activity since the last reset."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        """Adds the time spent inside to an activity."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[activity] = self.seconds.get(activity, 0.0) + spent

    def take(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        taken, self.seconds = self.seconds, {}
        return taken


class MetricsLog:
    """``metrics.jsonl``, TensorBoard events and grids of a run, in rank 0.

    Lines of an interrupted run beyond the position it goes on from are dropped.
    """

    def __init__(self, layout: RunDir, num_images: int) -> None:
        self.layout = layout
        self.lines: list[str] = []
        if num_images and storage.exists(layout.metrics_log):
            lines = storage.read_bytes(layout.metrics_log).decode().splitlines()
            self.lines = [line for line in lines if json.loads(line)["images"] <= num_images]
        self._board: Any = None
        if not storage.is_remote(layout.path):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(layout.tensorboard, purge_step=num_images or None)

    def add(self, num_images: int, values: dict[str, float]) -> None:
        """Values at a position, all of one position on one line."""
        record: dict[str, float] = {"images": num_images}
        if self.lines and json.loads(self.lines[-1])["images"] == num_images:
            record = json.loads(self.lines.pop())
        record |= {name: float(f"{value:.6g}") for name, value in values.items()}
        self.lines.append(json.dumps(record))
        storage.write_atomically(self.layout.metrics_log, ("\n".join(self.lines) + "\n").encode())
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, num_images)
            self._board.flush()

    def add_grid(self, num_images: int, sheet: Any) -> None:
        """One contact sheet, at a position."""
        path = storage.join(self.layout.samples, f"{num_images:09d}.png")
        storage.write_atomically(path, png_bytes(sheet))
        if self._board is not None:
            self._board.add_image("samples", np.asarray(sheet), num_images, dataformats="HWC")


def memory(device: torch.device) -> dict[str, float]:
    """Most memory taken so far, in bytes: of this process, and of a GPU's memory by it."""
    kibibytes = 1 if sys.platform == "darwin" else 1024
    taken: dict[str, float] = {
        "memory/process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes
    }
    if device.type == "cuda":
        taken["memory/gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return taken


def write_environment(layout: RunDir, device: torch.device, num_workers: int) -> None:
    """What the run runs on, for whoever wants to repeat it: ``environment.json``."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": gpu or costs.processor(),
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "num_workers": num_workers,
        "packages": dict(sorted((d.name, d.version) for d in distributions())),
    }
    storage.write_atomically(layout.environment, (json.dumps(found, indent=1) + "\n").encode())
