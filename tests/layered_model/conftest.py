"""Small networks and a small text encoder for the tests of `layered_model`."""

import pytest
import torch

from layered_model.unet import LayeredUNet, UNetConfig

TINY = {
    "resolutions": (8, 16, 32),
    "channels": (8, 8, 16, 16),
    "blocks": (1, 1, 1, 1),
    "attention": (1, 1),
    "mid_blocks": 1,
    "embedding_width": 16,
    "head_width": 8,
    "text_width": 12,
    "dropout": 0.0,
}

VOCABULARY = "a red apple on white background two dogs run after ball while child laughs cat"


@pytest.fixture(scope="session")
def tiny():
    """Makes small `UNetConfig`s: ``tiny(resolutions=(8, 32))``."""

    def make(**changes):
        return UNetConfig(**{**TINY, **changes})

    return make


@pytest.fixture(scope="session")
def awake():
    """Makes a network in which every parameter counts; a fresh one is zero by construction."""

    def make(config, seed=0):
        network = LayeredUNet(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return network

    return make


@pytest.fixture(scope="session")
def batch_of():
    """Random noisy pictures, logsnr, text and mask for a network."""

    def make(config, size=2, seed=0, num_tokens=5):
        generator = torch.Generator().manual_seed(seed)
        x = [torch.randn(size, 3, r, r, generator=generator) for r in config.resolutions]
        logsnr = 3 * torch.randn(size, generator=generator)
        text = torch.randn(size, num_tokens, config.text_width, generator=generator)
        mask = torch.arange(num_tokens).expand(size, -1) < torch.arange(2, size + 2)[:, None]
        return x, logsnr, text, mask

    return make


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A directory with a small T5 of random weights and a real tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", *VOCABULARY.split()]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    directory = tmp_path_factory.mktemp("t5")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory
