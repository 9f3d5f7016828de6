"""The layered diffusion model in plain PyTorch.

Importing it needs neither Ray nor transformers. Start at `LayeredPipeline` to draw pictures, at `LayeredUNet` and
`LayeredDiffusion` to read how they come about.
"""

from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.ema import PowerEMA
from layered_model.pipeline import LayeredOutput, LayeredPipeline
from layered_model.shape import UNetConfig
from layered_model.text import TextEncoder
from layered_model.unet import LayeredUNet, SingleScaleUNet, make_network

__all__ = [
    "DiffusionConfig",
    "LayeredDiffusion",
    "LayeredOutput",
    "LayeredPipeline",
    "LayeredUNet",
    "ModelConfig",
    "PowerEMA",
    "SamplingDefaults",
    "SingleScaleUNet",
    "TextEncoder",
    "UNetConfig",
    "make_network",
]
