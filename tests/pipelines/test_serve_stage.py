"""The stage `serve` before Ray starts: what it refuses, what it warns of, what it would do."""

import dataclasses
import json
import logging

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines import cli, serve
from pipelines.config import UserError, load_config, to_yaml
from pipelines.serving.clients import KEYS_VARIABLE
from pipelines.serving.ingress import Arguments
from tests.pipelines.nodes import ask, shell


@pytest.fixture
def config(served):
    return load_config("demo", [f"run={json.dumps(str(served))}"])


def with_serve(config, **changes):
    return dataclasses.replace(config, serve=dataclasses.replace(config.serve, **changes))


def test_it_says_what_it_would_do(config, served, capsys, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, "anna: correct-horse-battery-staple")
    assert serve.check(config) == [
        f"serve {served}/model at http://127.0.0.1:8000 to anybody, with 1 to 1 replicas"
    ]
    (line,) = serve.check(with_serve(config, require_key=True, host="::1", max_replicas=3))
    assert line.endswith("at http://[::1]:8000 to 1 keys, with 1 to 3 replicas")
    (served / "config.yaml").write_text(to_yaml(config))
    assert cli.main(["serve", "--run", str(served), "--dry-run", "serve.port=8123"]) == 0
    assert "127.0.0.1:8123" in capsys.readouterr().out


def test_a_run_without_a_model_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing.*`layered train` makes it"):
        serve.check(dataclasses.replace(config, run=str(tmp_path)))


def test_serve_build_writes_a_file_of_the_run_that_the_environment_names(config, served, tmp_path):
    (served / "config.yaml").write_text(to_yaml(config))
    path = tmp_path / "serve.yaml"
    command = ["serve", "build", "pipelines.serving.ingress:app", "--output-path", str(path)]
    code, out, err = ask(command, shell(), 120)
    assert code != 0
    assert "is of the run that LAYERED_RUN names, and it is not set" in out + err
    code, out, err = ask(command, shell(LAYERED_RUN=str(served)), 120)
    assert code == 0, out + err
    (application,) = ServeDeploySchema(**yaml.safe_load(path.read_text())).applications
    assert application.import_path == "pipelines.serving.ingress:app"
    assert {one.name for one in application.deployments} == {"replica", "ingress"}


@pytest.mark.parametrize(
    "overrides",
    ["serve.max_rows=8 'sample.sampler=ddim'", ["serve.max_rows=8", "sample.sampler=ddim"]],
)
def test_overrides_come_as_a_list_or_as_words_of_a_command_line(overrides):
    arguments = Arguments(run="runs/demo", overrides=overrides)
    assert arguments.overrides == ["serve.max_rows=8", "sample.sampler=ddim"]


def test_keys_that_are_required_must_be_there(config, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(UserError, match="needs keys"):
        serve.check(with_serve(config, require_key=True))


@pytest.mark.parametrize(
    ("host", "require_key", "warned"),
    [
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
        ("0.0.0.0", False, True),
        ("0.0.0.0", True, False),
        ("10.1.2.3", False, True),
        ("pictures.example.org", False, True),
    ],
)
def test_who_can_be_reached_without_a_key_is_warned(config, caplog, host, require_key, warned):
    caplog.set_level(logging.WARNING)
    serve.warn_if_open(with_serve(config, host=host, require_key=require_key).serve)
    assert ("serve.require_key=true" in caplog.text) is warned


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.port=0", "serve.port=0 must be from 1 to 65535"),
        ("serve.max_rows=3", "serve.max_rows=3 must be even"),
        ("serve.max_replicas=0", "serve.max_replicas=0 must be at least serve.min_replicas=1"),
        ("serve.max_images=99", "serve.max_images=99 must be at most"),
        ("serve.cors_origins=[example.org]", "https://example.org"),
        ("serve.reload_seconds=0", "serve.reload_seconds=0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_named(override, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_config("demo", [override])
