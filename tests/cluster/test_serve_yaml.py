"""The file for `serve deploy`: everything in it is known to Ray Serve and to us."""

from pathlib import Path

import pytest
import yaml

from pipelines.config import load_config

FILE = Path(__file__).parents[2] / "cluster" / "serve.yaml"


@pytest.fixture
def content():
    return yaml.safe_load(FILE.read_text())


def unknown_keys(given, known, path=""):
    """Keys of a tree that a schema's dump of it does not have: Serve ignores what it does not know."""
    if isinstance(given, list):
        return [key for a, b in zip(given, known, strict=True) for key in unknown_keys(a, b, path)]
    if not isinstance(given, dict) or path.endswith(".args"):
        return []
    return [f"{path}.{key}" for key in given if key not in known] + [
        key
        for name in given
        if name in known
        for key in unknown_keys(given[name], known[name], f"{path}.{name}")
    ]


def test_serve_knows_every_key(content):
    from ray.serve.schema import ServeDeploySchema

    known = ServeDeploySchema.model_validate(content).model_dump(mode="json")
    assert unknown_keys(content, known) == []
    content["http_options"]["hostt"] = "x"
    content["applications"][0]["route_prefixx"] = "/"
    known = ServeDeploySchema.model_validate(content).model_dump(mode="json")
    assert unknown_keys(content, known) == [".http_options.hostt", ".applications.route_prefixx"]


def test_the_application_is_ours_and_takes_these_arguments(content):
    from ray._common.utils import import_attr

    from pipelines.serving.ingress import Arguments, build

    application = content["applications"][0]
    assert import_attr(application["import_path"]) is build
    arguments = Arguments.model_validate(application["args"])
    load_config("coco512", arguments.overrides)


def test_it_listens_to_one_machine_as_long_as_anybody_may_draw(content):
    assert content["http_options"]["host"] == "127.0.0.1"
    assert "require_key" not in str(content)
