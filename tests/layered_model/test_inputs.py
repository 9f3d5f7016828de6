import pytest
import torch

from layered_model.unet import LayeredUNet, SingleScaleUNet


def changed(batch, index, value):
    return [value if i == index else part for i, part in enumerate(batch)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (0, []), "x holds 0 pictures, must hold 1 to 3"),
        (
            lambda b: (0, [*b[0], b[0][-1]]),
            r"x holds 4 pictures, must .* one for each of \(8, 16, 32\)",
        ),
        (lambda b: (0, b[0][1:]), r"x\[0\] has shape \(2, 3, 16, 16\), must have \(2, 3, 8, 8\)"),
        (lambda b: (0, b[0][::-1]), r"x\[0\] has shape \(2, 3, 32, 32\)"),
        (lambda b: (0, [p[:, :1] for p in b[0]]), r"x\[0\] has shape \(2, 1, 8, 8\)"),
        (
            lambda b: (0, [p[:1] for p in b[0]]),
            r"x\[0\] has shape \(1, 3, 8, 8\), must have \(2, 3",
        ),
        (lambda b: (0, [b[0][0], b[0][1][..., 1:]]), r"x\[1\] has shape \(2, 3, 16, 15\)"),
        (
            lambda b: (0, [p.to(torch.uint8) for p in b[0]]),
            r"x\[0\] is torch.uint8, must be of floating",
        ),
        (
            lambda b: (0, [b[0][0], b[0][1].double()]),
            r"x\[1\] is torch.float64, must be torch.float32 like the weights",
        ),
        (lambda b: (1, b[1][:, None]), r"logsnr has shape \(2, 1\), must have \(2,\)"),
        (lambda b: (1, b[1][0]), r"logsnr has shape \(\), must have \(1,\)"),
        (lambda b: (1, b[1].long()), "logsnr is torch.int64"),
        (lambda b: (2, b[2][..., 1:]), r"text has shape \(2, 5, 11\), must have \(2, 5, 12\)"),
        (lambda b: (2, b[2][:1]), r"text has shape \(1, 5, 12\), must have \(2, 5, 12\)"),
        (lambda b: (2, b[2][0]), r"text has shape \(5, 12\)"),
        (lambda b: (3, b[3].float()), "the mask of text is torch.float32"),
        (lambda b: (3, b[3][:, 1:]), r"the mask of text is torch.bool of shape \(2, 4\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named(change, message, tiny, awake, batch_of):
    network = awake(tiny())
    batch = batch_of(network.config)
    with pytest.raises(ValueError, match=message):
        network(*changed(batch, *change(batch)))


def test_under_autocast_any_floating_point_will_do(tiny, awake, batch_of):
    network = awake(tiny())
    x, logsnr, text, mask = batch_of(network.config)
    half = [picture.bfloat16() for picture in x], logsnr, text.bfloat16(), mask
    with pytest.raises(ValueError, match=r"x\[0\] is torch.bfloat16, must be torch.float32"):
        network(*half)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(output.isfinite().all() for output in network(*half))


def test_weights_in_bfloat16_take_pictures_and_text_in_bfloat16(tiny, awake, batch_of):
    network = awake(tiny())
    x, logsnr, text, mask = batch_of(network.config)
    with torch.no_grad():
        exact = network(x, logsnr, text, mask)
        half = network.bfloat16()([p.bfloat16() for p in x], logsnr, text.bfloat16(), mask)
    for one, other in zip(half, exact, strict=True):
        assert (one - other).square().mean().sqrt() < 0.05 * other.std()


def test_a_single_scale_network_takes_one_picture(tiny, awake, batch_of):
    network = awake(tiny(kind="single_scale"))
    assert isinstance(network, SingleScaleUNet)
    x, *rest = batch_of(network.config)
    with pytest.raises(ValueError, match=r"x holds 2 pictures, must hold 1 to 1: .* \(32,\)"):
        network([*x, *x], *rest)


@pytest.mark.parametrize(
    ("layer_text", "message"),
    [
        (lambda t, m: [None, None], "layer_text holds 2 entries, must hold one for each of 3"),
        (lambda t, m: [(t, m), None, None], "the first None"),
        (lambda t, m: [None, None, (t[:1], m)], r"layer_text\[2\] has shape \(1, 5, 12\)"),
        (lambda t, m: [None, (t, m.long()), None], r"the mask of layer_text\[1\] is torch.int64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_layer_text_that_does_not_fit_is_named(layer_text, message, tiny, awake, batch_of):
    network = awake(tiny())
    assert isinstance(network, LayeredUNet)
    x, logsnr, text, mask = batch_of(network.config)
    with pytest.raises(ValueError, match=message):
        network(x, logsnr, text, mask, layer_text=layer_text(text, mask))
