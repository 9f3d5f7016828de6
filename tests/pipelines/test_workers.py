"""What two workers have between them, in two processes."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipelines.losses import LossByNoise
from pipelines.workers import agreed, share_out, share_weights


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(_worker, args=(folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    done: list[int] = []
    torch.manual_seed(rank)
    network = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
    own = network.weight.sum().item()
    share_weights(network)
    found = {
        "agreed": agreed(f"of {rank}"),
        "weights": (own, network.weight.sum().item()),
        "shared_out": share_out([functools.partial(_task, number, done) for number in range(5)]),
        "done": done,
        "failed": _failure(),
        "losses": _losses(rank),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _task(number: int, done: list[int]) -> int:
    done.append(number)
    return 10 * number


def _failure() -> str:
    def read(name: str) -> str:
        if name == "c":  # which rank 1 has
            raise FileNotFoundError(f"{name} is away")
        return name

    try:
        return repr(share_out([functools.partial(read, name) for name in "abdc"]))
    except OSError as error:
        return str(error)


def _losses(rank: int) -> dict[str, float]:
    losses = LossByNoise((8,))
    if rank == 0:
        losses.add(torch.tensor([3.0]), torch.tensor([[2.0]]))
    else:
        losses.add(torch.tensor([3.0, -5.0]), torch.tensor([[9.0, 1.0]]))
    return losses.take()


def test_all_have_rank_0s_value_and_weights(found) -> None:
    assert [each["agreed"] for each in found] == ["of 0", "of 0"]
    (own, first), (other, second) = (each["weights"] for each in found)
    assert own == first == second != other


def test_each_task_is_done_once_and_rank_0_has_all_in_their_order(found) -> None:
    assert [each["done"] for each in found] == [[0, 2, 4], [1, 3]]
    assert [each["shared_out"] for each in found] == [[0, 10, 20, 30, 40], []]


def test_what_another_worker_could_not_read_rank_0_learns(found) -> None:
    assert [each["failed"] for each in found] == ["c is away", "[]"]


def test_alone_a_worker_does_everything() -> None:
    done: list[int] = []
    assert share_out([functools.partial(_task, n, done) for n in range(3)]) == [0, 10, 20]
    assert done == [0, 1, 2]
    assert share_out([]) == []


def test_losses_add_up(found) -> None:
    expected = {"loss/8": 4.0, "loss/8/logsnr_-5": 1.0, "loss/8/logsnr_3": 5.5}
    for each in found:
        assert each["losses"] == pytest.approx(expected)
