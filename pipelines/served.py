"""What `bench_serve` measures: a run with random weights, both servers of it on a local Ray, and the bare pipeline."""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from layered_model import LayeredPipeline, ModelConfig
from layered_model.presets import PRESETS
from layered_model.rows import join_prompts
from layered_model.text import describe
from pipelines.config import Config, load_config, to_yaml
from pipelines.processes import family, standing_still
from pipelines.recipe import fresh_network, sampling_defaults
from pipelines.schema import RunDir
from pipelines.serving.load import Kind
from pipelines.session import Needs, connect

SHAPE = "64T"
"""Whose network is taken at half its width: passes of eight rows then take a CPU some tens of milliseconds, as on a GPU."""
BATCH_SIZES = (1, 2, 4, 8)
SWEEP_STEPS = 3
"""Of the drawings that show which batch is best."""
OURS, PEER = "layered", "batched"


def configuration(threads: int, overrides: Sequence[str], run_directory: str) -> Config:
    """Of the preset `demo` with a larger network, a server of one replica, and no limits of a client."""
    shape = PRESETS[SHAPE]
    network = {
        "resolutions": shape.resolutions,
        "channels": [width // 2 for width in shape.channels],
        "blocks": shape.blocks,
        "attention": shape.attention,
        "mid_blocks": shape.mid_blocks,
        "head_width": shape.head_width // 2,
    }
    return load_config(
        "demo",
        [
            *(f"model.{name}={json.dumps(value)}" for name, value in network.items()),
            *overrides,
            f"run={json.dumps(run_directory)}",
            f"serve.port={_free_port()}",
            f"serve.cpus_per_replica={threads}",
            "serve.max_concurrent=1000000",
            "serve.requests_per_minute=1000000000",
            f"ray.num_cpus={2 * threads + 4}",
        ],
    )


def write_run(config: Config) -> None:
    """What training leaves, with random weights; what begins as zero gets some too, so that there is something to draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = fresh_network(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    model = ModelConfig(
        network=config.model,
        diffusion=config.diffusion,
        text=describe(config.text.encoder, max_tokens=config.text.max_tokens),
        sampling=sampling_defaults(config.sample),
    )
    LayeredPipeline(model, network).save_pretrained(RunDir(config.run).model)
    Path(config.run, "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def both(config: Config) -> Iterator[str]:
    """Both servers; the address of ours, below which the other is."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # a line a request
    threads = config.serve.cpus_per_replica
    needs = Needs(stage="bench serve", workers=2, cpus_per_worker=threads, cpus_for_tasks=2.0)
    with connect(config, needs):
        from ray import serve

        from pipelines.serving import batched, ingress

        serve.start(http_options={"host": "127.0.0.1", "port": config.serve.port})
        try:
            applications = [
                serve.RunTarget(ingress.application(config), OURS, "/"),
                serve.RunTarget(batched.application(config), PEER, f"/{PEER}"),
            ]
            serve.run_many(applications)
            yield f"http://127.0.0.1:{config.serve.port}"
        finally:
            serve.shutdown()


class Bare:
    """The pipeline alone, in this process.

    Args:
        config: Of the run whose model it is.
        threads: That it computes with.
    """

    def __init__(self, config: Config, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pipeline = LayeredPipeline.from_pretrained(RunDir(config.run).model)
        self._guidance = config.sample.guidance
        self._text = self._pipeline.encode(["a red apple on a white background"])
        self._others = [pid for pid in family(os.getpid()) if pid != os.getpid()]
        self.batch_sizes = {r: self._best(r) for r in self._pipeline.resolutions}

    def seconds(self, kind: Kind, batch_size: int | None = None) -> tuple[float, float]:
        """Of one picture in a batch of the best size, or of another: by the clock, and of CPUs."""
        size = batch_size or self.batch_sizes[kind.resolution]
        text = join_prompts([self._text] * size)
        with standing_still(self._others):
            began, computed = time.perf_counter(), time.process_time()
            self._pipeline.sample(
                *text,
                list(range(size)),
                num_steps=kind.num_steps,
                guidance=self._guidance,
                resolution=kind.resolution,
            )
            seconds = time.perf_counter() - began, time.process_time() - computed
        return seconds[0] / size, seconds[1] / size

    def _best(self, resolution: int) -> int:
        kind = Kind(resolution, SWEEP_STEPS)
        self.seconds(kind, BATCH_SIZES[0])
        return min(BATCH_SIZES, key=lambda size: min(self.seconds(kind, size)[0] for _ in range(3)))
