"""A row's bits do not depend on what shares its passes of the network: on the CPU, for networks of several shapes."""

import pytest
import torch

from layered_model.presets import PRESETS
from layered_model.rows import CPU_ROWS, Prompt, Rows, join, predict, predict_together
from layered_model.unet import LayeredUNet

THREE = {
    "resolutions": (8, 16, 32),
    "channels": (8, 8, 8),
    "blocks": (1, 1, 1),
    "attention": (1,),
}


@pytest.fixture(params=["tiny", "one layer", "demo", "64T"])
def network(request, tiny, awake):
    """In the memory format in which the pipeline draws."""
    demo = {
        "resolutions": (8, 16, 32),
        "channels": (24, 64, 64, 64),
        "blocks": (2, 2, 1, 1),
        "attention": (1, 1),
        "mid_blocks": 1,
        "embedding_width": 128,
        "head_width": 32,
        "text_width": 384,
    }
    config = {
        "tiny": lambda: tiny(),
        "one layer": lambda: tiny(
            resolutions=(16,), channels=(8, 16), blocks=(1, 1), attention=(0, 1)
        ),
        "demo": lambda: tiny(**demo),
        "64T": lambda: PRESETS["64T"],
    }[request.param]()
    return awake(config).to(memory_format=torch.channels_last).requires_grad_(False)


@pytest.fixture
def rows(batch_of):
    def make(network, count, layers=None, own=(), num_tokens=16):
        x, logsnr, text, mask = batch_of(network.config, count, num_tokens=num_tokens)
        prompts = tuple(
            Prompt(text.roll(layer, 2), mask) if layer in own else None for layer in range(len(x))
        )
        return Rows(x[:layers], logsnr, Prompt(text, mask), prompts[:layers] if own else None)

    return make


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_row_is_the_same_whatever_shares_its_passes(network, rows):
    everything = rows(network, 13)
    together = predict(network, everything)
    for count in (1, 2, 3, 4, 5, 7, 8, 9):
        for first in (0, 13 - count):
            part = predict(network, everything.part(first, first + count))
            expected = [output[first : first + count] for output in together]
            assert equal(part, expected), f"rows {first} to {first + count}"


def test_a_row_is_the_same_at_another_place(network, rows):
    everything, order = rows(network, 8), [5, 0, 7, 2, 1, 6, 3, 4]
    shuffled = join([everything.part(i, i + 1) for i in order])
    expected = [output[order] for output in predict(network, everything)]
    assert equal(predict(network, shuffled), expected)


def test_rows_with_and_without_prompts_of_their_own_share_passes(tiny, awake, rows):
    network = awake(tiny(**THREE))
    parts = [rows(network, 2), rows(network, 3, own=(1,)), rows(network, 1, own=(2,))]
    alone = [predict(network, part) for part in parts]
    together = predict(network, join(parts))
    assert equal(together, [torch.cat(layer) for layer in zip(*alone, strict=True)])
    assert not torch.equal(alone[0][1][:2], alone[1][1][:2])  # their prompts do matter


def test_rows_of_fewer_layers_are_an_early_exit(tiny, awake, rows):
    network = awake(tiny(**THREE))
    assert equal(predict(network, rows(network, 3, 2)), predict(network, rows(network, 3))[:2])


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 1), (2, 4, 2), (1, 8, 7)])
def test_rows_of_all_depths_share_passes(network, rows, counts, monkeypatch):
    depths = range(1, 1 + len(network.config.resolutions))
    parts = [rows(network, count, depth) for count in counts for depth in depths]
    alone = [predict(network, part) for part in parts]
    forward, sizes = type(network).forward, []

    def counted(self, x, *args, **kwargs):
        sizes.append([len(picture) for picture in x])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(network), "forward", counted)
    together = predict_together(network, parts)
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
        assert equal(one, other)
    assert all(count % 2 == 0 for size in sizes for count in size)
    assert all(size[0] == CPU_ROWS for size in sizes[:-1])


def test_rows_of_all_depths_with_prompts_of_their_own_share_passes(tiny, awake, rows):
    network = awake(tiny(**THREE))
    parts = [rows(network, 2, 2, own=(1,)), rows(network, 3, 1), rows(network, 1, own=(2,))]
    alone = [predict(network, part) for part in parts]
    for one, other in zip(predict_together(network, parts), alone, strict=True):
        assert equal(one, other)


def test_the_network_sees_even_passes_of_a_bounded_size(tiny, awake, rows, monkeypatch):
    network = awake(tiny())
    sizes, forward = [], LayeredUNet.forward

    def counted(self, x, *args, **kwargs):
        sizes.append(len(x[0]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(LayeredUNet, "forward", counted)
    outputs = predict(network, rows(network, 2 * CPU_ROWS + 3))
    assert sizes == [CPU_ROWS, CPU_ROWS, 4]
    assert len(outputs[0]) == 2 * CPU_ROWS + 3
