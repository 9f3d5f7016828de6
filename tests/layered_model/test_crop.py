import pytest
import torch

from layered_model.crop import Box, cut_layers
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion

CROPS = {
    "inside": Box(2, 3, 2, 2),
    "a corner": Box(0, 0, 3, 3),
    "the other corner": Box(5, 4, 3, 4),
    "a border": Box(3, 0, 2, 5),
    "one pixel": Box(4, 4, 1, 1),
    "everything": Box(0, 0, 8, 8),
}
LADDERS = {
    "by two": {},
    "by four": {"resolutions": (8, 32), "blocks": (1, 0, 1, 1)},
    "many blocks": {"resolutions": (8, 16), "channels": (8, 16, 16), "blocks": (3, 1, 1)},
}


@pytest.fixture
def network_of(tiny, awake):
    """Networks in double precision whose upper layers may be cropped."""
    return lambda ladder: awake(tiny(upper_norm="pixel", **ladder)).double()


def doubled(batch):
    x, logsnr, text, mask = batch
    return [picture.double() for picture in x], logsnr.double(), text.double(), mask


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS)
def test_a_crop_holds_what_the_whole_picture_has_there(ladder, crop, network_of, batch_of):
    network = network_of(ladder)
    batch = doubled(batch_of(network.config))
    whole = cut_layers(network(*batch), crop)
    part = network(*batch, crop=crop)
    for one, other in zip(part, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_a_crops_gradients_are_those_of_the_whole_picture_there(crop, network_of, batch_of):
    network = network_of({})
    batch = doubled(batch_of(network.config))

    def gradients(outputs):
        network.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    whole = gradients(cut_layers(network(*batch), crop))
    part = gradients(network(*batch, crop=crop))
    for name, gradient in whole.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(part[name] / scale, gradient / scale, rtol=0, atol=1e-12)


def test_a_crop_leaves_out_what_it_does_not_need(network_of, batch_of):
    network = network_of(
        {"resolutions": (16, 32), "channels": (8, 16), "blocks": (1, 1), "attention": (0,)}
    )
    sides = []
    network.heads[1].register_forward_hook(lambda module, x, y: sides.append(tuple(y.shape[2:])))
    network(*doubled(batch_of(network.config)), crop=Box(6, 0, 4, 4))
    # 8 x 8 pixels; around them 4 for head, upsampling and one block; none on the left, where the border is.
    assert sides == [(16, 12)]


def test_an_early_exit_may_be_cropped(network_of, batch_of):
    network = network_of({})
    x, *rest = doubled(batch_of(network.config))
    crop = CROPS["inside"]
    whole = cut_layers(network(x[:2], *rest), crop)
    for one, other in zip(network(x[:2], *rest, crop=crop), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_group_norm_refuses_crops(tiny, awake, batch_of):
    config = tiny()
    with pytest.raises(ValueError, match=r"crop=.* needs upper_norm='pixel', not 'group'"):
        awake(config)(*batch_of(config), crop=Box(0, 0, 2, 2))


def test_the_single_scale_network_refuses_crops(tiny, awake, batch_of):
    config = tiny(kind="single_scale", upper_norm="pixel")
    with pytest.raises(ValueError, match=r"crop=.* needs kind='layered', not 'single_scale'"):
        awake(config)(*batch_of(config), crop=Box(0, 0, 2, 2))


@pytest.mark.parametrize(
    "crop", [Box(0, 0, 0, 2), Box(-1, 0, 2, 2), Box(7, 0, 2, 2), Box(0, 0, 2, 9)]
)
def test_a_crop_outside_the_picture_is_named(crop, network_of, batch_of):
    network = network_of({})
    with pytest.raises(ValueError, match=r"crop=Box.* must lie within the 8 x 8 pixels"):
        network(*doubled(batch_of(network.config)), crop=crop)


def test_the_loss_of_a_crop_is_the_error_there(network_of, batch_of):
    network = network_of({})
    config = DiffusionConfig(noise="sinc", reference_resolution=8, weighting="flat")
    diffusion = LayeredDiffusion(config, network.config.layers)
    x, _, *text = doubled(batch_of(network.config))
    eps = diffusion.noise(lambda r: torch.randn(2, 3, r, r, dtype=torch.float64))
    x0, t = x[-1].clamp(-1, 1), torch.tensor([0.3, 0.6], dtype=torch.float64)
    everything = diffusion.loss(network, x0, eps, t, *text)
    quarters = [
        diffusion.loss(network, x0, eps, t, *text, crop=Box(top, left, 4, 4)).per_picture
        for top in (0, 4)
        for left in (0, 4)
    ]
    torch.testing.assert_close(torch.stack(quarters).mean(0), everything.per_picture)
    assert torch.equal(quarters[0][0], quarters[3][0])  # the trunk's
    assert not torch.equal(quarters[0][1], quarters[3][1])
