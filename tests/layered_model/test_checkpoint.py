import json

import pytest
import torch

from layered_model import checkpoint
from layered_model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, SamplingDefaults
from layered_model.diffusion import DiffusionConfig
from layered_model.text import EncoderInfo


@pytest.fixture
def config(tiny):
    return ModelConfig(
        network=tiny(),
        diffusion=DiffusionConfig(
            noise="sinc", reference_resolution=8, layer_weights=(1.0, 2.0, 0.5), prediction="eps"
        ),
        text=EncoderInfo(name="some/encoder", weights="sha256:12", width=12, max_tokens=5),
        sampling=SamplingDefaults(sampler="ddim", num_steps=7, guidance=2.5),
        num_images_trained=12_345,
    )


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "b": torch.randn(5, generator=generator, dtype=torch.float64),
        "c": torch.randn(6, 4, generator=generator).T.requires_grad_(),
        "d": torch.arange(3),
        "e": torch.randn(4, generator=generator).bfloat16(),
    }


@pytest.fixture
def directory(config, weights, tmp_path):
    for name, content in checkpoint.encode(config, weights).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def rewrite(directory, change):
    """Edits the configuration in place."""
    description = json.loads((directory / CONFIG_FILE).read_text())
    change(description)
    (directory / CONFIG_FILE).write_text(json.dumps(description))


def test_what_was_written_is_read_bit_for_bit(directory, config, weights):
    found, tensors, sha256 = checkpoint.load(str(directory))
    assert found == config
    assert tensors.keys() == weights.keys()
    assert len(sha256) == 64
    for name, tensor in weights.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor.detach())


def test_encoding_is_deterministic(config, weights):
    assert checkpoint.encode(config, weights) == checkpoint.encode(config, weights)


def test_the_configuration_is_written_last(config, weights):
    # Its presence means that the weights are there.
    assert list(checkpoint.encode(config, weights)) == [WEIGHTS_FILE, CONFIG_FILE]


def test_the_files_are_json_and_safetensors_and_no_pickle(directory):
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    content = (directory / WEIGHTS_FILE).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    assert {"a", "b", "c", "d", "e"} <= header.keys()
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert max(ends) == len(content) - 8 - header_bytes


@pytest.mark.parametrize("where", [0, 9, -1])
def test_damaged_weights_are_named(directory, where):
    path = directory / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        checkpoint.load(str(directory))


def test_cut_off_weights_are_named(directory):
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        checkpoint.load(str(directory))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: {directory} is not a model"):
        checkpoint.load(str(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("network"), "ModelConfig lacks network"),
        (lambda d: d.pop("num_images_trained"), "num_images_trained"),
        (lambda d: d["network"].pop("channels"), "UNetConfig lacks channels"),
        (lambda d: d["sampling"].pop("guidance"), "SamplingDefaults lacks guidance"),
        (lambda d: d["network"].update(chanels=3), "UNetConfig knows no chanels"),
        (lambda d: d["diffusion"].update(beta=3), "DiffusionConfig knows no beta"),
        (lambda d: d.update(extra=3), "ModelConfig knows no extra"),
        (lambda d: d["network"].update(dropout=2.0), "dropout=2.0 must lie in"),
        (lambda d: d.update(network=3), "UNetConfig must be an object, not 3"),
        (lambda d: d["network"].update(dropout="much"), "UNetConfig: "),
        (lambda d: d["sampling"].update(sampler="euler"), "'euler'"),
        (lambda d: d["sampling"].update(num_steps=0), "num_steps=0 must be at least 1"),
        (lambda d: d["sampling"].update(guidance="4"), "SamplingDefaults: "),
        (lambda d: d["text"].update(width=99), "text.width=99 must be the network's text_width"),
        (lambda d: d.update(num_images_trained="x"), "num_images_trained='x' must be a whole"),
        (lambda d: d.update(format=99), "format must be 1"),
        (lambda d: d.pop("format"), "format must be 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_configuration_that_does_not_fit_is_named(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(ValueError, match=f"{directory / CONFIG_FILE}: .*{message}"):
        checkpoint.load(str(directory))


def test_a_model_saved_before_there_were_kinds_is_a_layered_one(directory, config):
    def older(description):
        for name in ("kind", "upper_norm"):
            description["network"].pop(name)

    rewrite(directory, older)
    found = checkpoint.load(str(directory))[0]
    assert found == config
    assert found.network.kind == "layered"


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", "3"])
def test_a_configuration_that_is_none_is_named(directory, content):
    (directory / CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{directory / CONFIG_FILE}"):
        checkpoint.load(str(directory))


def test_a_model_is_read_from_any_file_system(directory, config):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in directory.iterdir():
        memory.pipe(f"/checkpoint/{path.name}", path.read_bytes())
    assert checkpoint.load("memory://checkpoint/")[0] == config
    with pytest.raises(FileNotFoundError, match=r"memory://nothing/config\.json is missing"):
        checkpoint.load("memory://nothing")
