"""Inception features, FID, IS and KID equal those of torch-fidelity and pytorch-fid, with the same weights and pictures.

So do the scores that ``layered evaluate --generated`` writes of two folders. The weights are random, in the true file format; the
comparison is the same as with the published ones. `make oracles` makes the anchors' environment and asks them live, about 500
photographs where there are any. What they said of a few drawn pictures is in ``recorded.npz`` (one feature in sixteen), with
which every run of the tests compares; delete it and `make oracles` writes it anew.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from layered_model.features import Features, load_extractor
from layered_model.inception import clean_input
from pipelines import cli
from pipelines.feature_store import FEATURES, LOGITS
from pipelines.kernels import kernel_inception_distance
from pipelines.metrics import FeatureStatistics, frechet_distance, inception_score_of

HERE = Path(__file__).resolve().parent
RECORDED, STEP = HERE / "recorded.npz", 16
PYTHON = Path(
    os.environ.get("LAYERED_ORACLES", HERE.parents[1] / ".venv-oracles") / Path("bin/python")
)

Answers = dict[str, Any]
Pictures = tuple[np.ndarray, np.ndarray]
"""Generated, and real ones."""


@dataclass(frozen=True)
class Ours:
    """What is compared with an anchor: features and logits of the generated pictures, and scores."""

    features: np.ndarray
    logits: np.ndarray
    scores: dict[str, float]


@pytest.fixture(scope="module")
def drawn(drawn_pictures) -> Pictures:
    """Two small sets that differ."""
    return drawn_pictures(14, seed=0), drawn_pictures(10, seed=1, cell=16, noise=40)


@pytest.fixture(scope="module")
def digest(seeded_inception) -> str:
    """SHA-256 of the weights."""
    return hashlib.sha256(seeded_inception.read_bytes()).hexdigest()


def _save(pictures: Pictures, folder: Path) -> list[Path]:
    folders = [folder / "generated", folder / "reference"]
    for images, path in zip(pictures, folders, strict=True):
        path.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(path / f"{number:04}.png")
    return folders


@pytest.fixture(scope="module")
def ask(seeded_inception, tmp_path_factory):
    """Asks the anchors about two folders."""
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}; `make oracles` makes it")

    def answers(folders: list[Path]) -> Answers:
        output = tmp_path_factory.mktemp("anchors") / "answers.npz"
        subprocess.run(
            [PYTHON, HERE / "anchors.py", seeded_inception, *folders, output],
            check=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        return _read(output)

    return answers


def _read(path: Path) -> Answers:
    with np.load(path) as arrays:
        return {key: value if value.ndim else value.item() for key, value in arrays.items()}


@pytest.fixture(scope="module")
def computed(seeded_inception, digest):
    """What our own functions make of two sets of pictures, with an extractor by name."""

    def of(name: str, pictures: Pictures) -> Ours:
        extractor = load_extractor(name, weights=seeded_inception, sha256=digest)
        found: list[Features] = [extractor(torch.from_numpy(images)) for images in pictures]
        features = [part.features.numpy() for part in found]
        logits = found[0].logits.numpy()
        size = min(map(len, features))
        kid, score = (
            kernel_inception_distance(*features, subset_size=size),
            inception_score_of(logits),
        )
        scores = {
            "fid": frechet_distance(*map(FeatureStatistics.from_features, features)),
            "kid": kid.distance.value,
            "kid_deviation": kid.deviation,
            "is": score.score.value,
            "is_deviation": score.deviation,
        }
        return Ours(features[0], logits, scores)

    return of


@pytest.fixture
def many(request, drawn_pictures) -> Pictures:
    """300 photographs of 128 pixels square, blurred by way of 40, and 200 others; drawn ones where there are none."""
    try:
        folder = request.getfixturevalue("flickr8k")
    except pytest.skip.Exception:
        return drawn_pictures(300, seed=0), drawn_pictures(200, seed=1, cell=16, noise=40)
    pictures = []
    for path in sorted((folder / "val").glob("*.jpg"))[:500]:
        with Image.open(path) as picture:
            side = min(picture.size)
            pictures.append(picture.convert("RGB").resize((128, 128), box=(0, 0, side, side)))
    blurred = [picture.resize((40, 40)).resize((128, 128)) for picture in pictures[:300]]
    return np.stack(blurred), np.stack(pictures[300:])


@pytest.fixture
def evaluated(seeded_inception, digest, tmp_path):
    """What the command line makes of two folders, with an extractor by name."""

    def of(name: str, folders: list[Path]) -> Ours:
        kept, output = tmp_path / f"{name}-features", tmp_path / f"{name}.json"
        weights = ["--weights", str(seeded_inception), "--sha256", digest]
        compared = ["--generated", str(folders[0]), "--reference", str(folders[1])]
        written = ["--features", str(kept), "--output", str(output)]
        assert cli.main(["evaluate", *compared, "--extractor", name, *weights, *written]) == 0
        result = json.loads(output.read_text())
        scores = {}
        for key, entry in result["scores"].items():
            short = key.removesuffix(f"_{name}_{digest[:8]}")
            short = {"fd": "fid", "kd": "kid"}.get(short, short)
            scores[short] = entry["value"]
            if "deviation" in entry:
                scores[f"{short}_deviation"] = entry["deviation"]
        drawn = _table(kept, result["settings"]["generated"]["num_images"])
        return Ours(*(np.stack(drawn[key].to_pylist()) for key in (FEATURES, LOGITS)), scores)

    return of


def _table(kept: Path, num_images: int) -> pa.Table:
    """Features of the folder of so many pictures."""
    stores = [pa.concat_tables(map(pq.read_table, sorted(s.iterdir()))) for s in kept.iterdir()]
    (found,) = [store for store in stores if store.num_rows == num_images]
    return found


def _agrees_with_torch_fidelity(ours: Ours, said: Answers, step: int) -> None:
    """Every `step`-th feature and logit, and the scores."""
    for name in ("features", "logits"):
        theirs = said[f"fidelity/{name}"]
        close = {"rtol": 0, "atol": 1e-4 * abs(theirs).max()}
        np.testing.assert_allclose(getattr(ours, name)[:, ::step], theirs, **close)
    scores = ours.scores
    assert scores["fid"] == pytest.approx(said["fidelity/fid"], rel=1e-4)
    assert scores["is"] == pytest.approx(said["fidelity/is"], rel=1e-5)
    assert scores["is_deviation"] == pytest.approx(said["fidelity/is_deviation"], rel=1e-4)
    assert scores["kid"] == pytest.approx(said["fidelity/kid"], rel=1e-4)
    exact = said["fidelity/kid_float64"], said["fidelity/kid_float64_deviation"]
    assert (scores["kid"], scores["kid_deviation"]) == pytest.approx(exact, rel=1e-5, abs=1e-9)


def _agrees_with_pytorch_fid(ours: Ours, said: Answers, step: int) -> None:
    theirs = said["pytorch/features"]
    close = {"rtol": 0, "atol": 1e-4 * abs(theirs).max()}
    np.testing.assert_allclose(ours.features[: len(theirs), ::step], theirs, **close)
    assert ours.scores["fid"] == pytest.approx(said["pytorch/fid"], rel=1e-4)


def _thinned(answers: Answers) -> Answers:
    """What is recorded."""
    columns = {
        key: value[:, ::STEP].astype(np.float32)
        for key, value in answers.items()
        if key.endswith(("/features", "/logits"))
    }
    return answers | columns | {"clean/resized": answers["clean/resized"][::STEP, ::STEP]}


@pytest.mark.slow
def test_the_record_is_what_the_anchors_say(drawn, ask, tmp_path) -> None:
    answers = _thinned(ask(_save(drawn, tmp_path)))
    if not RECORDED.exists():  # to be made anew
        np.savez_compressed(RECORDED, **answers)
    recorded = _read(RECORDED)
    assert set(recorded) == set(answers)
    for key, value in answers.items():
        rounding = 1e-4 if key == "fidelity/kid" else 1e-5
        close = {"rtol": 0, "atol": rounding * np.abs(value).max() + 1e-9}
        np.testing.assert_allclose(recorded[key], value, **close)


def test_what_the_anchors_said(drawn, computed) -> None:
    said = _read(RECORDED)
    _agrees_with_torch_fidelity(computed("inception", drawn), said, STEP)
    _agrees_with_pytorch_fid(computed("inception_pytorch", drawn), said, STEP)
    resized = clean_input(torch.from_numpy(drawn[0][:1]))[0].permute(1, 2, 0).numpy()
    close = {"rtol": 0, "atol": 1e-3}
    np.testing.assert_allclose(resized[::STEP, ::STEP] * 128 + 128, said["clean/resized"], **close)


@pytest.mark.slow
def test_the_command_line_says_of_500_pictures_what_the_anchors_say(
    many, ask, evaluated, tmp_path, capsys
) -> None:
    folders = _save(many, tmp_path)
    said, ours = ask(folders), evaluated("inception", folders)
    _agrees_with_torch_fidelity(ours, said, 1)
    for share in ("precision", "recall"):
        assert ours.scores[share] == pytest.approx(said[f"fidelity/{share}"], abs=1e-6)
    of_pytorch = evaluated("inception_pytorch", folders)
    _agrees_with_pytorch_fid(of_pytorch, said, 1)
    shown = [
        (name, ours.scores[name], "torch-fidelity", said[f"fidelity/{name}"])
        for name in ("fid", "kid", "is", "is_deviation", "precision", "recall")
    ]
    shown += [
        ("kid", ours.scores["kid"], "torch-fidelity in float64", said["fidelity/kid_float64"]),
        ("fid", of_pytorch.scores["fid"], "pytorch-fid", said["pytorch/fid"]),
    ]
    with capsys.disabled():
        for name, value, anchor, theirs in shown:
            sys.stdout.write(f"\n{name:13} {value:<12.9g} {anchor} {theirs:.9g}")
