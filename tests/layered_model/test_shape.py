import pytest


def test_a_single_scale_network_has_the_top_alone_as_layer(tiny):
    assert tiny().layers == (8, 16, 32)
    assert tiny(kind="single_scale").layers == (32,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cascade"}, "kind='cascade' must be 'layered' or 'single_scale'"),
        ({"upper_norm": "batch"}, "upper_norm='batch' must be 'group' or 'pixel'"),
        ({"resolutions": ()}, r"resolutions=\(\)"),
        ({"resolutions": (0, 8)}, r"resolutions=\(0, 8\)"),
        ({"resolutions": (8, 24)}, "24 must be 2, 4, 8, ... times 8"),
        ({"resolutions": (16, 8)}, "8 must be 2, 4, 8, ... times 16"),
        ({"resolutions": (8, 8)}, "8 must be 2, 4, 8, ... times 8"),
        ({"channels": (8, 8)}, r"channels=\(8, 8\) must have more than 2 levels"),
        ({"channels": (8, 8, 16, 0)}, r"channels=\(8, 8, 16, 0\)"),
        ({"blocks": (1, 1, 1)}, r"blocks=\(1, 1, 1\) must hold 4 counts"),
        ({"blocks": (1, 1, 1, -1)}, r"blocks=\(1, 1, 1, -1\)"),
        ({"blocks": (0, 1, 1, 1)}, r"blocks=\(0, 1, 1, 1\)"),
        ({"blocks": (1, 0, 1, 1)}, r"blocks=\(1, 0, 1, 1\)"),
        ({"attention": (1,)}, r"attention=\(1,\) must hold 2 counts"),
        ({"resolutions": (7, 14, 28)}, "halves resolution 7 1 times"),
        ({"head_width": 5}, "head_width=5 must divide channels 16"),
        ({"head_width": 0}, "head_width=0 must be positive"),
        ({"text_width": 0}, "text_width=0 must be positive"),
        ({"mid_blocks": -1}, "mid_blocks=-1"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_shape_names_its_field(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
