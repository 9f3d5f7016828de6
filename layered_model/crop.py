"""Rectangles of a picture, to compute the layers above the trunk on a part of it.

The trunk sees the whole picture; a layer above it is convolutions alone, so its values inside a crop depend on a neighbourhood
only. A layer is computed on the crop and a margin around it, wide enough for its convolutions, which is cut off afterwards.
Where the margin would leave the picture it ends at the border, and the zero padding of the convolutions there is the picture's
own. So the values inside are those of the whole picture, and so are the gradients of a loss on them.

A crop counts pixels of the lowest layer: at a resolution k times as high it is k times as large, and aligned. Called by `unet`,
`inputs` and `diffusion`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def fits(self, resolution: int) -> bool:
        """Whether it holds a pixel and lies within a square picture."""
        return (
            min(self.height, self.width) >= 1
            and min(self.top, self.left) >= 0
            and max(self.top + self.height, self.left + self.width) <= resolution
        )

    def scaled(self, ratio: int) -> "Box":
        """The same rectangle where the resolution is so many times as high."""
        return Box(*(ratio * value for value in self))

    def grown(self, margin: int, resolution: int) -> "Box":
        """With a margin on all four sides, as far as a square picture reaches."""
        top, left = max(self.top - margin, 0), max(self.left - margin, 0)
        bottom = min(self.top + self.height + margin, resolution)
        right = min(self.left + self.width + margin, resolution)
        return Box(top, left, bottom - top, right - left)

    def cut(
        self, x: Float[Tensor, "b c h w"], within: "Box | None" = None
    ) -> Float[Tensor, "b c h2 w2"]:
        """This part of a picture, or of what another rectangle holds of it."""
        top, left = (
            self.top - (within.top if within else 0),
            self.left - (within.left if within else 0),
        )
        return x[..., top : top + self.height, left : left + self.width]


def cut_layers(x: Sequence[Float[Tensor, "b c _h _w"]], crop: Box) -> list[Tensor]:
    """What of every layer's picture, low to high, a network computes for a crop: the lowest whole, of the others the crop."""
    lowest = x[0].shape[-1]
    return [x[0], *(crop.scaled(high.shape[-1] // lowest).cut(high) for high in x[1:])]
