"""What a run tells while it trains: ``metrics.jsonl``, grids, `trackers`, ``environment.json``; times and memory of a step.

Called by `trainer`, on rank 0 alone but for the stopwatch.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions

import torch
from PIL import Image

from pipelines import costs, storage
from pipelines.grid import png_bytes
from pipelines.schema import RunDir
from pipelines.trackers import Trackers


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
        """Each activity's share of the seconds so far, as ``time/model``; and starts anew."""
        total = sum(self.seconds.values())
        taken = {f"time/{name}": spent / total for name, spent in sorted(self.seconds.items())}
        self.seconds = {}
        return taken


class MetricsLog:
    """``metrics.jsonl`` and grids of a run, which its trackers show too; in rank 0.

    Lines of an interrupted run beyond the position it goes on from are dropped.

    Args:
        layout: the run's directory.
        num_images: the position it goes on from.
        trackers: names of `trackers.TRACKERS`.
    """

    def __init__(self, layout: RunDir, num_images: int, trackers: Sequence[str] = ()) -> None:
        self.layout = layout
        self.lines: list[str] = []
        if num_images and storage.exists(layout.metrics_log):
            lines = storage.read_bytes(layout.metrics_log).decode().splitlines()
            self.lines = [line for line in lines if json.loads(line)["images"] <= num_images]
        self.trackers = Trackers(trackers, layout, num_images)

    def add(self, num_images: int, values: dict[str, float]) -> None:
        """Values at a position, all of one position on one line."""
        record: dict[str, float] = {"images": num_images}
        if self.lines and json.loads(self.lines[-1])["images"] == num_images:
            record = json.loads(self.lines.pop())
        record |= {name: float(f"{value:.6g}") for name, value in values.items()}
        self.lines.append(json.dumps(record))
        storage.write_atomically(self.layout.metrics_log, ("\n".join(self.lines) + "\n").encode())
        self.trackers.log(num_images, values)

    def add_grid(self, num_images: int, sheet: Image.Image) -> None:
        """One contact sheet, at a position."""
        path = storage.join(self.layout.samples, f"{num_images:09d}.png")
        storage.write_atomically(path, png_bytes(sheet))
        self.trackers.show(num_images, "samples", sheet)

    def close(self) -> None:
        """Waits until the trackers know it all."""
        self.trackers.close()


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
