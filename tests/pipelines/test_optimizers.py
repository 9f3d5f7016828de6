"""`pipelines.optimizers`: Muon's laws, and that every parameter has exactly one optimizer."""

import copy

import pytest
import torch
from torch import nn

from layered_model.unet import LayeredUNet
from pipelines.optimizers import Muon, kernels, make_optimizers, orthogonal, orthogonal_all


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = u.T @ orthogonal(matrix) @ v.T
    values = in_its_basis.diagonal()
    assert values.min() > 0.5
    assert values.max() < 1.3
    torch.testing.assert_close(in_its_basis, torch.diag(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_on_matrices_it_is_torchs_own_muon(shape) -> None:
    """Which works in bfloat16, hence the tolerance: a tenth of the update."""
    generator = torch.Generator().manual_seed(1)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = [
        Muon([ours], learning_rate=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    before = ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - before).norm()
    assert moved > 0
    assert (ours - theirs).norm() < 0.1 * moved


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_moves_as_the_matrix_of_its_output_channels(memory_format) -> None:
    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(8, 6, 3, 3, generator=generator)
    gradient = torch.randn(8, 6, 3, 3, generator=generator)
    convolution = nn.Parameter(kernel.to(memory_format=memory_format))
    convolution.grad = gradient.to(memory_format=memory_format)
    matrix = nn.Parameter(kernel.flatten(1).clone())
    matrix.grad = gradient.flatten(1)
    for weight in (convolution, matrix):
        Muon([weight], learning_rate=0.1, weight_decay=0.01).step()
    torch.testing.assert_close(convolution.detach().flatten(1), matrix.detach())


def test_an_update_has_the_size_of_adamws() -> None:
    """0.2 for a unit learning rate, whatever the gradient's size, for full-rank matrices."""
    for shape, size in (((64, 64), 1e-6), ((16, 256), 1.0), ((256, 16), 1e6)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = size * torch.randn(shape, generator=torch.Generator().manual_seed(3))
        Muon([weight], learning_rate=1.0, weight_decay=0.0).step()
        assert 0.14 < weight.detach().square().mean().sqrt() < 0.24


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(configure, kind) -> None:
    config = configure(f"train.optimizer={kind}")
    network = LayeredUNet(config.model)
    held = [
        id(p)
        for optimizer in make_optimizers(network, config.train)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(held) == sorted(map(id, network.parameters()))


def test_muon_takes_the_convolutions_between_features(configure) -> None:
    network = LayeredUNet(configure().model)
    taken = {id(p) for p in kernels(network)}
    names = {name for name, p in network.named_parameters() if id(p) in taken}
    assert {"trunk.mid.0.residual.conv_in.weight", "upper.0.ups.0.conv.weight"} <= names
    assert all(network.get_parameter(name).ndim == 4 for name in names)
    left = {n for n, p in network.named_parameters() if p.ndim == 4} - names
    assert left == {
        name
        for name, p in network.named_parameters()
        if p.ndim == 4 and network.config.picture_channels in p.shape[:2]
    }


def test_processes_share_the_work_and_get_the_same(tmp_path) -> None:
    torch.multiprocessing.spawn(_in_a_process, args=(tmp_path,), nprocs=2)
    expected = [orthogonal(matrix) for matrix in _matrices()]
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def _matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in ((8, 4), (6, 30), (5, 5))]


def _in_a_process(rank: int, folder) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(orthogonal_all(_matrices()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_saved_state_goes_on_bit_for_bit(configure) -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))
    train = configure("train.optimizer=muon").train
    generator = torch.Generator().manual_seed(4)
    gradients = [
        [torch.randn(p.shape, generator=generator) for p in network.parameters()] for _ in range(4)
    ]

    def run(network: nn.Module, optimizers: list, steps: list) -> None:
        for step in steps:
            for p, gradient in zip(network.parameters(), step, strict=True):
                p.grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()

    optimizers = make_optimizers(network, train)
    run(network, optimizers, gradients[:2])
    copied = copy.deepcopy(network)
    loaded = make_optimizers(copied, train)
    for new, old in zip(loaded, optimizers, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(network, optimizers, gradients[2:])
    run(copied, loaded, gradients[2:])
    for ours, theirs in zip(network.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
