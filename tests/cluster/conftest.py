"""The files of cluster/, the versions they must agree with, and KubeRay's schemas, which refuse a key they do not know."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(scope="session")
def ray_version() -> str:
    """As pinned."""
    text = (CLUSTER.parent / "constraints.txt").read_text()
    return re.search(r"^ray==(\S+)$", text, re.MULTILINE)[1]


@pytest.fixture
def kuberay() -> dict[str, list[dict[str, Any]]]:
    """Objects of each file, as Kubernetes gets them but for what kustomize changes."""
    files = sorted((CLUSTER / "kuberay").rglob("*.yaml"))
    return {
        str(path.relative_to(CLUSTER)): list(yaml.safe_load_all(path.read_text()))
        for path in files
        if path.name != "kustomization.yaml"
    }


def _unique(validator, keys, items, schema):
    """Of `x-kubernetes-list-map-keys`: items of a list that is a map, such as `env`, differ in their key."""
    seen = [tuple(item.get(key) for key in keys) for item in items if isinstance(item, dict)]
    for place in {one for one in seen if seen.count(one) > 1}:
        yield jsonschema.ValidationError(f"{dict(zip(keys, place, strict=True))} occurs twice")


@pytest.fixture(scope="session")
def schema_errors() -> Callable[[dict[str, Any]], list[str]]:
    """What KubeRay's custom resources, and Kubernetes' own kinds, refuse in an object: ``path: why`` each."""
    schemas = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
    validator = jsonschema.validators.extend(
        jsonschema.Draft202012Validator, {"x-kubernetes-list-map-keys": _unique}
    )

    def errors(document: dict[str, Any]) -> list[str]:
        kind = document.get("kind")
        if kind not in schemas["$defs"]:
            return [f"kind: {kind} is not known here"]
        checked = validator(schemas | {"$ref": f"#/$defs/{kind}"})
        return [f"{error.json_path}: {error.message}" for error in checked.iter_errors(document)]

    return errors
