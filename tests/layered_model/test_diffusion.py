from dataclasses import replace

import pytest
import torch
from torch import nn

from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.loss import v_weight
from layered_model.noise import white_noise
from layered_model.parametrization import target
from layered_model.resample import downscale, upscale
from layered_model.schedules import relative_slope

LADDER = (8, 16, 64)
TIMES = torch.tensor([0.0, 1e-4, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1 - 1e-4, 1.0])
CONFIG = DiffusionConfig(noise="sinc", reference_resolution=16)
each_kernel = pytest.mark.parametrize("noise", ["sinc", "periodic", "box"])


def example(diffusion, dtype=torch.float64, seed=0):
    """Clean picture at the top, noise of every layer, one row a time."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(TIMES))]
    x0 = white_noise(generators, 3, diffusion.resolutions[-1]).to(dtype).mul(0.5)
    eps = diffusion.noise(lambda r: white_noise(generators, 3, r).to(dtype))
    return x0, eps, TIMES.to(dtype)


def noised(diffusion, pictures, eps, t):
    """x_t of every layer, as the definition says."""
    inputs = []
    for layer, (x0, e) in enumerate(zip(pictures, eps, strict=True)):
        alpha, sigma = diffusion.alpha_sigma(t, layer)
        inputs.append(alpha * x0 + sigma * e)
    return inputs


def from_top(diffusion, x_t, t):
    """c_t D x_t of every layer, with the constants written out."""
    top = len(diffusion.resolutions) - 1
    return [
        diffusion.alpha_sigma(t, layer)[0]
        / diffusion.alpha_sigma(t, top)[0]
        * downscale(x_t, resolution, diffusion.kernel)
        for layer, resolution in enumerate(diffusion.resolutions)
    ]


# The pyramid is one diffusion.


@each_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("reference", [8, 16, 100])
@pytest.mark.parametrize("extra", [(), (1.5, 1.5, 1.5)])
@pytest.mark.parametrize("detail", [None, 100, 512])
def test_a_low_layer_is_the_rescaled_top(noise, dtype, tolerance, reference, extra, detail):
    config = replace(
        CONFIG,
        noise=noise,
        reference_resolution=reference,
        extra_logsnr=extra,
        detail_resolution=detail,
    )
    diffusion = LayeredDiffusion(config, LADDER)
    assert diffusion.one_state
    x0, eps, t = example(diffusion, dtype)
    inputs = noised(diffusion, diffusion.pyramid(x0), eps, t)
    for expected in (
        from_top(diffusion, inputs[-1], t),
        diffusion.inputs_from_top(inputs[-1], diffusion.levels(t)),
    ):
        for one, other in zip(inputs, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "independent"},
        {"extra_logsnr": (0.0, 0.0, 1.0), "allow_leak": True},
        {"noise": "independent", "extra_logsnr": (0.0, 0.0, 1.0)},
    ],
)
def test_otherwise_every_layer_needs_its_own_state(changes):
    diffusion = LayeredDiffusion(replace(CONFIG, **changes), LADDER)
    assert not diffusion.one_state
    x0, eps, t = example(diffusion)
    inputs = noised(diffusion, diffusion.pyramid(x0), eps, t)
    gap = (inputs[0] - from_top(diffusion, inputs[-1], t)[0]).abs().amax(dim=(1, 2, 3))
    assert (gap[3:8] > 0.1).all()


@pytest.mark.parametrize("detail", [None, 64])
def test_layers_differ_by_a_constant_up_to_both_ends(detail):
    diffusion = LayeredDiffusion(replace(CONFIG, detail_resolution=detail), LADDER)
    t = TIMES.double()
    logsnr = []
    for layer in range(3):
        alpha, sigma = diffusion.alpha_sigma(t, layer)
        logsnr.append(2 * (alpha / sigma).log().flatten())
    for low, high, ratio in ((0, 1, 2), (1, 2, 4)):
        shift = torch.full_like(t, 2 * torch.tensor(ratio, dtype=torch.float64).log())
        torch.testing.assert_close(logsnr[low] - logsnr[high], shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(logsnr[1], diffusion.logsnr_ref(t), rtol=0, atol=1e-9)


def test_the_interpolated_schedule_has_the_detail_resolutions_shift_at_the_start():
    bent = LayeredDiffusion(replace(CONFIG, detail_resolution=64), LADDER)
    plain = LayeredDiffusion(CONFIG, LADDER)
    moved = LayeredDiffusion(replace(CONFIG, reference_resolution=64), LADDER)
    for t, other in ((1e-2, moved), (1 - 1e-2, plain)):
        t = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = bent.alpha_sigma(t, 2)
        alpha_other, sigma_other = other.alpha_sigma(t, 2)
        gap = 2 * ((alpha / sigma).log() - (alpha_other / sigma_other).log())
        assert gap.abs().item() == pytest.approx(1e-2 * bent.bend, rel=1e-6)
    logsnr = bent.logsnr_ref(TIMES.double()[2:-2])
    torch.testing.assert_close(bent.time_of(logsnr), TIMES.double()[2:-2], rtol=1e-9, atol=0)


# Shared noise forbids everything else.


def determinant(diffusion, t, low, high):
    """Of the two equations in the clean low picture and its noise, and what solves them."""
    ratio = diffusion.resolutions[high] / diffusion.resolutions[low]
    a_lo, s_lo = diffusion.alpha_sigma(t, low)
    a_hi, s_hi = diffusion.alpha_sigma(t, high)
    return a_hi * s_lo - a_lo * s_hi / ratio, s_lo, s_hi / ratio


@each_kernel
def test_unequal_extra_shifts_leak_the_clean_low_picture(noise):
    leaky = replace(CONFIG, noise=noise, extra_logsnr=(0.0, -0.7, 0.0), allow_leak=True)
    diffusion = LayeredDiffusion(leaky, LADDER)
    x0, eps, t = example(diffusion)
    inputs = noised(diffusion, diffusion.pyramid(x0), eps, t)
    det, s_lo, s_hi = determinant(diffusion, t, 0, 1)
    stolen = (s_lo * downscale(inputs[1], 8, noise) - s_hi * inputs[0]) / det
    torch.testing.assert_close(stolen, diffusion.pyramid(x0)[0], rtol=0, atol=1e-6)


def test_without_extra_shifts_there_is_nothing_to_solve():
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    assert determinant(diffusion, TIMES.double(), 0, 2)[0].abs().max() < 1e-15


def test_another_kernel_for_pictures_than_for_noise_leaks():
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    x0, eps, t = example(diffusion)
    boxes = [downscale(x0, resolution, "box") for resolution in LADDER]
    inputs = noised(diffusion, boxes, eps, t)
    difference = inputs[0] - from_top(diffusion, inputs[-1], t)[0]
    without_noise = diffusion.alpha_sigma(t, 0)[0] * (boxes[0] - downscale(x0, 8, "sinc"))
    torch.testing.assert_close(difference, without_noise, rtol=0, atol=1e-9)


def test_pictures_of_another_kernel_are_what_was_asked_for_and_the_noise_stays():
    mixed = LayeredDiffusion(replace(CONFIG, picture_kernel="box", allow_leak=True), LADDER)
    x0, eps, t = example(mixed)
    for resolution, x in zip(LADDER, mixed.pyramid(x0), strict=True):
        assert torch.equal(x, downscale(x0, resolution, "box"))
    _, plain, _ = example(LayeredDiffusion(CONFIG, LADDER))
    assert all(torch.equal(one, other) for one, other in zip(eps, plain, strict=True))
    # So every layer has a state of its own, for a low one is not the top's.
    assert not mixed.one_state
    top = noised(mixed, mixed.pyramid(x0), eps, t)
    assert not torch.allclose(top[0], from_top(mixed, top[-1], t)[0], atol=1e-2)


@pytest.mark.parametrize("noise", ["sinc", "periodic", "box"])
@pytest.mark.parametrize("pictures", ["sinc", "periodic", "box"])
def test_another_kernel_for_pictures_must_be_allowed(noise, pictures):
    config = {"noise": noise, "reference_resolution": 8, "picture_kernel": pictures}
    if noise == pictures:
        assert LayeredDiffusion(DiffusionConfig(**config), LADDER).one_state
        return
    with pytest.raises(ValueError, match=f"picture_kernel='{pictures}' must be that of the noise"):
        DiffusionConfig(**config)
    assert not LayeredDiffusion(DiffusionConfig(**config, allow_leak=True), LADDER).one_state


@pytest.mark.parametrize("pictures", [None, "sinc", "box"])
def test_independent_noise_leaks_with_no_kernel(pictures):
    config = DiffusionConfig(noise="independent", reference_resolution=8, picture_kernel=pictures)
    assert config.matched
    assert config.kernel == (pictures or "sinc")


def test_larger_pictures_are_trained_on_as_their_downscaled_selves():
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    x0, eps, t = example(diffusion)
    large = upscale(x0, 128)
    for one, other in zip(diffusion.pyramid(large), diffusion.pyramid(x0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    network = Answers([torch.zeros_like(x) for x in diffusion.pyramid(x0)])
    costs = [diffusion.loss(network, x, eps, t, *TEXT).total for x in (x0, large)]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-9, atol=0)


def test_a_picture_between_two_resolutions_has_no_pyramid():
    with pytest.raises(ValueError, match=r"pictures of 32 pixels must have one of \(8, 16, 64\)"):
        LayeredDiffusion(CONFIG, LADDER).pyramid(torch.zeros(1, 3, 32, 32))


@each_kernel
def test_a_leak_must_be_allowed(noise):
    with pytest.raises(ValueError, match=r"extra_logsnr=\(0.0, 1.0\).*allow_leak"):
        DiffusionConfig(noise=noise, reference_resolution=8, extra_logsnr=(0.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_resolution": 0}, "reference_resolution=0 must be positive"),
        ({"logsnr_min": 15.0}, "logsnr_min=15.0 must be below 15.0"),
        ({"logsnr_max": float("inf")}, "logsnr_min=-15.0 must be below inf, both finite"),
        ({"logsnr_min": float("nan")}, "logsnr_min=nan must be below 15.0"),
        ({"logsnr_min": -31.0}, "logsnr_min=-31.0 must be at least -30: below that float32"),
        (
            {"logsnr_min": -26.0, "detail_resolution": 256},
            "logsnr_min=-26.0 must be at least -24.4548",
        ),
        ({"detail_resolution": 8}, "detail_resolution=8 must be at least reference_resolution=16"),
        ({"extra_logsnr": (float("nan"),) * 3}, r"extra_logsnr=\(nan, nan, nan\) must hold finite"),
        ({"layer_weights": (1.0, float("inf"), 1.0)}, "layer_weights=.* must hold finite numbers"),
        ({"layer_weights": (1.0, -1.0, 1.0)}, r"layer_weights=\(1.0, -1.0, 1.0\)"),
        ({"layer_weights": (0.0, 0.0, 0.0)}, r"layer_weights=\(0.0, 0.0, 0.0\)"),
        ({"picture_kernel": "pink"}, "picture_kernel='pink' must be one of sinc, periodic, box"),
        ({"noise": "pink"}, "noise='pink' must be one of sinc, periodic, box, independent"),
        ({"prediction": "pink"}, "prediction='pink' must be one of v, x0, eps"),
        ({"weighting": "pink"}, "weighting='pink' must be one of flat, min_snr, sigmoid"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_process_names_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("name", ["extra_logsnr", "layer_weights"])
def test_values_of_layers_must_match_the_ladder(name):
    with pytest.raises(ValueError, match=rf"{name}=\(1.0, 1.0\) must hold one value for each"):
        LayeredDiffusion(replace(CONFIG, **{name: (1.0, 1.0)}), LADDER)


# Fusing.


@each_kernel
def test_fusing_a_pyramid_gives_its_picture(noise):
    diffusion = LayeredDiffusion(replace(CONFIG, noise=noise), LADDER)
    x0, *_ = example(diffusion)
    torch.testing.assert_close(diffusion.fuse(diffusion.pyramid(x0)), x0, rtol=0, atol=1e-12)


@each_kernel
def test_each_layer_has_the_last_word_on_its_band(noise):
    diffusion = LayeredDiffusion(replace(CONFIG, noise=noise), LADDER)
    estimates = [torch.randn(2, 3, r, r, dtype=torch.float64) for r in LADDER]
    fused = diffusion.pyramid(diffusion.fuse(estimates))
    torch.testing.assert_close(fused[0], estimates[0], rtol=0, atol=1e-12)
    for layer in (1, 2):
        low = LADDER[layer - 1]
        change = fused[layer] - estimates[layer]
        lower_band = upscale(downscale(change, low, noise), LADDER[layer], noise)
        torch.testing.assert_close(change, lower_band, rtol=0, atol=1e-12)


def test_layers_up_to_a_resolution():
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    assert diffusion.layers_up_to(None) == (0, 1, 2)
    assert diffusion.layers_up_to(16) == (0, 1)
    with pytest.raises(ValueError, match=r"resolution=32 must be one of \(8, 16, 64\)"):
        diffusion.layers_up_to(32)


# The loss.


class Answers(nn.Module):
    """Returns what it was given, and remembers what it was asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, logsnr, text, text_mask):
        self.x, self.logsnr = x, logsnr
        return self.outputs


TEXT = torch.zeros(len(TIMES), 1, 4), torch.zeros(len(TIMES), 1, dtype=torch.bool)


def loss(diffusion, outputs_of):
    """The loss of a network with the answers ``outputs_of(layer, x0, eps, alpha, sigma)``."""
    x0, eps, t = example(diffusion)
    t = t.clamp(0.05, 0.95)
    outputs = [
        outputs_of(layer, x, e, *diffusion.alpha_sigma(t, layer))
        for layer, (x, e) in enumerate(zip(diffusion.pyramid(x0), eps, strict=True))
    ]
    network = Answers([output.double() for output in outputs])
    return diffusion.loss(network, x0, eps, t, *TEXT), network, (x0, eps, t)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
@pytest.mark.parametrize("noise", ["sinc", "box", "independent"])
def test_the_true_answer_costs_nothing(prediction, noise):
    diffusion = LayeredDiffusion(replace(CONFIG, prediction=prediction, noise=noise), LADDER)
    terms, *_ = loss(diffusion, lambda _layer, *parts: target(prediction, *parts))
    assert terms.total < 1e-10
    assert terms.per_layer.max() < 1e-10


@pytest.mark.parametrize("weighting", ["flat", "min_snr", "sigmoid"])
def test_the_same_estimate_costs_the_same_in_every_prediction(weighting):
    totals = []
    for prediction in ("v", "x0", "eps"):
        config = replace(CONFIG, prediction=prediction, weighting=weighting)

        def wrong(layer, x0, eps, alpha, sigma, prediction=prediction):
            x0_hat = 0.9 * x0 + 0.1 * (layer + 1)
            eps_hat = (alpha * x0 + sigma * eps - alpha * x0_hat) / sigma
            return target(prediction, x0_hat, eps_hat, alpha, sigma)

        totals.append(loss(LayeredDiffusion(config, LADDER), wrong)[0].total)
    assert totals[0] > 1e-3
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(totals[2], totals[0], rtol=1e-5, atol=0)


def test_the_loss_is_the_weighted_mean_over_layers_and_pictures():
    weights = (1.0, 0.0, 3.0)
    diffusion = LayeredDiffusion(replace(CONFIG, layer_weights=weights), LADDER)
    terms, _, (x0, eps, t) = loss(diffusion, lambda _layer, x, *_: torch.zeros_like(x))
    expected = torch.zeros((), dtype=torch.float64)
    for layer, x in enumerate(diffusion.pyramid(x0)):
        v = target("v", x, eps[layer], *diffusion.alpha_sigma(t, layer))
        error = v.square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(terms.per_layer[layer], error.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.per_picture[layer], error, rtol=1e-6, atol=0)
        logsnr = diffusion.logsnr_ref(t) + diffusion.shifts[layer]
        weight = v_weight("sigmoid", logsnr, relative_slope(t, diffusion.inside), LADDER[layer])
        expected += weights[layer] / sum(weights) * (weight * error).mean()
    torch.testing.assert_close(terms.total, expected, rtol=1e-6, atol=0)


def test_the_network_is_told_the_noisy_pictures_and_the_reference_logsnr():
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    _, network, (x0, eps, t) = loss(diffusion, lambda _layer, x, *_: torch.zeros_like(x))
    for one, other in zip(network.x, noised(diffusion, diffusion.pyramid(x0), eps, t), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(network.logsnr, diffusion.logsnr_ref(t))


def with_nan(tensor):
    spoilt = tensor.clone()
    spoilt.view(-1)[-1] = float("nan")
    return spoilt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x0": lambda x0: x0[..., :32, :32]},
            r"x0 has shape \(11, 3, 32, 32\).* \[b, c, 64, 64\]",
        ),
        ({"x0": lambda x0: x0[0]}, r"x0 has shape \(3, 64, 64\)"),
        ({"x0": lambda x0: x0.mul(255).byte()}, "x0 has dtype torch.uint8; .* floating point"),
        ({"x0": with_nan}, "x0 holds NaN or infinite values"),
        ({"eps": lambda eps: eps[:2]}, r"eps has shapes .*; they must be \[\(11, 3, 8, 8\)"),
        ({"eps": lambda eps: eps[::-1]}, "eps has shapes .*; they must be"),
        ({"eps": lambda eps: [eps[0], with_nan(eps[1]), eps[2]]}, r"eps\[1\] holds NaN"),
        ({"t": lambda t: t[:-1]}, r"t has shape \(10,\); it must be \[11\]"),
        ({"t": lambda t: t[:, None]}, r"t has shape \(11, 1\)"),
        ({"t": with_nan}, "t holds nan, but times lie in"),
        ({"t": lambda t: t + 1}, "but times lie in"),
        ({"text": lambda text: text[0]}, r"text has shape \(1, 4\); it must be \[11, n, d\]"),
        ({"text": with_nan}, "text holds NaN"),
        ({"text_mask": lambda mask: mask.float()}, "text_mask is torch.float32"),
        ({"text_mask": lambda mask: mask[:-1]}, r"text_mask is torch.bool of shape \(10, 1\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_batch_that_does_not_fit_is_named(changes, message):
    diffusion = LayeredDiffusion(CONFIG, LADDER)
    x0, eps, t = example(diffusion, torch.float32)
    batch = {"x0": x0, "eps": eps, "t": t, "text": TEXT[0], "text_mask": TEXT[1]}
    for name, change in changes.items():
        batch[name] = change(batch[name])
    with pytest.raises(ValueError, match=message):
        diffusion.loss(Answers(eps), **batch)


@pytest.mark.compile
def test_the_loss_compiles_into_one_graph():
    diffusion = LayeredDiffusion(replace(CONFIG, detail_resolution=64), LADDER)
    x0, eps, t = example(diffusion, torch.float32)

    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x, logsnr, text, text_mask):
            return [scale * picture for scale, picture in zip(self.scale, x, strict=True)]

    network = Scales()
    compiled = torch.compile(diffusion.loss, fullgraph=True, backend="aot_eager")
    ours = compiled(network, x0, eps, t, *TEXT)
    plain = diffusion.loss(network, x0, eps, t, *TEXT)
    torch.testing.assert_close(ours.total, plain.total)
    torch.testing.assert_close(ours.per_picture, plain.per_picture)
    ours.total.backward()
    assert network.scale.grad.isfinite().all()
