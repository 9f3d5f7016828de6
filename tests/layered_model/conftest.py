"""Small networks and an exact one for the tests of `layered_model`."""

from dataclasses import replace

import pytest
import torch

from layered_model.denoiser import Denoiser, Guidance
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.parametrization import target
from layered_model.resample import _dct_matrix
from layered_model.rows import Prompt
from layered_model.sampler import Drawing, Plan, sample
from layered_model.schedules import alpha_sigma
from layered_model.shape import UNetConfig
from layered_model.unet import LayeredUNet, make_network

TINY = {
    "resolutions": (8, 16, 32),
    "channels": (8, 8, 16, 16),
    "blocks": (1, 1, 1, 1),
    "attention": (1, 1),
    "mid_blocks": 1,
    "embedding_width": 16,
    "head_width": 8,
    "text_width": 12,
    "dropout": 0.0,
}


@pytest.fixture(scope="session")
def tiny():
    """Makes small `UNetConfig`s: ``tiny(resolutions=(8, 32))``."""

    def make(**changes):
        return UNetConfig(**{**TINY, **changes})

    return make


@pytest.fixture(scope="session")
def awake():
    """Makes a network in which every parameter counts; a fresh one is zero by construction."""

    def make(config, seed=0):
        network = make_network(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return network

    return make


@pytest.fixture(scope="session")
def batch_of():
    """Random noisy pictures, logsnr, text and mask for a network."""

    def make(config, size=2, seed=0, num_tokens=5):
        generator = torch.Generator().manual_seed(seed)
        x = [torch.randn(size, 3, r, r, generator=generator) for r in config.layers]
        logsnr = 3 * torch.randn(size, generator=generator)
        text = torch.randn(size, num_tokens, config.text_width, generator=generator)
        mask = torch.arange(num_tokens).expand(size, -1) < torch.arange(2, size + 2)[:, None]
        return x, logsnr, text, mask

    return make


class Gaussian(LayeredUNet):
    """A network that knows the exact answer for Gaussian pictures stands in for a trained one; counts its calls.

    Pictures whose DCT coefficients are independent, of mean m_f and deviation s_f, have the same form in every layer: the low
    frequencies, times 1 / k. The exact denoiser is linear, and the probability flow ODE keeps
    (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) constant in each coefficient. So what a sampler should draw from given noise is
    known. Text moves the mean: by ``text[0, 0]`` where there is any; a layer's own text that of the layer.
    """

    def __init__(self, config, diffusion, coloured=False):
        super().__init__(config)
        self.diffusion = diffusion
        self.coloured = coloured
        self.calls = []

    def moments(self, resolution, shift=0.0):
        """Mean and deviation of each DCT coefficient of the layer of a resolution."""
        frequency = torch.arange(resolution, dtype=torch.float64)
        radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
        spread = 0.5 / (1 + radius) if self.coloured else torch.full_like(radius, 0.15)
        ratio = self.config.resolutions[-1] / resolution
        mean = torch.zeros_like(spread)
        mean[0, 0] = resolution * (0.1 + shift)
        return mean, spread / ratio

    def forward(self, x, logsnr, text, text_mask, *, layer_text=None):
        self.calls.append([picture.clone() for picture in x])
        outputs = []
        for layer, picture in enumerate(x):
            alpha, sigma = alpha_sigma(logsnr.double() + self.diffusion.shifts[layer])
            alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
            mean, spread = self.moments(picture.shape[-1])
            own, mask = (layer_text and layer_text[layer]) or (text, text_mask)
            shift = torch.where(mask[:, :1], own[:, 0, :1], 0.0)[..., None, None]
            mean = mean + shift * (mean != 0) * picture.shape[-1]
            c = _dct_matrix(picture.shape[-1])
            x_f = c @ picture.double() @ c.T
            gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
            x0_f = mean + gain * (x_f - alpha * mean)
            x0 = c.T @ x0_f @ c
            eps = (picture - alpha * x0) / sigma
            kind = self.diffusion.config.prediction
            outputs.append(target(kind, x0, eps, alpha, sigma).float())
        return outputs

    def flow(self, x_t, alpha=0.0, sigma=1.0):
        """Where the probability flow ODE carries a layer's state of a given level: noise alone by default."""
        mean, spread = self.moments(x_t.shape[-1])
        c = _dct_matrix(x_t.shape[-1])
        x_f = c @ x_t.double() @ c.T - alpha * mean
        return c.T @ (mean + spread * x_f / (alpha**2 * spread**2 + sigma**2) ** 0.5) @ c


@pytest.fixture(scope="session")
def gaussian(tiny):
    """Makes exact networks: ``gaussian(coloured=True, noise="box")``."""

    def make(coloured=False, **changes):
        config = tiny(resolutions=(8, 16), channels=(8, 8), blocks=(1, 1), attention=(0,))
        process = replace(DiffusionConfig(noise="sinc", reference_resolution=16), **changes)
        return Gaussian(config, LayeredDiffusion(process, config.resolutions), coloured)

    return make


@pytest.fixture(scope="session")
def seeded():
    """Makes one generator per seed, three by default."""

    def make(seeds=(5, 6, 7)):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    return make


@pytest.fixture(scope="session")
def prompts():
    """Makes a prompt of one token of a given value, and the empty one."""

    def make(count=3, value=0.0):
        text, mask = torch.full((count, 1, 12), value), torch.ones(count, 1) > 0
        return Prompt(text, mask), Prompt(torch.zeros_like(text), torch.zeros_like(mask))

    return make


@pytest.fixture(scope="session")
def draw(seeded, prompts):
    """Draws from a `Gaussian`: options of `Plan`, and of the `Denoiser` by ``denoise``."""

    def make(network, seeds=(5, 6, 7), text=0.0, start=None, on_step=None, denoise=None, **options):
        options = {"num_steps": 20, **options}
        denoise = {"guidance": Guidance(), **(denoise or {})}
        denoiser = Denoiser(network, network.diffusion, *prompts(len(seeds), text), **denoise)
        return sample(Drawing(denoiser, seeded(seeds), Plan(**options), start), on_step)

    return make
