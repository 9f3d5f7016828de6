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
