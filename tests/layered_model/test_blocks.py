import pytest
import torch
from torch import nn

from layered_model.blocks import (
    Attention,
    Head,
    LogSNREmbedding,
    PixelNorm,
    ResidualBlock,
    TransformerBlock,
    Upsample,
    group_norm,
    zero_init,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(module):
    """Takes the zeros out of a module."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_group_norm_fits_every_width():
    for channels in range(1, 300):
        norm = group_norm(channels)
        assert channels % norm.num_groups == 0
        assert norm.num_groups == 1 or channels // norm.num_groups >= 4
        assert norm.num_groups <= 32
    assert group_norm(128).num_groups == 32


def test_zero_init_leaves_nothing():
    conv = zero_init(nn.Conv2d(3, 4, 3))
    assert all((parameter == 0).all() for parameter in conv.parameters())
    assert zero_init(nn.Linear(2, 3, bias=False)).bias is None


def test_a_fresh_residual_block_is_the_identity():
    x = randn(2, 8, 4, 4)
    assert torch.equal(ResidualBlock(8, 8, 6)(x, randn(2, 6)), x)


def test_a_fresh_transformer_block_is_the_identity():
    x = randn(2, 8, 4, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(TransformerBlock(8, 5, 4)(x, randn(2, 3, 5), mask), x)


def test_the_embedding_modulates_a_residual_block():
    block, x = shake(ResidualBlock(8, 12, 6)), randn(1, 8, 4, 4)
    one, other = block(x, randn(1, 6)), block(x, randn(1, 6, seed=1))
    assert one.shape == (1, 12, 4, 4)
    assert (one - other).abs().mean() > 1e-2


def test_attention_is_the_softmax_of_scaled_products():
    attention = shake(Attention(8, 6, head_width=4))
    x, context = randn(2, 5, 8), randn(2, 7, 6)
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[3], [7]])
    q = attention.query(x).reshape(2, 5, 2, 4)
    k, v = (part.reshape(2, 7, 2, 4) for part in attention.key_value(context).split(8, dim=-1))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4**0.5
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    expected = attention.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 5, 8))
    torch.testing.assert_close(attention(x, context, mask), expected)


def test_a_transformer_block_treats_all_pixels_alike():
    block, x = shake(TransformerBlock(8, 5, 4)), randn(1, 8, 4, 4)
    context, mask = randn(1, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(
        block(moved, context, mask).flatten(2),
        block(x, context, mask).flatten(2)[..., order],
        rtol=1e-5,
        atol=1e-5,
    )


def test_upsampling_repeats_pixels_before_its_convolution():
    up = Upsample(3, 3)
    nn.init.dirac_(up.conv.weight)
    nn.init.zeros_(up.conv.bias)
    x = randn(1, 3, 4, 4)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_a_fresh_head_is_zero():
    assert (Head(8, 3)(randn(2, 8, 4, 4)) == 0).all()


@pytest.mark.parametrize("gap", [0.05, 0.5, 5.0])
def test_logsnr_is_embedded_finely_and_without_repetition(gap):
    torch.manual_seed(0)
    embedding = LogSNREmbedding(16)
    logsnr = torch.arange(-18, 18, gap)
    phase = logsnr[:, None] * embedding.frequencies(32, logsnr.device)
    features = torch.cat([phase.sin(), phase.cos()], dim=1)
    distance = torch.cdist(features, features) + 10 * torch.eye(len(logsnr))
    assert distance.min() > gap**0.5 / 2 if gap < 1 else distance.min() > 1
    assert embedding(logsnr).isfinite().all()


def test_the_embedding_keeps_its_precision_in_bfloat16():
    torch.manual_seed(0)
    embedding = LogSNREmbedding(16)
    logsnr = torch.linspace(-18, 18, 200)
    exact = embedding(logsnr)
    error = (embedding.bfloat16()(logsnr) - exact).square().mean().sqrt()
    assert error < 0.01 * exact.std()


def test_pixel_norm_is_the_layer_norm_of_each_pixel():
    norm, x = shake(PixelNorm(8)), randn(2, 8, 3, 4)
    expected = torch.nn.functional.layer_norm(
        x.permute(0, 2, 3, 1), (8,), norm.weight, norm.bias
    ).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm(x)[..., 1:, 2:], norm(x[..., 1:, 2:]))
