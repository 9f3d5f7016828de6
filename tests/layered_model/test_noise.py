import pytest
import torch

from layered_model.noise import kernel_of, noise_pyramid, white_noise
from layered_model.resample import project

LADDER = (4, 8, 16)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_pictures_share_the_kernel_of_their_noise():
    assert [kernel_of(noise) for noise in ("sinc", "periodic", "box", "independent")] == [
        "sinc",
        "periodic",
        "box",
        "sinc",
    ]


def test_noise_depends_on_its_generator_alone():
    together = white_noise(generators(3, 1, 2), 3, 8)
    for row, seed in enumerate((3, 1, 2)):
        assert torch.equal(white_noise(generators(seed), 3, 8)[0], together[row])


@pytest.mark.parametrize("noise", ["sinc", "periodic", "box"])
def test_shared_noise_is_one_field_at_several_sizes(noise):
    asked = []

    def draw(resolution):
        asked.append(resolution)
        return white_noise(generators(0, 1), 3, resolution)

    pyramid = noise_pyramid(draw, LADDER, noise)
    assert asked == [16]
    top = white_noise(generators(0, 1), 3, 16)
    for eps, resolution in zip(pyramid, LADDER, strict=True):
        assert torch.equal(eps, project(top, resolution, noise))


def test_independent_noise_is_drawn_for_each_layer():
    (generator,) = generators(0)
    pyramid = noise_pyramid(lambda r: white_noise([generator], 3, r), LADDER, "independent")
    same = generators(0)
    for eps, resolution in zip(pyramid, LADDER, strict=True):
        assert torch.equal(eps, white_noise(same, 3, resolution))


@pytest.mark.parametrize("noise", ["sinc", "periodic", "box"])
def test_every_layer_is_white_with_variance_one(noise):
    # Covariance of all layers' pixels, from the response to each pixel of the top.
    def draw(resolution):
        count = resolution**2
        return torch.eye(count, dtype=torch.float64).reshape(count, 1, resolution, resolution)

    for eps in noise_pyramid(draw, LADDER, noise):
        response = eps.flatten(1).T
        identity = torch.eye(len(response), dtype=torch.float64)
        torch.testing.assert_close(response @ response.T, identity, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ladder", [(3, 6, 12, 24, 48), (5, 35), (8,), (12, 18, 30)])
@pytest.mark.parametrize("noise", ["sinc", "periodic"])
def test_any_ladder_has_noise(ladder, noise):
    pyramid = noise_pyramid(lambda r: white_noise(generators(0), 1, r), ladder, noise)
    assert [eps.shape[-1] for eps in pyramid] == list(ladder)


@pytest.mark.parametrize(
    ("ladder", "message"),
    [((), "must rise"), ((16, 8), r"resolutions=\(16, 8\) must rise"), ((8, 8), "must rise")],
)
def test_a_ladder_must_rise(ladder, message):
    with pytest.raises(ValueError, match=message):
        noise_pyramid(lambda r: white_noise(generators(0), 1, r), ladder, "sinc")


@pytest.mark.parametrize("noise", ["sinc", "independent"])
def test_noise_of_another_shape_is_named(noise):
    with pytest.raises(
        ValueError, match=r"draw\(\d+\) returned torch.float32 of shape \(1, 3, 7, 7\)"
    ):
        noise_pyramid(lambda _r: torch.zeros(1, 3, 7, 7), LADDER, noise)


def test_noise_for_nobody_is_refused():
    with pytest.raises(ValueError, match="0 generators"):
        white_noise([], 3, 8)
    with pytest.raises(ValueError, match="resolution=0"):
        white_noise(generators(0), 3, 0)
