"""How long training on a picture takes with one configuration, by another: for budgets of equal time.

Two configurations take turns at whole steps (loss, gradient, optimizer, averages) on made-up pictures, with the threads or the
GPU of one worker, and the median of the rounds' ratios counts (see `costs`). It is measured once, before anything runs, and kept
in ``STORE/speeds.json``: measured anew it would differ a little, and with it the number of pictures and so the cell.

Called by `pipelines.ablate`.
"""

import json
import logging
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from layered_model.diffusion import LayeredDiffusion
from pipelines import costs, recipe, storage
from pipelines.config import Config, UserError, fingerprint
from pipelines.optimizers import make_optimizers
from pipelines.session import event

logger = logging.getLogger(__name__)

REPEATS, WARM_UP = 9, 2
FILE = "speeds.json"


class Speeds:
    """Ratios of seconds a picture, measured or, without measuring, by counted multiply-adds.

    Args:
        store: directory in which they are kept.
        measure: whether to measure what is not there.
    """

    def __init__(self, store: str, *, measure: bool) -> None:
        self.path = storage.join(storage.absolute(store), FILE)
        self.measure = measure
        self.guessed = False
        "Whether multiply-adds stood in for seconds."
        self.known: dict[str, Any] = {}
        if storage.exists(self.path):
            self.known = json.loads(storage.read_bytes(self.path))

    def __call__(self, config: Config, other: Config) -> float:
        """Seconds of training on a picture with the first, by those with the second.

        Raises:
            UserError: it would be measured on a GPU that is not here.
        """
        decides = [_decides(config), _decides(other)]
        if decides[0] == decides[1]:
            return 1.0
        key = fingerprint(*decides)
        if key not in self.known:
            if not self.measure:
                self.guessed = True
                return recipe.step_macs(config) / recipe.step_macs(other)
            self.known[key] = measured(config, other)
            content = json.dumps(self.known, indent=1).encode() + b"\n"
            storage.write_atomically(self.path, content)
        return float(self.known[key]["ratio"])


def _decides(config: Config) -> dict[str, Any]:
    """What the time of a step depends on; not the length of training."""
    train = asdict(config.train)
    names = ("batch_size", "accumulation_steps", "optimizer", "precision", "crop_resolution")
    taken = {name: train[name] for name in (*names, "num_workers", "cpus_per_worker", "use_gpu")}
    diffusion = asdict(config.diffusion)
    return {"model": asdict(config.model), "noise": diffusion["noise"], **taken}


def measured(config: Config, other: Config) -> dict[str, Any]:
    """Median and quartiles of the ratio, and seconds a picture of both.

    Raises:
        UserError: there is no GPU here.
    """
    use_gpu = config.train.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise UserError(
            "budget: time is measured where `layered ablate` runs, and train.use_gpu=true finds no GPU here; run it "
            "where there is one"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    try:
        taken = costs.rounds(
            {"this": _step(config), "other": _step(other)},
            repeats=REPEATS,
            warm_up=WARM_UP,
            synchronize=torch.cuda.synchronize if use_gpu else lambda: None,
        )
    finally:
        torch.set_num_threads(threads)
    sizes = [_share(config), _share(other)]
    seconds = [
        [value / size for value in values]
        for values, size in zip(taken.values(), sizes, strict=True)
    ]
    ratio = costs.ratio(*seconds)
    event(logger, "speed", ratio=ratio.median, low=ratio.low, high=ratio.high)
    return {
        "ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
        "seconds": [costs.Spread.of(values).median for values in seconds],
        "device": torch.cuda.get_device_name() if use_gpu else costs.processor(),
    }


def _share(config: Config) -> int:
    """Pictures of a worker's part of a step."""
    return config.train.batch_size // config.train.num_workers


def _step(config: Config) -> costs.Job:
    """A worker's part of a step of training, on made-up pictures."""
    train, model = config.train, config.model
    device = torch.device("cuda" if train.use_gpu else "cpu")
    torch.manual_seed(config.seed)
    network = recipe.fresh_network(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compute: Any = torch.compile(network) if train.compile else network
    diffusion = LayeredDiffusion(config.diffusion, model.layers)
    optimizers, (average, _) = make_optimizers(network, train), recipe.make_averages(network, train)
    count = _share(config) // train.accumulation_steps
    top, tokens = model.layers[-1], config.text.max_tokens
    x0 = torch.rand(count, model.picture_channels, top, top, device=device) * 2 - 1
    text = torch.randn(count, tokens, model.text_width, device=device)
    mask = torch.ones(count, tokens, dtype=torch.bool, device=device)
    seen = 0

    def loss() -> Tensor:
        chance = recipe.draw_chance(
            config, diffusion, seen=seen, rank=0, count=count, device=device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            return diffusion.loss(compute, x0, chance.eps, chance.t, text, mask, chance.crop).total

    def step() -> None:
        nonlocal seen
        for _ in range(train.accumulation_steps):
            torch.autograd.backward(loss())
        nn.utils.clip_grad_norm_(network.parameters(), train.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(network)
        seen += train.batch_size

    return step
