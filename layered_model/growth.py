"""Growth: a network of more resolutions that starts from a trained one of fewer.

Downsampling is isolated (see `unet`), so the lower layers of the larger network are the smaller one to the bit, and its outputs
stay what they were until training moves them. The new layers start fresh, and predict zero. Called by the training stage.
"""

from layered_model.shape import UNetConfig
from layered_model.unet import LayeredUNet


def check_growth(lower: UNetConfig, config: UNetConfig) -> None:
    """Raises ValueError naming the first field in which a shape does not continue a lower one upwards."""
    for shape in (lower, config):
        if shape.kind != "layered":
            raise ValueError(
                f"kind={shape.kind!r} must be 'layered' to grow: isolation makes it exact"
            )
    num_layers = len(lower.resolutions)
    if (
        len(config.resolutions) <= num_layers
        or config.resolutions[:num_layers] != lower.resolutions
    ):
        raise ValueError(
            f"resolutions={config.resolutions} must begin with {lower.resolutions} and go on higher"
        )
    added = config.num_upper_levels - lower.num_upper_levels
    fields = ["mid_blocks", "embedding_width", "head_width", "text_width", "picture_channels"]
    for name in ("channels", "blocks", "attention", *fields, *["upper_norm"] * (num_layers > 1)):
        have, want = getattr(lower, name), getattr(config, name)
        levels = want[added:] if name in ("channels", "blocks") else want
        if levels != have:
            where = f" in its last {len(have)} levels" if levels is not want else ""
            raise ValueError(f"{name}={want} must be {have}{where}, as in the network to grow from")


def grow(lower: LayeredUNet, config: UNetConfig) -> LayeredUNet:
    """A network of a larger shape whose lower outputs are those of a trained one, bit for bit.

    Raises:
        ValueError: if the shape does not continue the trained one's, see `check_growth`.
    """
    check_growth(lower.config, config)
    network = LayeredUNet(config)
    weights = lower.state_dict()
    network.load_state_dict({**network.state_dict(), **weights})
    return network
