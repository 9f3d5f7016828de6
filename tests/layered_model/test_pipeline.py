from dataclasses import replace

import numpy as np
import pytest
import torch

from layered_model import LayeredPipeline
from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.diffusion import DiffusionConfig
from layered_model.images import to_uint8
from layered_model.text import describe


@pytest.fixture(scope="module")
def pipe(tiny, awake, t5):
    network = tiny(
        resolutions=(8, 16), channels=(8, 8), blocks=(1, 1), attention=(1,), text_width=24
    )
    config = ModelConfig(
        network=network,
        diffusion=DiffusionConfig(noise="sinc", reference_resolution=8),
        text=describe(str(t5), max_tokens=6),
        sampling=SamplingDefaults(sampler="dpmpp_2m", num_steps=4, guidance=2.0),
    )
    return LayeredPipeline(config, awake(network))


def close(one, other):
    """Equal pictures, but for a level where float32 rounds either way."""
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_a_prompt_becomes_a_picture_at_every_resolution(pipe):
    out = pipe("a red apple", seed=7)
    assert list(out.images) == [8, 16] == list(pipe.resolutions)
    assert out.seeds == [7]
    for resolution, (image,) in out.images.items():
        assert image.size == (resolution, resolution)
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 1


def test_the_same_seed_gives_the_same_picture_whatever_the_batch(pipe):
    together = pipe(["a red apple", "two dogs", "cat"], seed=3)
    assert together.seeds == [3, 4, 5]
    for i, prompt in enumerate(["a red apple", "two dogs", "cat"]):
        alone = pipe(prompt, seed=3 + i)
        for resolution in (8, 16):
            assert close(alone.images[resolution][0], together.images[resolution][i])


def test_seed_prompt_guidance_and_negative_prompt_matter(pipe):
    def draw(prompt="a red apple", **options):
        return np.asarray(pipe(prompt, **options).images[16][0])

    plain = draw(seed=1)
    assert np.array_equal(plain, draw(seed=1))
    assert not close(plain, draw(seed=2))
    assert not close(plain, draw("two dogs", seed=1))
    assert not close(plain, draw(seed=1, guidance=1.0))
    assert not close(plain, draw(seed=1, negative_prompt="two dogs"))
    assert not close(plain, draw(seed=1, sampler="ddim"))


def test_the_defaults_are_the_models(pipe):
    explicit = pipe("cat", seed=1, num_steps=4, guidance=2.0, sampler="dpmpp_2m")
    assert np.array_equal(pipe("cat", seed=1).images[16][0], explicit.images[16][0])


def test_drawing_leaves_the_global_random_state_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    LayeredPipeline.from_pretrained(tmp_path)
    pipe.untrained()
    pipe("cat")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_empty_prompt_is_unconditional(pipe):
    for prompt in ("", "  "):
        text, mask = pipe.encode([prompt, "cat"])
        assert mask.any(dim=1).tolist() == [False, True]
        assert (text[0] == 0).all()
    with_guidance = pipe("", seed=1, guidance=5.0)
    without = pipe("", seed=1, guidance=1.0)
    assert close(with_guidance.images[16][0], without.images[16][0])


def test_an_empty_negative_prompt_is_the_null_prompt(pipe):
    text, mask = pipe.encode(["cat"])
    drawn = pipe.sample(text, mask, [1])
    spelled_out = pipe.sample(text, mask, [1], negative=pipe.encode([""]))
    assert torch.equal(drawn[16], spelled_out[16])


def test_the_low_picture_is_the_high_one_downscaled(pipe):
    estimates = []
    text, mask = pipe.encode(["cat"])
    drawn = pipe.sample(text, mask, [1], on_step=lambda _, x0: estimates.append(x0[-1]))
    assert len(estimates) == 4
    for picture, (resolution, levels) in zip(
        pipe.diffusion.pyramid(estimates[-1]), drawn.items(), strict=True
    ):
        assert levels.dtype == torch.uint8
        assert levels.shape == (1, resolution, resolution, 3)
        assert torch.equal(levels, to_uint8(picture))


def test_an_early_exit_draws_the_lower_resolutions_alone(pipe):
    assert list(pipe("cat", resolution=8).images) == [8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 32}, r"resolution=32 must be one of \(8, 16\)"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("cat", **options)


def test_saving_and_loading_changes_no_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a" / "model")
    loaded = LayeredPipeline.from_pretrained(tmp_path / "a" / "model")
    assert loaded.config == pipe.config
    assert loaded.config_hash == pipe.config_hash
    assert len(loaded.weights_sha256) == 64
    state = loaded.network.state_dict()
    assert all(torch.equal(state[name], w) for name, w in pipe.network.state_dict().items())
    one, other = loaded("a red apple", seed=5), pipe("a red apple", seed=5)
    assert np.array_equal(one.images[16][0], other.images[16][0])
    assert sorted(p.name for p in (tmp_path / "a" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_model_loads_from_any_file_system(pipe, tmp_path):
    import fsspec

    pipe.save_pretrained(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/models/tiny", recursive=True)
    loaded = LayeredPipeline.from_pretrained("memory://models/tiny")
    assert loaded.config == pipe.config


def test_another_encoder_than_that_of_training_is_refused(pipe, tmp_path):
    config = replace(pipe.config, text=replace(pipe.config.text, weights="sha256:0"))
    other = LayeredPipeline(config, pipe.network)
    with pytest.raises(ValueError, match=r"has weights sha256:\w+, .* trained with sha256:0"):
        other("cat")


def test_embeddings_can_be_drawn_from_without_an_encoder(pipe):
    config = replace(pipe.config, text=replace(pipe.config.text, name="no/such/encoder"))
    without = LayeredPipeline(config, pipe.network)
    text, mask = pipe.encode(["a red apple"])
    assert torch.equal(without.sample(text, mask, [1])[16], pipe.sample(text, mask, [1])[16])


def test_untrained_is_the_same_model_with_fresh_weights(pipe):
    fresh = pipe.untrained()
    assert fresh.config == pipe.config
    assert (fresh.network.heads[0].conv.weight == 0).all()
    one, other = (pipe.untrained(seed=s).network.state_dict() for s in (0, 1))
    assert all(torch.equal(w, one[name]) for name, w in fresh.network.state_dict().items())
    assert not all(torch.equal(w, one[name]) for name, w in other.items())


def test_the_config_hash_follows_the_content(pipe):
    assert pipe.untrained().config_hash == pipe.config_hash
    changed = replace(pipe.config, num_images_trained=1)
    assert LayeredPipeline(changed, pipe.network).config_hash != pipe.config_hash
