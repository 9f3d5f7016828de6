"""The single-scale network, and its cost against the layered one."""

import math

import pytest
import torch

from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.unet import LayeredUNet, SingleScaleUNet, make_network


@pytest.fixture
def single(tiny):
    return tiny(kind="single_scale")


def test_make_network_makes_the_kind_asked_for(tiny, single):
    assert isinstance(make_network(tiny()), LayeredUNet)
    assert isinstance(make_network(single), SingleScaleUNet)
    with pytest.raises(ValueError, match=r"kind='layered' must be 'single_scale' here"):
        SingleScaleUNet(tiny())
    with pytest.raises(ValueError, match=r"kind='single_scale' must be 'layered' here"):
        LayeredUNet(single)


def test_the_top_alone_goes_in_and_out(single, awake, batch_of):
    assert single.layers == (32,)
    x, *rest = batch_of(single)
    (output,) = awake(single)(x, *rest)
    assert output.shape == x[0].shape == (2, 3, 32, 32)
    assert output.std() > 0.01


def test_of_one_resolution_both_kinds_cost_the_same(tiny):
    shape = {"resolutions": (32,), "channels": (8, 16), "blocks": (1, 1)}
    one, other = (make_network(tiny(kind=kind, **shape)) for kind in ("layered", "single_scale"))
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())


def test_the_trunk_and_the_decoders_are_those_of_the_layered_network(tiny, single):
    layered, other = make_network(tiny()).state_dict(), make_network(single).state_dict()

    def shapes(weights, part):
        return {k: w.shape for k, w in weights.items() if k.startswith(part) and ".input." not in k}

    assert shapes(layered, "trunk.") == shapes(other, "trunk.")
    assert shapes(layered, "text.") == shapes(other, "text.")
    assert shapes(layered, "upper.") == shapes(other, "upper.")


def test_every_block_of_the_way_down_is_a_skip_of_one_on_the_way_up(tiny):
    network = make_network(tiny(kind="single_scale", blocks=(2, 3, 1, 1)))
    for level, channels, num_blocks in ((0, 8, 3), (1, 8, 2)):
        (stages,) = network.upper[level].stages
        assert [stage.conv_in.in_channels for stage in stages] == [2 * channels] * num_blocks
    assert [len(level.stages) for level in network.encoder] == [2, 3]


def test_the_top_reaches_the_trunk(single, awake, batch_of):
    network = awake(single)
    x, *rest = batch_of(single)
    seen = []
    network.trunk.register_forward_hook(lambda *args: seen.append(args[2]))
    network(x, *rest)
    network([torch.flip(x[0], (3,))], *rest)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_every_parameter_learns(single, batch_of):
    torch.manual_seed(0)
    network = make_network(single)
    x, *rest = batch_of(single)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(x, *rest)[0] - x[0]).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    assert [n for n, p in network.named_parameters() if not p.grad.abs().max() > 0] == []


def test_it_is_a_diffusion_of_one_layer(single, awake, batch_of):
    diffusion = LayeredDiffusion(
        DiffusionConfig(noise="sinc", reference_resolution=16), single.layers
    )
    assert diffusion.shifts == pytest.approx((2 * math.log(16 / 32),))
    x, _, *text = batch_of(single)
    eps = diffusion.noise(lambda r: torch.randn(2, 3, r, r))
    terms = diffusion.loss(awake(single), x[0].clamp(-1, 1), eps, torch.tensor([0.3, 0.7]), *text)
    assert terms.per_layer.shape == (1,)
    assert terms.total.isfinite()
