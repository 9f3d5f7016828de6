"""What the workers of data-parallel training have between them, and between the CPU and the device.

Called by `trainer`, in every worker.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


def gradients_kept(model: nn.Module, kept: bool) -> AbstractContextManager[None]:
    """Gradients stay on this worker, if so, to be exchanged with those of a later part of the step."""
    return model.no_sync() if kept and isinstance(model, DistributedDataParallel) else nullcontext()


def agreed(value: T) -> T:
    """Rank 0's value, on every worker."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def share_weights(network: nn.Module) -> None:
    """Gives every worker the weights that rank 0's network has; it is of one shape on all, on their devices."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def share_out(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Does tasks, each on one worker: task i on rank i modulo their number.

    Args:
        tasks: the same on all workers. They do not communicate, and what they return can be pickled.

    Returns:
        On rank 0 what all have returned, in the order of the tasks; on the others nothing.

    Raises:
        OSError: what a task of any worker has raised; on rank 0.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own: list[T] | OSError
    try:
        own = [task() for task in tasks[rank::size]]
    except OSError as error:
        own = error
    parts: list[Any] = [own]
    if size > 1:
        parts = [None] * size
        dist.gather_object(own, parts if rank == 0 else None)
    if rank > 0:
        return []
    for part in parts:
        if isinstance(part, OSError):
            raise part
    return [parts[number % size][number // size] for number in range(len(tasks))]


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
