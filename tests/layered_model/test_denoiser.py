"""Guidance and the one picture of all heads, on a network that knows the exact answer (see `conftest.Gaussian`)."""

import pytest
import torch

from layered_model.denoiser import Denoiser, Guidance, dynamic_threshold
from layered_model.resample import downscale, upscale
from layered_model.sampler import sampling_times

# Guidance.

SEEDS = (5, 6, 7, 8)
"""Of an even number, which needs no row more on the CPU."""


def test_guidance_one_runs_once_and_is_the_conditional_model(gaussian, draw):
    network = gaussian()
    one = draw(network, SEEDS, text=0.2, num_steps=6, denoise={"guidance": Guidance(scale=1.0)})
    assert [len(inputs[0]) for inputs in network.calls] == [4] * 6
    assert one[-1].mean() == pytest.approx(0.3, abs=0.02)


def test_guidance_zero_is_the_unconditional_model(gaussian, draw):
    network = gaussian()
    zero = draw(network, text=0.2, num_steps=6, denoise={"guidance": Guidance(scale=0.0)})
    none = draw(network, text=0.0, num_steps=6)
    torch.testing.assert_close(zero[-1], none[-1], rtol=0, atol=1e-5)


def test_guidance_goes_on_from_the_unconditional_through_the_conditional(gaussian, draw):
    # A difference of means alone: guidance w draws with the mean moved w times as far.
    network = gaussian()
    guided = draw(network, text=0.1, denoise={"guidance": Guidance(scale=3.0)})
    assert [len(inputs[0]) for inputs in network.calls] == [6] * 20
    torch.testing.assert_close(guided[-1], draw(network, text=0.3)[-1], rtol=0, atol=1e-5)


def test_outside_the_interval_the_network_runs_once(gaussian, draw):
    network = gaussian()
    guidance = Guidance(scale=3.0, logsnr_interval=(-2.0, 3.0))
    draw(network, SEEDS, num_steps=12, denoise={"guidance": guidance})
    logsnr = network.diffusion.logsnr_ref(sampling_times(network.diffusion, 12))[:-1]
    inside = (logsnr >= -2) & (logsnr <= 3)
    assert 0 < inside.sum() < 12
    rows = [len(inputs[0]) for inputs in network.calls]
    assert rows == [8 if both else 4 for both in inside.tolist()]


def test_an_empty_interval_is_no_guidance(gaussian, draw):
    network = gaussian()
    guidance = Guidance(scale=9.0, logsnr_interval=(90.0, 99.0))
    off = draw(network, text=0.1, denoise={"guidance": guidance})
    assert torch.equal(off[-1], draw(network, text=0.1)[-1])


def test_pictures_of_one_batch_may_be_inside_the_interval_or_outside(gaussian, prompts):
    network = gaussian()
    guidance = Guidance(scale=3.0, logsnr_interval=(-1.0, 1.0))
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    together = Denoiser(network, network.diffusion, *prompts(3, 0.1), guidance)([x_t], t)[0]
    assert [len(inputs[0]) for inputs in network.calls] == [4]
    one = Denoiser(network, network.diffusion, *prompts(1, 0.1), guidance)
    for row in range(3):
        alone = one([x_t[row : row + 1]], t[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", [(3.0, 3.0), (1.0, 4.0), (2.0, 0.0)])
def test_each_layer_can_have_its_own_guidance(scales, gaussian, draw):
    # Every layer has a state of its own, so that its mean alone tells how far it was moved.
    network = gaussian(noise="independent")
    guidance = Guidance(scale=scales)
    guided = draw(network, text=0.1, denoise={"guidance": guidance})
    for layer, scale in enumerate(scales):
        expected = draw(network, text=0.1 * scale)
        torch.testing.assert_close(guided[layer], expected[layer], rtol=0, atol=1e-5)
    early = draw(network, text=0.1, denoise={"guidance": guidance}, resolution=8)
    assert torch.equal(early[0], guided[0])


def test_a_layers_own_prompt_moves_that_layer_alone(gaussian, draw, prompts):
    network = gaussian(noise="independent")
    own = {"layer_prompts": (None, prompts(3, 0.3)[0]), "guidance": Guidance(scale=2.0)}
    low, high = draw(network, text=0.1, denoise=own)
    torch.testing.assert_close(low, draw(network, text=0.2)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(high, draw(network, text=0.6)[1], rtol=0, atol=1e-5)


# One picture of all heads.


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_fused_heads_lie_between_the_top_alone_and_each_layer_on_its_band(
    weight, gaussian, prompts
):
    network = gaussian()
    own = (None, prompts(3, 0.3)[0])  # so that the heads disagree
    x_t, t = torch.randn(3, 3, 16, 16), torch.full((3,), 0.4)

    def estimate(weight):
        return Denoiser(
            network, network.diffusion, *prompts(), Guidance(), own, fuse_weight=weight
        )([x_t], t)[0]

    top, fused = estimate(0.0), estimate(1.0)
    assert (fused - top).abs().max() > 0.1
    torch.testing.assert_close(estimate(weight), top + weight * (fused - top), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        fused - upscale(downscale(fused, 8), 16),
        top - upscale(downscale(top, 8), 16),
        rtol=0,
        atol=1e-5,
    )


def test_only_the_top_of_the_model_is_clamped_to_one(gaussian, draw):
    network = gaussian()
    assert draw(network, text=1.5, num_steps=10)[-1].max() == 1
    (early,) = draw(network, text=3.0, num_steps=10, resolution=8)
    assert early.max() == 1.5
    low, high = draw(gaussian(noise="independent"), text=3.0, num_steps=10)
    assert (low.max(), high.max()) == (1.5, 1)


def test_dynamic_thresholding_scales_what_exceeds_one():
    x0 = torch.linspace(-3, 2, 1001).expand(2, 1, 1, -1).clone()
    x0[1] *= 0.25
    bounded = dynamic_threshold(x0, 0.9)
    bound = torch.quantile(x0[0].abs(), 0.9)
    assert 1 < bound < 3
    torch.testing.assert_close(bounded[0], (x0[0] / bound).clamp(-1, 1))
    assert torch.equal(bounded[1], x0[1])
    torch.testing.assert_close(dynamic_threshold(x0, 1.0)[0], x0[0] / 3)


def test_thresholding_acts_on_the_fused_top_and_lower_pictures_follow(gaussian, draw):
    low, high = draw(gaussian(), text=1.5, denoise={"threshold": 0.9})
    assert high.abs().max() <= 1
    torch.testing.assert_close(low, downscale(high, 8), rtol=0, atol=1e-6)
    clamped = draw(gaussian(), text=1.5)[-1]
    assert high[0].std() > clamped[0].std()  # clamping to 1 leaves nothing but white


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_low_band_of_every_estimate_is_that_of_the_given_picture(threshold, gaussian, draw):
    given = torch.rand(3, 3, 8, 8) * 2 - 1
    estimates = []
    drawn = draw(
        gaussian(),
        on_step=lambda step: estimates.append(step.x0[-1]),
        denoise={"low": given, "threshold": threshold},
    )
    assert len(estimates) == 20
    for estimate in estimates:
        torch.testing.assert_close(downscale(estimate, 8), given, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn[0], given, rtol=0, atol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "guidance=nan must be a finite number"),
        ({"scale": (1.0, float("inf"))}, r"guidance=\(1.0, inf\) must be a finite number"),
        ({"logsnr_interval": (1.0, -1.0)}, r"interval \(1.0, -1.0\) must go from low to high"),
        ({"logsnr_interval": (float("nan"), 1.0)}, "interval .* must go from low to high"),
    ],
)
def test_guidance_must_make_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": Guidance(scale=(1.0,))}, "must hold one scale for each of 2 layers"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0, up to 1"),
        ({"fuse_weight": float("nan")}, "fuse_weight=nan must be from 0 to 1"),
    ],
)
def test_what_a_model_cannot_do_is_named(options, message, gaussian, draw):
    with pytest.raises(ValueError, match=message):
        draw(gaussian(), denoise=options)


def test_a_model_with_a_state_per_layer_has_no_one_picture(gaussian, draw):
    network = gaussian(noise="independent")
    with pytest.raises(ValueError, match="only by a model with shared noise"):
        draw(network, denoise={"low": torch.zeros(3, 3, 8, 8)})
    alone, fused = (draw(network, denoise={"fuse_weight": weight}) for weight in (0.0, 1.0))
    assert torch.equal(alone[-1], fused[-1])
