import copy
import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from layered_model import LayeredPipeline
from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.diffusion import DiffusionConfig
from layered_model.images import to_uint8
from layered_model.rows import Prompt
from layered_model.steppers import SamplerKind
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


def level_of(image):
    return np.asarray(image, np.int16)


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
    drawn = pipe.sample(text, mask, [1], on_step=lambda step: estimates.append(step.x0[-1]))
    assert len(estimates) == 4
    for picture, (resolution, levels) in zip(
        pipe.diffusion.pyramid(estimates[-1]), drawn.items(), strict=True
    ):
        assert levels.dtype == torch.uint8
        assert levels.shape == (1, resolution, resolution, 3)
        assert torch.equal(levels, to_uint8(picture))


def test_an_early_exit_draws_the_lower_resolutions_alone(pipe):
    assert list(pipe("cat", resolution=8).images) == [8]


def test_seeds_can_be_listed(pipe):
    listed = pipe(["cat", "cat", "two dogs"], seed=[9, 4, 9])
    assert listed.seeds == [9, 4, 9]
    for i, (prompt, seed) in enumerate([("cat", 9), ("cat", 4), ("two dogs", 9)]):
        assert close(listed.images[16][i], pipe(prompt, seed=seed).images[16][0])


@pytest.mark.parametrize("sampler", get_args(SamplerKind))
def test_every_sampler_draws(sampler, pipe):
    seen = []
    out = pipe("cat", sampler=sampler, num_steps=3, on_step=seen.append)
    assert np.asarray(out.images[16][0]).std() > 1
    assert len(seen) == seen[0].num_evaluations == (5 if sampler == "heun" else 3)


def test_guidance_can_differ_between_layers_and_noise_levels(pipe):
    one = pipe("cat", guidance=2.0, num_steps=4).images
    same = pipe("cat", guidance=[2.0, 2.0], num_steps=4).images
    assert close(one[16][0], same[16][0])
    upper = pipe("cat", guidance=[2.0, 6.0], num_steps=4).images
    assert not close(one[16][0], upper[16][0])
    off = pipe("cat", guidance=6.0, guidance_interval=(90.0, 99.0)).images
    assert close(off[16][0], pipe("cat", guidance=1.0).images[16][0])


def test_each_prompt_can_have_its_own_negative_prompt(pipe):
    both = pipe(["cat", "cat"], seed=[1, 1], negative_prompt=["two dogs", ""])
    for i, negative in enumerate(["two dogs", ""]):
        assert close(
            both.images[16][i], pipe("cat", seed=1, negative_prompt=negative).images[16][0]
        )
    assert not close(*both.images[16])


def test_a_layers_own_prompt_leaves_the_lower_pictures_alone(pipe):
    text, mask = pipe.encode(["cat"])
    estimates = []
    options = {"on_step": lambda step: estimates.append(step.x0[-1]), "num_steps": 1}
    pipe.sample(text, mask, [1], **options)
    pipe.sample(text, mask, [1], layer_prompts={16: pipe.encode(["two dogs"])}, **options)
    pipe.sample(text, mask, [1], layer_prompts={16: pipe.encode(["cat"])}, **options)
    plain, other, same = estimates
    assert (other - plain).abs().max() > 1e-3
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)


def test_thresholding_and_the_weight_of_fused_heads_matter(pipe):
    def draw(**options):
        return pipe("cat", guidance=20.0, **options).images[16][0]

    assert not close(draw(), draw(fuse_weight=0.0))
    assert close(draw(), draw(fuse_weight=1.0))  # of a model that says nothing else
    alone = copy.copy(pipe)
    sampling = replace(pipe.config.sampling, fuse_weight=0.0)
    alone.config = replace(pipe.config, sampling=sampling)
    assert close(alone("cat", guidance=20.0).images[16][0], draw(fuse_weight=0.0))
    each = alone("cat", guidance=[20.0, 20.0]).images[16][0]
    assert close(each, draw())  # guidance of each layer acts on its band
    assert not close(draw(), draw(threshold=1.0))


def test_a_preview_can_be_finished(pipe):
    preview = pipe(["cat", "two dogs"], resolution=8).images[8]
    finished = pipe(["cat", "two dogs"], finish=preview).images
    for one, other in zip(preview, finished[8], strict=True):
        assert close(one, other)
    # What was finished has detail that the preview cannot have.
    assert np.abs(level_of(finished[16][0]) - level_of(preview[0].resize((16, 16)))).mean() > 2


def test_a_picture_can_be_the_start(pipe):
    given = pipe("two dogs", seed=3).images[16][0]
    kept = pipe("cat", image=given, num_steps=50, strength=0.02).images[16][0]
    moved = pipe("cat", image=given, num_steps=50, strength=0.8).images[16][0]
    difference = [np.abs(level_of(given) - level_of(drawn)).mean() for drawn in (kept, moved)]
    assert difference[0] < 10 < difference[1]
    tensor = torch.from_numpy(np.asarray(given).copy())[None]
    assert close(kept, pipe("cat", image=tensor, num_steps=50, strength=0.02).images[16][0])
    small = pipe("cat", image=given, num_steps=50, strength=0.02, resolution=8).images[8][0]
    assert small.size == (8, 8)


def test_the_noisy_steps_can_run_on_the_lowest_layer_alone(pipe):
    sides = []
    pipe(
        "cat", num_steps=6, hand_over=0.0, on_step=lambda step: sides.append(step.x0[-1].shape[-1])
    )
    assert sides == sorted(sides)
    assert set(sides) == {8, 16}


def test_progress_is_shown_on_request(pipe, capsys):
    pipe("cat", num_steps=3)
    assert capsys.readouterr().err == ""
    pipe("cat", num_steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_model_computes_in_bfloat16_on_request(pipe):
    network = copy.deepcopy(pipe.network)
    short = LayeredPipeline(pipe.config, network).to("cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in short.network.parameters()} == {torch.bfloat16}
    one, other = (level_of(each("cat", seed=1).images[16][0]) for each in (pipe, short))
    assert 0 < np.abs(one - other).mean() < 10
    assert close(short.to(dtype=torch.float32)("cat", seed=1).images[16][0], other)
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 must be torch\.float32"):
        short.to(dtype=torch.int8)


@pytest.mark.compile
def test_a_compiled_pipeline_draws_the_same(pipe):
    compiled = LayeredPipeline(pipe.config, copy.deepcopy(pipe.network))
    compiled.compile(backend="aot_eager")  # one graph is what counts here
    assert close(compiled("cat", seed=1).images[16][0], pipe("cat", seed=1).images[16][0])


PICTURE = Image.new("RGB", (16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 32}, r"resolution=32 must be one of \(8, 16\)"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"guidance": float("nan")}, "guidance=nan must be a finite number"),
        ({"guidance": [1.0, 2.0, 3.0]}, "must hold one scale for each of 2 layers"),
        ({"guidance_interval": (3.0, 1.0)}, "must go from low to high"),
        ({"seed": [1, 2]}, r"seed=\[1, 2\] must be one number, or one for each of 1 prompts"),
        ({"prompt": []}, "must hold at least one prompt"),
        ({"prompt": ["cat", 3]}, "prompt holds 3, which is not a text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt holds 2 texts"),
        ({"layer_prompts": {8: "cat"}}, r"layer_prompts\[8\] must be for one of \(16,\)"),
        ({"sampler": "heun", "eta": 1.0}, "eta=1.0 means something to sampler 'ddim' only"),
        ({"threshold": 2.0}, "threshold=2.0 must be above 0, up to 1"),
        ({"fuse_weight": -1.0}, "fuse_weight=-1.0 must be from 0 to 1"),
        ({"strength": 1.5}, "strength=1.5 must be above 0, up to 1"),
        ({"image": PICTURE.resize((16, 8))}, r"image is 16 x 8 pixels; it must be square"),
        ({"image": PICTURE.resize((8, 8))}, r"with a side of one of \(16,\)"),
        ({"image": [PICTURE, PICTURE]}, "image holds 2 pictures; it must hold one, or 1"),
        ({"image": [PICTURE, PICTURE.resize((8, 8))]}, "image must hold .* all of one size"),
        ({"image": torch.zeros(1, 3, 16, 16)}, r"image is torch.float32 of shape \(1, 3, 16, 16\)"),
        ({"finish": PICTURE}, r"finish is 16 x 16 pixels; .* one of \(8,\)"),
        ({"finish": PICTURE.resize((8, 8)), "image": PICTURE}, "cannot both be given"),
        ({"image": np.zeros((16, 16, 3), np.uint8)}, "image is ndarray; it must be a picture"),
        ({"finish": {8: [PICTURE]}}, "finish is dict; it must be a picture"),
        ({"seed": 2**64}, "seed=18446744073709551616 must have 64 bits"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "cat", **options})


def test_embeddings_must_fit_the_model_and_the_seeds(pipe):
    text, mask = pipe.encode(["cat"])
    with pytest.raises(ValueError, match=r"seeds=\[1, 2\] must hold one for each of 1 prompts"):
        pipe.sample(text, mask, [1, 2])
    with pytest.raises(ValueError, match="text has width 3, but the model reads 24"):
        pipe.sample(text[..., :3], mask, [1])


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


@pytest.fixture
def bundle(pipe, tmp_path):
    """A model's directory with its text encoder, which is to be had nowhere else."""
    folder = tmp_path / "bundle"
    config = replace(pipe.config, text=replace(pipe.config.text, name="no/such/encoder"))
    gone = LayeredPipeline(config, pipe.network)
    gone.text_encoder = pipe.text_encoder
    gone.save_pretrained(folder, with_text_encoder=True)
    return folder


def test_a_text_encoder_goes_with_its_model(pipe, bundle):
    import fsspec

    fsspec.filesystem("memory").put(str(bundle), "/models/bundle", recursive=True)
    drawn = pipe("a red apple", seed=5).images[16][0]
    for path in (bundle, "memory://models/bundle"):
        loaded = LayeredPipeline.from_pretrained(path)
        assert np.array_equal(loaded("a red apple", seed=5).images[16][0], drawn)
        assert loaded.untrained().text_encoder.info == loaded.config.text


def test_what_is_saved_again_is_the_encoder_of_now(bundle):
    (bundle / "text_encoder" / "spiece.model").write_text("of an older one")
    loaded = LayeredPipeline.from_pretrained(bundle.rename(bundle.with_name("read")))
    with pytest.raises(ValueError, match=r"read/text_encoder is damaged: its SHA-256 is"):
        loaded("cat")
    (bundle.with_name("read") / "text_encoder" / "spiece.model").unlink()
    loaded.save_pretrained(bundle, with_text_encoder=True)
    (bundle / "text_encoder" / "spiece.model").write_text("of an older one")
    loaded.save_pretrained(bundle, with_text_encoder=True)
    assert not (bundle / "text_encoder" / "spiece.model").exists()
    LayeredPipeline.from_pretrained(bundle)("cat")


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


@pytest.mark.usefixtures("unchecked")
def test_numbers_may_be_numpys(pipe):
    drawn = pipe("cat", seed=np.int64(3), guidance=np.float32(2)).images[16][0]
    assert close(drawn, pipe("cat", seed=3, guidance=2).images[16][0])


@pytest.mark.usefixtures("unchecked")
def test_a_text_is_not_its_letters(pipe):
    assert pipe.encode("cat").text.shape == pipe.encode(["cat"]).text.shape
    with pytest.raises(ValueError, match="captions='cat' must be a list of texts"):
        pipe.text_encoder.encode("cat")


def test_a_negative_prompt_of_another_length_is_named(pipe):
    text, mask = pipe.encode(["cat"])
    negative = Prompt(text[:, :3], mask[:, :3])
    with pytest.raises(ValueError, match=r"negative has shape .*; it must be that of the text"):
        pipe.begin(text, mask, [0], negative=negative)


def test_a_model_is_saved_to_directories_alone(pipe):
    with pytest.raises(ValueError, match="path='s3://bucket/model' must be a directory"):
        pipe.save_pretrained("s3://bucket/model")


def test_weights_of_another_network_are_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description["network"]["channels"][0] *= 2
    path.write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"its weights are not of the network that its config\.json"
    ):
        LayeredPipeline.from_pretrained(tmp_path)
