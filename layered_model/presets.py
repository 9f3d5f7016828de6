"""Shapes of networks by name, from one that a test can run to one for 1024 pixels.

Each costs 13 to 15 % fewer multiply-adds than `unet.SingleScaleUNet` of the same shape; what fixes that is the share of the way
down above the trunk, not the size (the table is in ``docs/paper.md``). Called by the benchmark.
"""

from layered_model.shape import UNetConfig


def _shape(
    resolutions: tuple[int, ...],
    channels: tuple[int, ...],
    blocks: tuple[int, ...],
    attention: tuple[int, ...],
    embedding_width: int,
    text_width: int,
) -> UNetConfig:
    return UNetConfig(
        resolutions=resolutions,
        channels=channels,
        blocks=blocks,
        attention=attention,
        embedding_width=embedding_width,
        text_width=text_width,
        mid_blocks=2,
        head_width=32 if embedding_width < 384 else 64,
        dropout=0.1,
    )


# Resolutions, widths and residual blocks from the highest level down, transformers of the trunk's levels, embedding, text.
# fmt: off
PRESETS: dict[str, UNetConfig] = {
    "64T":      _shape((16, 32, 64),          (32, 64, 96, 128),                (1, 1, 2, 1),          (1, 1),        128, 768),
    "128S":     _shape((32, 64, 128),         (32, 64, 128, 192),               (2, 2, 2, 2),          (1, 1),        256, 768),
    "256S":     _shape((64, 128, 256),        (32, 64, 128, 256, 384),          (2, 2, 2, 2, 2),       (0, 1, 1),     384, 768),
    "S":        _shape((128, 256, 512),       (32, 64, 128, 256, 384, 512),     (2, 2, 2, 2, 2, 2),    (0, 0, 1, 1),  512, 2048),
    "B":        _shape((128, 256, 512),       (48, 96, 192, 384, 576, 768),     (2, 2, 2, 2, 2, 2),    (0, 0, 1, 2),  768, 2048),
    "L":        _shape((128, 256, 512),       (64, 128, 256, 512, 768, 1024),   (2, 2, 2, 2, 2, 2),    (0, 0, 1, 2), 1024, 2048),
    "coco1024": _shape((128, 256, 512, 1024), (16, 48, 96, 192, 384, 576, 768), (1, 2, 2, 2, 2, 2, 2), (0, 0, 1, 2),  768, 2048),
}
# fmt: on
"""Small ones read a text encoder of width 768, those from 512 pixels on one of 2048. ``coco1024`` is ``B`` and one layer more."""
