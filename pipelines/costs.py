"""What a network costs: multiply-adds, what it keeps for the backward pass, and time.

Multiply-adds are half of what `torch.utils.flop_counter.FlopCounterMode` counts on the meta device: convolutions and matrix
products, no elementwise arithmetic. Saved bytes are those of every storage that autograd keeps between forward and backward, each
once, without the parameters. Times are taken in rounds: each round runs every job once, in an order that rotates, so that what
else the machine does falls on all of them alike; a ratio is formed within a round and then the median of the rounds is taken.

Called by `peer`, the benchmarks and `trainer`.
"""

import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layered_model.crop import Box
from layered_model.unet import UNetConfig, make_network

Job = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    "Lower quartile."
    high: float
    "Upper quartile."

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def macs(forward: Job) -> int:
    """Multiply-adds of one call, whose tensors may be on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        forward()
    return int(counter.get_total_flops()) // 2


@functools.lru_cache(maxsize=256)
def network_macs(
    config: UNetConfig, num_tokens: int, resolution: int | None = None, crop: Box | None = None
) -> int:
    """Multiply-adds of one pass over one picture.

    Args:
        config: the network's.
        num_tokens: of its text.
        resolution: pass no further up than this.
        crop: compute the layers above the trunk here only.
    """
    layers = [r for r in config.layers if resolution is None or r <= resolution]
    with torch.device("meta"):
        network = make_network(config)
        x = [torch.empty(1, config.picture_channels, r, r) for r in layers]
        text = torch.empty(1, num_tokens, config.text_width)
        mask = torch.ones(1, num_tokens, dtype=torch.bool)
        return macs(lambda: network(x, torch.empty(1), text, mask, crop=crop))


def num_parameters(network: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in network.parameters())


def saved_bytes(network: nn.Module, forward: Job) -> int:
    """Bytes that autograd keeps for the backward pass of one call, without the network's parameters and buffers."""
    own = {
        tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())
    }
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # held, or its address would be used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def rounds(
    jobs: Mapping[str, Job], *, repeats: int, warm_up: int, synchronize: Job
) -> dict[str, list[float]]:
    """Seconds of each job in each round.

    Args:
        jobs: what to time, by name.
        repeats: rounds that count.
        warm_up: rounds before, which do not.
        synchronize: waits until the device has finished.
    """
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warm_up, repeats):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                synchronize()
                began = time.perf_counter()
                jobs[name]()
                synchronize()
                if index >= 0:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours to theirs, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Job, int]:
    """A large square matrix product, which a device does as fast as it can anything, and its multiply-adds."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, side**3


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of that product, at its best of a few; takes about a second."""
    product, size = matrix_product(device, dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken = rounds({"product": product}, repeats=5, warm_up=2, synchronize=synchronize)
    return size / min(taken["product"])


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
