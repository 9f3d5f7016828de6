"""What the workers of data-parallel training have between them, and between the CPU and the device.

Called by `trainer`, in every worker.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from pipelines.loader import Batch

T = TypeVar("T")


def parallel(network: nn.Module, *, static: bool) -> nn.Module:
    """The network on its device; among several workers, wrapped for the exchange of gradients.

    Gradients are exchanged in buckets while the backward pass still runs.

    Args:
        network: the same on all workers.
        static: every step has the same graph, which activation checkpointing asks for. It has not where some parts of a step
            exchange gradients and others do not.
    """
    settings = {"gradient_as_bucket_view": True, "static_graph": static}
    model: nn.Module = ray.train.torch.prepare_model(network, parallel_strategy_kwargs=settings)
    return model


def agreed(value: T) -> T:
    """Rank 0's value, on every worker."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def leaving_nodes() -> list[str]:
    """Ids of nodes of these workers that will be taken away soon, as spot machines are; all workers call it equally often."""
    leaving = ray.train.get_preemption_info()
    return [] if leaving is None else list(leaving.preempted_node_ids)


def on_device(reader: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device, each copied there while the one before it is worked on."""
    if device.type != "cuda":
        yield from reader
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready = None
    for batch in reader:
        with torch.cuda.stream(stream):
            coming = Batch(*(part.pin_memory().to(device, non_blocking=True) for part in batch))
            copied_by = stream.record_event()
        if ready is not None:
            yield _arrived(*ready)
        ready = coming, copied_by


def _arrived(batch: Batch, copied_by: torch.cuda.Event) -> Batch:
    current = torch.cuda.current_stream()
    current.wait_event(copied_by)
    for part in batch:
        part.record_stream(current)
    return batch
