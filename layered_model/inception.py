"""The Inception network of FID: the graph of December 2015 that TensorFlow's authors published, in plain PyTorch.

FID (Heusel et al., 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
https://arxiv.org/abs/1706.08500) and Inception score (Salimans et al., 2016, https://arxiv.org/abs/1606.03498) are made with
this network and no other. It is Inception v3 (Szegedy et al., 2015, https://arxiv.org/abs/1512.00567) with habits of its own:

* 1008 classes, the last linear map of which the score uses without its bias;
* average pooling does not count the padding;
* the last block pools by maximum where all others pool by average.

Its weights went from TensorFlow to a file that pytorch-fid and torch-fidelity share, `WEIGHTS_URL`: a plain state dict with
torchvision's names, which are those of the modules here. What a number means depends on the resize to 299 pixels too, so there
are three, each that of a tool in use: `tensorflow_input`, `pytorch_input` and `clean_input`.

`load` makes an extractor; called by `features`.
"""

import functools
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layered_model.extractor import FID_WEIGHTS, FeatureExtractor

WEIGHTS_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FID_WEIGHTS}.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIM, NUM_CLASSES, SIDE = 2048, 1008, 299
CHUNK = 8
"""Pictures that a CPU does at once: of 1, 8, 16 and 32 the fastest, because what a layer leaves stays in the cache."""

Pool = Literal["average", "maximum", "halving maximum"]
Kernel = int | tuple[int, int]


class Conv(NamedTuple):
    """One convolution of a block; of stride 1 it keeps the size, of stride 2 it has no padding."""

    name: str
    width: int
    "Channels it gives."
    kernel: Kernel
    stride: int = 1


Step = Pool | Conv | tuple[Conv, Conv]
"""What a branch does next; two convolutions stand side by side, and their outputs are concatenated."""
Branches = tuple[tuple[Step, ...], ...]


def _block_35(pooled: int) -> Branches:
    """Branches of a block of 35 x 35 cells; `pooled` channels come from the pooling one."""
    return (
        (Conv("branch1x1", 64, 1),),
        (Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)),
        (
            Conv("branch3x3dbl_1", 64, 1),
            Conv("branch3x3dbl_2", 96, 3),
            Conv("branch3x3dbl_3", 96, 3),
        ),
        ("average", Conv("branch_pool", pooled, 1)),
    )


def _block_17(inner: int) -> Branches:
    """Branches of a block of 17 x 17 cells, with `inner` channels between the factors of a 7 x 7 convolution."""
    return (
        (Conv("branch1x1", 192, 1),),
        (
            Conv("branch7x7_1", inner, 1),
            Conv("branch7x7_2", inner, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", inner, 1),
            Conv("branch7x7dbl_2", inner, (7, 1)),
            Conv("branch7x7dbl_3", inner, (1, 7)),
            Conv("branch7x7dbl_4", inner, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", Conv("branch_pool", 192, 1)),
    )


def _block_8(pool: Pool) -> Branches:
    """Branches of a block of 8 x 8 cells."""
    return (
        (Conv("branch1x1", 320, 1),),
        (
            Conv("branch3x3_1", 384, 1),
            (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ),
        (
            Conv("branch3x3dbl_1", 448, 1),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Conv("branch_pool", 192, 1)),
    )


_TO_17: Branches = (
    (Conv("branch3x3", 384, 3, 2),),
    (
        Conv("branch3x3dbl_1", 64, 1),
        Conv("branch3x3dbl_2", 96, 3),
        Conv("branch3x3dbl_3", 96, 3, 2),
    ),
    ("halving maximum",),
)
_TO_8: Branches = (
    (Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, 2)),
    (
        Conv("branch7x7x3_1", 192, 1),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, 3, 2),
    ),
    ("halving maximum",),
)
_BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("maximum"),
}


class _ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, width_in: int, width: int, kernel: Kernel, stride: int, padding: Kernel):
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return F.relu_(self.bn(self.conv(x)))

    def fold(self) -> None:
        """Fold the batch norm's constants into the convolution: the same function in one pass over memory."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


def _pool(kind: Pool, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    if kind == "average":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 1, 1) if kind == "maximum" else F.max_pool2d(x, 3, 2)


class _Mixed(nn.Module):
    """Branches side by side, concatenated along the channels."""

    def __init__(self, width_in: int, branches: Branches):
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = width_in
            for step in branch:
                convs = _convs(step)
                for conv in convs:
                    self.add_module(conv.name, self._make(width, conv))
                width = sum(conv.width for conv in convs) or width
            self.width += width

    @staticmethod
    def _make(width_in: int, conv: Conv) -> _ConvNorm:
        high, wide = (conv.kernel,) * 2 if isinstance(conv.kernel, int) else conv.kernel
        padding = (high // 2, wide // 2) if conv.stride == 1 else 0
        return _ConvNorm(width_in, conv.width, conv.kernel, conv.stride, padding)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                if isinstance(step, str):
                    y = _pool(step, y)
                else:
                    parts = [self.get_submodule(conv.name)(y) for conv in _convs(step)]
                    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _convs(step: Step) -> tuple[Conv, ...]:
    """Convolutions of a step; pooling has none."""
    if isinstance(step, str):
        return ()
    return (step,) if isinstance(step, Conv) else step


class Inception(nn.Module):
    """The network: pictures of 299 x 299 pixels, scaled to about [-1, 1], to (pooled features [b, 2048], logits [b, 1008])."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": _ConvNorm(3, 32, 3, 2, 0),
            "Conv2d_2a_3x3": _ConvNorm(32, 32, 3, 1, 0),
            "Conv2d_2b_3x3": _ConvNorm(32, 64, 3, 1, 1),
            "maxpool1": nn.MaxPool2d(3, 2),
            "Conv2d_3b_1x1": _ConvNorm(64, 80, 1, 1, 0),
            "Conv2d_4a_3x3": _ConvNorm(80, 192, 3, 1, 0),
            "maxpool2": nn.MaxPool2d(3, 2),
        }
        width = 192
        for name, branches in _BLOCKS.items():
            layers[name] = block = _Mixed(width, branches)
            width = block.width
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.layers = tuple(layers)
        self.fc = nn.Linear(DIM, NUM_CLASSES)

    def forward(
        self, x: Float[Tensor, "b 3 299 299"]
    ) -> tuple[Float[Tensor, "b 2048"], Float[Tensor, "b 1008"]]:
        """Return the pooled features and the logits without the bias, as the Inception score has them."""
        for name in self.layers:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T

    @classmethod
    def from_checkpoint(cls, content: bytes) -> "Inception":
        """Return the network with the weights of a file in the common format, for inference.

        Raises:
            ValueError: the content is not a state dict of this network.
        """
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"no file that torch.load reads: {reason}") from error
        if not isinstance(state, dict):
            raise ValueError(f"no plain state dict, but a {type(state).__name__}")
        with torch.device("meta"):
            network = cls()
        own = network.state_dict()
        # What training counts in a batch norm is in some files and not in others.
        counters = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")}
        shapes = {key: value.shape for key, value in own.items() if key not in counters}
        found = {
            key: getattr(value, "shape", None)
            for key, value in state.items()
            if key not in counters
        }
        if found != shapes:
            odd = sorted(key for key in {*shapes, *found} if shapes.get(key) != found.get(key))
            raise ValueError(
                f"no state dict of the FID Inception network: {len(odd)} tensors differ in name or shape, "
                f"the first is {odd[0]!r}"
            )
        network.load_state_dict(state | counters, assign=True)
        network.eval().requires_grad_(False).double()
        for module in list(network.modules()):
            if isinstance(module, _ConvNorm):
                module.fold()
        return network.to(torch.float32)


def load(
    name: str, device: torch.device, weights: str | Path | bytes | None, sha256: str | None
) -> FeatureExtractor:
    """Return the extractor with one of the three resizes.

    Args:
        name: one of `PREPROCESS`.
        device: where it computes.
        weights: path of the file or its content; None for the published one, downloaded once into torch's cache, where
            pytorch-fid keeps it as well.
        sha256: what the file's SHA-256 must be; None for the published file's. The numbers of other weights are not called FID,
            and their names carry the first digits.

    Raises:
        ValueError: it is another file, or not one in the common format.
        OSError: it cannot be read or downloaded.
    """
    source = _downloaded() if weights is None else weights
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), sha256 or WEIGHTS_SHA256
    where = "the file" if isinstance(source, bytes) else str(source)
    if found != expected:
        wanted = "the published file's" if sha256 is None else "the stated one"
        raise ValueError(f"{where} has the SHA-256 {found}, not {wanted}, {expected}")
    try:
        network = Inception.from_checkpoint(content)
    except ValueError as error:
        raise ValueError(f"{where} is {error}") from error
    resize, words = PREPROCESS[name]
    variant = name.removeprefix("inception").removeprefix("_")
    published = found == WEIGHTS_SHA256
    return FeatureExtractor(
        name=name,
        prefix=variant if published else f"{name}_{found[:8]}",
        is_fid=published,
        dim=DIM,
        num_classes=NUM_CLASSES,
        preprocess=words,
        weights_sha256=found,
        network=network.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        prepare=lambda images: resize(images.to(device)),
        chunk=CHUNK if device.type == "cpu" else None,
    )


def _downloaded() -> Path:
    """Path of the published file in torch's cache."""
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_URL.rpartition("/")[2])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256, progress=False
            )
        except (OSError, RuntimeError) as error:  # no network; not the file that was published
            raise OSError(
                f"{WEIGHTS_URL} cannot be downloaded ({error}); fetch the file where there is a network and give its path"
            ) from error
    return path


def tensorflow_input(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 299 299"]:
    """Resize as TensorFlow 1 does, (x - 128) / 128: FID's own graph and torch-fidelity.

    Bilinear without antialiasing, output pixel i taken at i (h / 299), corner to corner, so that pictures move by up to half a
    pixel. As two matrix products the horizontal step comes first, as there, and rounding differs by 3e-5 of 255 at most.
    """
    high, wide = (_tensorflow_matrix(side).to(images.device) for side in images.shape[1:3])
    x = images.permute(0, 3, 1, 2).to(torch.float32)
    return _scaled(high @ (x @ wide.T))


@functools.lru_cache(maxsize=64)
def _tensorflow_matrix(side: int) -> Float[Tensor, "299 {side}"]:
    """Rows are the weights of a line's pixels in each of the 299; positions are float32, as in TensorFlow."""
    position = torch.arange(SIDE) * torch.tensor(side / SIDE, dtype=torch.float32)
    low = position.long()
    part = (position - low)[:, None]
    rows = torch.zeros(SIDE, side).scatter_(1, low[:, None], 1 - part)
    return rows.scatter_add_(1, (low[:, None] + 1).clamp(max=side - 1), part)


def pytorch_input(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 299 299"]:
    """Resize by PyTorch's bilinear without antialiasing, 2 x / 255 - 1: pytorch-fid."""
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def clean_input(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 299 299"]:
    """Resize by antialiased bicubic in float32, clamp to [0, 255], (x - 128) / 128: clean-fid.

    Parmar et al., 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", https://arxiv.org/abs/2104.11222.
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32)
    return _scaled(F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp_(0, 255))


def _scaled(x: Float[Tensor, "b 3 299 299"]) -> Float[Tensor, "b 3 299 299"]:
    return ((x - 128) / 128).contiguous(memory_format=torch.channels_last)


PREPROCESS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "inception": (
        tensorflow_input,
        "TensorFlow 1 bilinear to 299 without antialiasing, (x - 128) / 128, as torch-fidelity",
    ),
    "inception_pytorch": (
        pytorch_input,
        "PyTorch bilinear to 299 without antialiasing, 2 x / 255 - 1, as pytorch-fid",
    ),
    "inception_clean": (
        clean_input,
        "antialiased bicubic to 299 in float32, clamp to [0, 255], (x - 128) / 128, as clean-fid",
    ),
}
"""Resizes by the name of the extractor, with what is said of them beside every number."""
