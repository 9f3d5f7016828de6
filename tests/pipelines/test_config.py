"""Configuration: what the file means, and one clear line for each way to get it wrong."""

import dataclasses

import pytest

from pipelines.config import (
    Config,
    UserError,
    default_file,
    differences,
    fingerprint,
    from_yaml,
    load_config,
    preset_names,
    to_yaml,
)

BASE = default_file().read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(preset: str) -> None:
    config = load_config(preset)
    assert config.preset == preset
    assert from_yaml(to_yaml(config)) == config


def test_preset_wins_over_base_and_later_overrides_win_over_both() -> None:
    assert load_config("demo").train.use_gpu is False
    assert load_config("coco512").train.use_gpu is True
    assert load_config("demo", ["seed=1", "seed=2"]).seed == 2
    assert load_config("demo", ["model.resolutions=[16,64]"]).model.resolutions == (16, 64)


def test_paths_follow_the_preset() -> None:
    config = load_config("photo128")
    assert (config.dataset, config.run) == ("datasets/photo128", "runs/photo128")


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("demo").seed = 3  # type: ignore[misc]


MISTAKES = [
    ("train.num_imagess=3", r"train\.num_imagess: .*Did you mean.*'num_images'"),
    ("trian.num_images=3", r"trian: .*Did you mean: 'train'"),
    ("train.num_images=8.5", r"train\.num_images: .*'8\.5'.*Integer"),
    ("train.num_images=many", r"train\.num_images: .*'many'.*Integer"),
    ("train.use_gpu=perhaps", r"train\.use_gpu: .*'perhaps'"),
    ("train=3", r"train: "),
    ("train.learning_rate=null", r"train\.learning_rate: .*None"),
    ("train.learning_rate=-1", r"train\.learning_rate=-1\.0 must be above 0"),
    ("train.precision=fp8", r"train\.precision: .*'fp8'.*'float32', 'bfloat16'"),
    ("train.optimizer=sgd", r"train\.optimizer: .*'sgd'.*'adamw', 'muon'"),
    ("train.batch_size=33", r"train\.batch_size=33 .*multiple of 2 workers.*train\.num_workers=2"),
    ("train.validate_every_images=0", r"train\.validate_every_images=0 must be above 0"),
    (
        "train.keep_checkpoints_every_images=0",
        r"train\.keep_checkpoints_every_images=0 must be above 0",
    ),
    ("train.score_every_images=-1", r"train\.score_every_images=-1 must be 0 or above"),
    ("train.num_score_images=1", r"train\.num_score_images=1 must be at least 2"),
    ("train.max_skipped_steps=-1", r"train\.max_skipped_steps=-1 must be 0 or above"),
    ("train.min_workers=3", r"train\.min_workers=3 must be from 1 to train\.num_workers=2"),
    ("train.trackers=[aim]", r"train\.trackers.*\[aim\].*'tensorboard', 'mlflow', 'wandb'"),
    ("train.text_dropout=1.5", r"train\.text_dropout=1\.5 must be from 0 to 1"),
    ("train.ema_relative_width=0.5", r"train\.ema_relative_width=0\.5 must be"),
    ("train.ema_decay=1.0", r"train\.ema_decay=1\.0 must be from 0 to below 1, or null"),
    ("train.ema_snapshot_widths=[0.1,0.1]", r"train\.ema_snapshot_widths=.* must be distinct"),
    ("diffusion.detail_resolution=8", r"diffusion\.detail_resolution=8 must be at least"),
    ("train.num_images=0", r"train\.num_images=0 must be above 0"),
    ("evaluate.num_images=1", r"evaluate\.num_images=1 must be at least 2"),
    ("evaluate.extractor_sha256=6726825d", r"evaluate\.extractor_sha256=.* must be 64 digits"),
    ("data.image_format=gif", r"data\.image_format: .*'gif'.*'png', 'webp', 'jpeg'"),
    ("data.image_quality=101", r"data\.image_quality=101 must be from 1 to 100"),
    ("data.rows_per_file=0", r"data\.rows_per_file=0 must be above 0"),
    ("text.max_tokens=0", r"text\.max_tokens=0 must be above 0"),
    ("sample.guidance=-1", r"sample\.guidance=-1\.0 must be 0 or above"),
    ("sample.sampler=euler", r"sample\.sampler: .*'euler'.*'dpmpp_2m', 'ddim'"),
    ("seed=-1", r"seed=-1 must be 0 or above"),
    ("run=datasets/demo", r"run='datasets/demo' must differ from dataset"),
    ("dataset=", r"dataset: .*None"),
    ('dataset=""', r"dataset='' must be the path of a directory"),
    ("ray.num_cpus=0", r"ray\.num_cpus=0 must be above 0"),
    ("ray.object_store_bytes=1", r"ray\.object_store_bytes=1 must be at least 78643200"),
    ("model.resolutions=[64,32]", r"model\.resolutions=\(64, 32\)"),
    ("model.resolutions=[16,24]", r"model\.resolutions=\(16, 24\)"),
    ("model.resolutions=[16.5]", r"model\.resolutions: .*\[16\.5\].*Integer"),
    ("model.resolutions=16", r"model\.resolutions: "),
    ("model.dropout=1", r"model\.dropout=1\.0"),
    ("diffusion.extra_logsnr=[0,1,2]", r"diffusion\.extra_logsnr=.*allow_leak"),
    ("diffusion.extra_logsnr=[1,1]", r"diffusion\.extra_logsnr=.*\(\d+, \d+, \d+\)"),
    (
        "diffusion.noise=pink",
        r"diffusion\.noise: .*'pink'.*'sinc', 'periodic', 'box', 'independent'",
    ),
    ("seed=${nothing}", r"seed: .*nothing"),
    ("seed=[1,", r"seed=\[1,: "),
    ("seed", r"override 'seed' must look like section\.key=value"),
    ("=3", r"override '=3' must look like"),
    ("preset=coco512", r"preset=coco512: choose a preset with --preset coco512"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_mistake_is_one_line_that_names_key_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError, match="^" + message) as caught:
        load_config("demo", [override])
    assert "\n" not in str(caught.value)


def test_leak_is_allowed_on_request() -> None:
    config = load_config("demo", ["diffusion.allow_leak=true", "diffusion.extra_logsnr=[0,1,2]"])
    assert config.diffusion.extra_logsnr == (0.0, 1.0, 2.0)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"preset='dmeo' must be one of demo, emoji128, photo128"):
        load_config("dmeo")


def test_absent_file_is_named() -> None:
    with pytest.raises(UserError, match=r"config file nowhere\.yaml: No such file"):
        load_config("demo", config_file="nowhere.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "  seed: 0\n",
            "  seed: 0\n  seed: 1\n",
            r"line \d+: found duplicate key seed \(.*mine\.yaml",
        ),
        ("  seed: 0\n", "", r"seed: missing"),
        ("    grad_clip: 1.0\n", "", r"train\.grad_clip: missing"),
        ("  seed: 0\n", "  sead: 0\n", r"sead: .*Did you mean: 'seed'.*mine\.yaml, base"),
        (
            "presets:",
            "preset:",
            r"config file .*mine\.yaml must hold the two keys base and presets",
        ),
        ("base:", "base: [", r"line \d+: .*mine\.yaml"),
    ],
)
def test_mistake_in_a_file_names_the_file(tmp_path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    assert old in BASE
    path.write_text(BASE.replace(old, new, 1))
    with pytest.raises(UserError, match="^" + message) as caught:
        load_config("demo", config_file=path)
    assert "\n" not in str(caught.value)


def test_a_saved_configuration_that_is_not_whole_names_its_source() -> None:
    with pytest.raises(UserError, match=r"preset: missing, must be given \(runs/x/config\.yaml\)"):
        from_yaml("seed: 1", "runs/x/config.yaml")


def test_fingerprint_depends_on_every_value_and_on_nothing_else() -> None:
    config = load_config("demo")
    assert fingerprint(config.model) == fingerprint(load_config("demo", ["seed=5"]).model)
    assert fingerprint(config.model) != fingerprint(
        load_config("demo", ["model.dropout=0.1"]).model
    )
    assert fingerprint(config.model, 1) != fingerprint(config.model, 2)
    assert len(fingerprint(config.text)) == 16


def test_differences_name_exactly_what_differs() -> None:
    before = load_config("demo")
    after = load_config("demo", ["seed=3", "train.batch_size=64"])
    assert differences(before, before) == []
    assert differences(before, after) == [
        ("seed", 0, 3),
        ("train.batch_size", before.train.batch_size, 64),
    ]
    assert differences(before.train, after.train, "train.") == differences(before, after)[1:]


def test_every_field_says_what_it_means() -> None:
    """A string under each field, as in the source; and none has a default, which would be a second place for values."""
    import ast
    import inspect

    import pipelines.config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign):
                assert statement.value is None
                is_section = getattr(statement.annotation, "id", "").endswith("Config")
                assert is_section or isinstance(following, ast.Expr), ast.unparse(statement)


def test_sections_are_all_of_the_tree() -> None:
    sections = [field.name for field in dataclasses.fields(Config)]
    assert sections[:4] == ["preset", "dataset", "run", "seed"]
