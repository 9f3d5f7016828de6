import torch

from layered_model.images import to_float, to_uint8


def every_level():
    return torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)


def test_every_level_comes_back():
    assert torch.equal(to_uint8(to_float(every_level())), every_level())


def test_the_range_is_minus_one_to_one():
    x0 = to_float(every_level())
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-1, 1)


def test_channels_move_and_keep_their_content():
    pictures = torch.randint(256, (2, 4, 5, 3), dtype=torch.uint8)
    x0 = to_float(pictures)
    assert x0.shape == (2, 3, 4, 5)
    assert torch.equal(x0[1, 2], pictures[1, :, :, 2] / 127.5 - 1)


def test_overshoot_is_clamped_and_not_wrapped():
    x0 = torch.tensor([-3.0, -1.01, 1.01, 3.0]).reshape(1, 1, 2, 2)
    assert to_uint8(x0).flatten().tolist() == [0, 0, 255, 255]


def test_values_go_to_the_nearest_level():
    x0 = (torch.tensor([99.6, 100.4]) / 127.5 - 1).reshape(1, 1, 1, 2)
    assert to_uint8(x0).flatten().tolist() == [100, 100]
