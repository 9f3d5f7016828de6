"""The parts of the network: embeddings, residual block, transformer block, resizing convolutions.

The residual block is that of improved diffusion models (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672): norm, SiLU,
3x3 convolution, twice, modulated in between by scale and shift from the embedding (FiLM). The norm is over groups of channels
and all pixels, or, where a part of the picture must be computable alone, over the channels of each pixel. Blocks end in a
convolution or projection initialised to zero, so each starts as the identity. Called by `unet`.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Projection = TypeVar("Projection", nn.Conv2d, nn.Linear)


def zero_init(module: Projection) -> Projection:
    """Sets weight and bias to zero and returns the module."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at most 32 groups of at least 4 channels each."""
    return nn.GroupNorm(math.gcd(32, max(channels // 4, 1), channels), channels)


class PixelNorm(nn.LayerNorm):
    """Layer norm of each pixel's channels. Unlike group norm it sees nothing of the rest of the picture."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape and memory format."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


Norm = Callable[[int], nn.Module]
"""Makes the norm of a number of channels."""
NORMS: dict[Literal["group", "pixel"], Norm] = {"group": group_norm, "pixel": PixelNorm}


class RowLinear(nn.Linear):
    """A linear layer of one vector a picture. In sampling on the CPU it works on 16 rows at least, see `rows`."""

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """One vector a picture to one of another width."""
        missing = 16 - len(x)
        if missing <= 0 or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return super().forward(F.pad(x, (0, 0, 0, missing)))[: len(x)]


class LogSNREmbedding(nn.Module):
    """Fourier features of the reference logsnr through a two-layer MLP."""

    def __init__(self, width: int, num_features: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(RowLinear(num_features, width), nn.SiLU(), RowLinear(width, width))

    def forward(self, logsnr: Float[Tensor, " b"]) -> Float[Tensor, "b e"]:
        """One embedding a picture."""
        first = cast(nn.Linear, self.mlp[0])
        phase = logsnr[:, None].float() * self.frequencies(first.in_features // 2, logsnr.device)
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1).to(first.weight.dtype))

    @staticmethod
    def frequencies(count: int, device: torch.device) -> Float[Tensor, " {count}"]:
        """Always float32, and no buffer: a phase of 100 in bfloat16 would be anything.

        logsnr spans about [-15, 15]: periods from 2 pi * 16 (slow) down to 2 pi / 8 (fast).
        """
        return torch.logspace(-4, 3, count, base=2.0, dtype=torch.float32, device=device)


class ResidualBlock(nn.Module):
    """``skip(x) + conv(silu(film(norm(conv(silu(norm(x)))))))``."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        embedding_width: int,
        dropout: float = 0.0,
        norm: Norm = group_norm,
    ) -> None:
        super().__init__()
        self.norm_in = norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.film = RowLinear(embedding_width, 2 * channels)
        self.norm_out = norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip: nn.Module = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c2 h w"]:
        """Features and embedding to features of another width."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.film(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head attention of pixels to pixels, or of pixels to text tokens under a mask."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = max(width // head_width, 1)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = zero_init(nn.Linear(width, width))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Queries from x, keys and values from the context, where the mask is true."""
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.key_value(context).chunk(2, dim=-1)
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None, None, :]
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the text, feed-forward; each residual and pre-normed."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, head_width)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_width, head_width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            zero_init(nn.Linear(4 * width, width)),
        )

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"],
    ) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape."""
        pixels = x.flatten(2).transpose(1, 2)
        normed = self.norm_self(pixels)
        pixels = pixels + self.self_attention(normed, normed)
        pixels = pixels + self.cross_attention(self.norm_cross(pixels), context, mask)
        pixels = pixels + self.feed_forward(pixels)
        return pixels.transpose(1, 2).unflatten(2, x.shape[-2:])


class Upsample(nn.Module):
    """Nearest neighbour times two, then a 3x3 convolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Doubles the side."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Head(nn.Module):
    """Norm, SiLU, zero-initialised 3x3 convolution to the picture's channels."""

    def __init__(self, channels: int, picture_channels: int, norm: Norm = group_norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.conv = zero_init(nn.Conv2d(channels, picture_channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p h w"]:
        """Features to what the network predicts."""
        return self.conv(F.silu(self.norm(x)))
