"""`layered sample --server` with the real interface."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cli, sample
from pipelines.errors import StageFailed, UserError
from pipelines.sample import Remote
from pipelines.serving.answers import EncodedPicture
from pipelines.serving.client import Client

# The network's own tests check its shapes; here that would make drawing three times as slow.
pytestmark = pytest.mark.usefixtures("unchecked")

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("LAYERED_API_KEY", raising=False)


@pytest.fixture
def remote(server, tmp_path):
    return Remote(
        server=server.url,
        prompt="A red  apple!",
        num_images=2,
        seed=7,
        num_steps=3,
        guidance=3.0,
        size=None,
        output=str(tmp_path / "out"),
    )


def names(paths):
    return [Path(path).name for path in paths]


def test_files_are_the_servers_and_equal_to_the_bit_what_is_drawn_here(
    remote, small_pipeline, capsys, monkeypatch
) -> None:
    sent, draw = {}, Client.draw

    def overheard(client, *rest, **options):
        for event in draw(client, *rest, **options):
            if isinstance(event, EncodedPicture):
                sent[event.seed] = event.content
            yield event

    monkeypatch.setattr(Client, "draw", overheard)
    paths = sample.run_remote(remote)
    folder = Path(remote.output)
    expected = ["a-red-apple-7-32px.png", "a-red-apple-8-32px.png", "a-red-apple-7-sheet.png"]
    assert paths == [str(folder / name) for name in expected]
    assert sorted(names(folder.iterdir())) == sorted(expected)
    assert capsys.readouterr().out.splitlines() == paths
    ours = small_pipeline(["A red  apple!"] * 2, seed=7, num_steps=3, guidance=3.0).images[32]
    for path, seed, picture in zip(paths, (7, 8), ours, strict=False):
        assert Path(path).read_bytes() == sent[seed]
        with Image.open(path) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(picture))
            assert drawn.text["prompt"] == "A red  apple!"
            assert (drawn.text["seed"], drawn.text["num_steps"]) == (str(seed), "3")
            assert drawn.text["model_sha256"] == small_pipeline.weights_sha256
    with Image.open(paths[-1]) as sheet:
        assert (sheet.text["prompt"], sheet.text["seed"]) == ("A red  apple!", "7")


def test_more_pictures_than_the_server_draws_at_once_are_asked_for_in_parts(
    serve_app, remote, monkeypatch
) -> None:
    asked, draw = [], Client.draw

    def counted(client, *rest, **options):
        asked.append((options["seed"], options["num_images"]))
        yield from draw(client, *rest, **options)

    monkeypatch.setattr(Client, "draw", counted)
    whole = sample.run_remote(dataclasses.replace(remote, num_images=5))
    assert asked == [(7, 5)]
    content = [Path(path).read_bytes() for path in whole]
    with serve_app(max_images=2, max_previews=0) as server:
        parts = dataclasses.replace(remote, num_images=5, server=f"{server.url}/v1/")
        assert sample.run_remote(parts) == whole
    assert asked[1:] == [(7, 2), (9, 2), (11, 1)]
    assert [Path(path).read_bytes() for path in whole] == content


def test_the_command_line_needs_neither_run_nor_preset(
    server, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "a cat", "--server", server.url, "--seed", "11", "--num-images", "1"]
    assert cli.main([*command, "--size", "16", "--num-steps", "4", "--guidance", "1.5"]) == 0
    folder = tmp_path / "samples"
    paths = [folder / "a-cat-11-16px.png", folder / "a-cat-11-sheet.png"]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    with Image.open(paths[0]) as picture:
        assert picture.size == (16, 16)
        assert (picture.text["num_steps"], picture.text["guidance"]) == ("4", "1.5")


def test_without_a_seed_pictures_differ_and_their_seed_is_told(remote, caplog) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    random = dataclasses.replace(remote, seed=None, num_images=1)
    first, second = (names(sample.run_remote(random))[0] for _ in range(2))
    assert first != second
    for name in (first, second):
        assert f"sample seed={name.split('-')[3]} " in caplog.text


def test_how_far_it_is_is_told(remote, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    monkeypatch.setattr(sample.Progress, "LINE_SECONDS", 0.0)
    sample.run_remote(dataclasses.replace(remote, num_images=1, num_steps=8))
    for done, step in ((0, 2), (0, 4), (0, 6), (1, 8)):
        line = f"progress stage=sample done={done} total=1 unit=images "
        end = f"seed=7 step={step}/8"
        assert any(told.startswith(line) and told.endswith(end) for told in caplog.messages)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(server, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    command = ["sample", "a cat", "--server", server.url, "--dry-run", "--output", str(folder)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert f"draw 4 pictures of 32 pixels with the model small of {server.url}" in said
    assert str(folder) in said
    assert not folder.exists()
    assert cli.main([*command, "--size", "64"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 64}, "size=64 must be one of 8, 16, 32, as small draws"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"num_steps": 999}, "num_steps=999 must be at most 250"),
        ({"server": "localhost"}, "server='localhost' must be a URL such as"),
    ],
)
def test_a_mistake_is_one_line(remote, change, message) -> None:
    with pytest.raises(UserError, match=message):
        sample.run_remote(dataclasses.replace(remote, **change))


def test_the_key_is_the_environments_and_is_never_shown(
    serve_app, tmp_path, monkeypatch, capfd, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("LAYERED_API_KEYS", f"me: {KEY}")
    with serve_app(require_key=True) as server:
        command = ["sample", "a cat", "--server", server.url, "--output", str(tmp_path)]
        assert cli.main(command) == 2
        assert "LAYERED_API_KEY is not set; give one" in capfd.readouterr().err
        monkeypatch.setenv("LAYERED_API_KEY", f"{KEY}x")
        assert cli.main(command) == 2
        monkeypatch.setenv("LAYERED_API_KEY", KEY)
        assert cli.main(command) == 0
        assert cli.main([*command, "--num-steps", "999"]) == 2
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_what_was_drawn_before_the_server_failed_is_kept(remote, monkeypatch) -> None:
    draw = Client.draw

    def failing(client, *rest, **options):
        for event in draw(client, *rest, **options):
            yield event
            if isinstance(event, EncodedPicture):
                raise StageFailed("the connection was lost")

    monkeypatch.setattr(Client, "draw", failing)
    with pytest.raises(StageFailed, match="the connection was lost"):
        sample.run_remote(remote)
    (kept,) = Path(remote.output).iterdir()
    with Image.open(kept) as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("damage", ["none", "cut", "size"])
def test_what_is_no_picture_is_refused(remote, monkeypatch, damage) -> None:
    draw = Client.draw

    def damaged(client, *rest, **options):
        if damage == "size":
            options["resolution"] = 16
        for event in draw(client, *rest, **options):
            if isinstance(event, EncodedPicture) and damage != "size":
                content = b"<html>" if damage == "none" else event.content[:-200]
                event = dataclasses.replace(event, content=content)
            yield event

    monkeypatch.setattr(Client, "draw", damaged)
    with pytest.raises(StageFailed, match="sent what is no PNG picture of 32 pixels"):
        sample.run_remote(remote)
    assert list(Path(remote.output).iterdir()) == []
