"""Twenty optimizer steps of a small network, against losses that were written down.

A change of the numerics anywhere in network, schedules, noise, loss or averaging moves this curve. Everything is float64 and
every weight is drawn by its name, so neither another processor nor another order of construction does. A change that is meant
to move it prints the new curve here, and says so in its commit.
"""

import math
import zlib

import pytest
import torch

from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.ema import PowerEMA
from layered_model.loss import stratified_times
from layered_model.unet import LayeredUNet

NUM_STEPS, BATCH = 20, 4
GOLDEN = {
    "v, sigmoid, sinc": """
        0.396568667 0.377536128 0.564808906 0.577733734 0.547585340 0.606449217 0.559968098 0.554354515 0.501971261 0.399020180
        0.520989872 0.543294645 0.527822684 0.584787173 0.654055080 0.370266650 0.336956972 0.471829267 0.513188813 0.530055227
        2247.15445""",
    "x0, min_snr, box, interpolated": """
        0.221534831 0.201187840 0.194461777 0.232072099 0.180285222 0.224821994 0.194796283 0.219110078 0.202646477 0.184475768
        0.205880618 0.186082166 0.224187042 0.222946797 0.251588152 0.169367106 0.173800061 0.181890253 0.242345054 0.219537518
        2248.75492""",
}
"""Total loss before each step, and the sum of squares of the averaged weights after the last."""


def weights_by_name(network):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * drawn)


def curve(tiny, **process):
    """What `GOLDEN` holds, as it is now."""
    network = LayeredUNet(tiny()).double()
    weights_by_name(network)
    config = DiffusionConfig(reference_resolution=16, **process)
    diffusion = LayeredDiffusion(config, network.config.resolutions)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    ema = PowerEMA(network, 0.1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pictures = diffusion.pyramid(0.5 * normal(BATCH, 3, 32, 32))[-1]
    text, mask = normal(BATCH, 5, 12), torch.ones(BATCH, 5, dtype=torch.bool)
    found = []
    for _ in range(NUM_STEPS):
        t = stratified_times(0, BATCH, BATCH, generator).double()
        eps = diffusion.noise(lambda r: normal(BATCH, 3, r, r))
        terms = diffusion.loss(network, pictures, eps, t, text, mask)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        ema.update(network)
        found.append(terms.total.item())
    return [*found, math.fsum(w.square().sum().item() for w in ema.weights.values())]


PROCESSES = {
    "v, sigmoid, sinc": {"noise": "sinc", "prediction": "v", "weighting": "sigmoid"},
    "x0, min_snr, box, interpolated": {
        "noise": "box",
        "prediction": "x0",
        "weighting": "min_snr",
        "detail_resolution": 32,
    },
}


@pytest.mark.parametrize("name", PROCESSES)
def test_twenty_steps_cost_what_they_did(tiny, name):
    found = curve(tiny, **PROCESSES[name])
    golden = [float(number) for number in GOLDEN[name].split()]
    assert found == pytest.approx(golden, rel=1e-5), found
