"""Extractors as a configuration names them, and an evaluation with one that knows no classes."""

import dataclasses
import hashlib

import pytest
import torch

from layered_model import inception
from pipelines import extractors
from pipelines.config import UserError, load_config


@pytest.fixture
def options():
    """Makes the section of a configuration."""

    def make(**changes):
        return dataclasses.replace(load_config("demo").evaluate, **changes)

    return make


def test_weights_of_ones_own_are_asked_to_be_stated(options, seeded_inception) -> None:
    ours = options(extractor="inception_clean", extractor_weights=str(seeded_inception))
    with pytest.raises(
        UserError, match=r"evaluate.extractor='inception_clean', .*evaluate.extractor_sha256"
    ):
        extractors.load(ours)
    sha256 = hashlib.sha256(seeded_inception.read_bytes()).hexdigest()
    found = extractors.load(dataclasses.replace(ours, extractor_sha256=sha256))
    assert found.score_name("fd") == f"fd_inception_clean_{sha256[:8]}"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("inception", "no.pth", r"KEY='inception', WEIGHTS='no.pth': .*No such file.*no.pth"),
        ("inception", "memory://no.pth", r"WEIGHTS='memory://no.pth': .*no.pth"),
        ("clip", "./nowhere", r"nowhere: .*name a directory"),
        ("clip", "s3://bucket/clip", r"WEIGHTS='s3://bucket/clip': takes a local directory"),
        ("efficientnet_lite0", "some.pth", "package and takes no others"),
    ],
)
@pytest.mark.parametrize("names", [extractors.KEYS, extractors.OPTIONS])
def test_weights_that_cannot_be_loaded_are_one_line(name, weights, message, names) -> None:
    """Which has the names that the user gave."""
    message = message.replace("KEY", names.extractor).replace("WEIGHTS", names.weights)
    with pytest.raises(UserError, match=message) as caught:
        extractors.load_named(name, "cpu", weights, None, names)
    assert "\n" not in str(caught.value)


def test_published_weights_that_are_not_at_hand_are_asked_for(tmp_path, monkeypatch) -> None:
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    monkeypatch.setattr(inception, "WEIGHTS_URL", "http://127.0.0.1:9/weights.pth")
    try:
        with pytest.raises(UserError, match=r"--extractor='inception': .* its path as --weights"):
            extractors.load_named("inception", "cpu", None, None)
    finally:
        torch.hub.set_dir(before)
