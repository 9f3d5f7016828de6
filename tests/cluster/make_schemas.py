"""Makes schemas/kuberay.json from a clone of KubeRay (https://github.com/ray-project/kuberay, Apache-2.0).

    python tests/cluster/make_schemas.py CLONE v1.7.0

Of the custom resources' schemas it drops descriptions and defaults, says each part that occurs twice once, and turns what
Kubernetes means into JSON Schema: a key that is not listed is refused, as `kubectl apply --validate=strict` does; what is
nullable may be null; int32 and int64 have bounds. Rules in CEL (x-kubernetes-validations) are left out. PersistentVolumeClaim,
NetworkPolicy and PodDisruptionBudget are put together from the parts of them that those schemas hold; ServiceAccount and
Namespace are short.
"""

import collections
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import yaml

TARGET = Path(__file__).parent / "schemas" / "kuberay.json"
FOLDER = "helm-chart/kuberay-operator/crds"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
KEPT = {
    "anyOf",
    "enum",
    "items",
    "maxLength",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "required",
    "x-kubernetes-list-map-keys",
}
BOUNDS = {"int32": 2**31, "int64": 2**63}
SHORT = 200
"""Characters of JSON below which repeating a part is shorter than naming it."""

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        "namespace": {"type": "string"},
        "labels": STRINGS,
        "annotations": STRINGS,
    },
    "required": ["name"],
    "additionalProperties": False,
}


def strict(node):
    """A part of an OpenAPI v3 schema of Kubernetes, as JSON Schema."""
    made = {key: value for key, value in node.items() if key in KEPT}
    if "items" in made:
        made["items"] = strict(made["items"])
    if "anyOf" in made:
        made["anyOf"] = [strict(one) for one in made["anyOf"]]
    if "type" in node:
        made["type"] = [node["type"], "null"] if node.get("nullable") else node["type"]
    if bound := BOUNDS.get(node.get("format", "")):
        made = {"minimum": -bound, "maximum": bound - 1} | made
    if node.get("type") == "object":
        preserved = node.get("x-kubernetes-preserve-unknown-fields")
        others = node.get("additionalProperties", bool(preserved) or "properties" not in node)
        made["additionalProperties"] = strict(others) if isinstance(others, dict) else others
    if "properties" in node:
        made["properties"] = {name: strict(one) for name, one in node["properties"].items()}
    return made


def plain(kind, version, spec=None, **others):
    """A whole object of Kubernetes."""
    properties = {
        "apiVersion": {"const": version},
        "kind": {"const": kind},
        "metadata": METADATA,
        **({"spec": spec} if spec else {}),
        **others,
    }
    required = ["apiVersion", "kind", "metadata", *(["spec"] if spec else [])]
    return listed(properties, required)


def listed(properties, required):
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def found(node, name):
    """The first part below that has this name."""
    for key, one in node.get("properties", {}).items():
        if key == name:
            return one
        if (below := found(one, name)) is not None:
            return below
    return found(node["items"], name) if "items" in node else None


def named(schemas):
    """Parts that occur more than once, under names, and references to them in their place."""
    counts = collections.Counter()

    def key(node):
        return json.dumps(node, sort_keys=True, separators=(",", ":"))

    def count(node):
        if isinstance(node, dict):
            if "type" in node or "anyOf" in node:
                counts[key(node)] += 1
            for one in node.values():
                count(one)
        elif isinstance(node, list):
            for one in node:
                count(one)

    count(schemas)
    parts = {}

    def replaced(node, top=False):
        if isinstance(node, list):
            return [replaced(one) for one in node]
        if not isinstance(node, dict):
            return node
        text = key(node)
        below = {name: replaced(one) for name, one in node.items()}
        if top or len(text) < SHORT or counts[text] < 2:
            return below
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts[name] = below
        return {"$ref": f"#/$defs/{name}"}

    made = {kind: replaced(schema, top=True) for kind, schema in schemas.items()}
    return {"$defs": parts | made}


def main(clone, version):
    schemas = {}
    for kind, plural in KINDS.items():
        path = f"{version}:{FOLDER}/ray.io_{plural}.yaml"
        text = subprocess.run(
            ["git", "-C", clone, "show", path], capture_output=True, check=True
        ).stdout
        (crd,) = [
            one["schema"]["openAPIV3Schema"]
            for one in yaml.safe_load(text)["spec"]["versions"]
            if one["name"] == "v1"
        ]
        schemas[kind] = plain(kind, "ray.io/v1", strict(crd["properties"]["spec"]))
    cluster = schemas["RayCluster"]
    rules = found(cluster, "networkPolicy")
    selector = found(cluster, "podSelector")
    number = {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+%$"}]
    }
    schemas |= {
        "PersistentVolumeClaim": plain(
            "PersistentVolumeClaim", "v1", found(found(cluster, "volumeClaimTemplate"), "spec")
        ),
        "NetworkPolicy": plain(
            "NetworkPolicy",
            "networking.k8s.io/v1",
            listed(
                {
                    "podSelector": selector,
                    "policyTypes": {
                        "type": "array",
                        "items": {"enum": ["Ingress", "Egress"]},
                    },
                    "ingress": found(rules, "ingressRules"),
                    "egress": found(rules, "egressRules"),
                },
                ["podSelector"],
            ),
        ),
        "PodDisruptionBudget": plain(
            "PodDisruptionBudget",
            "policy/v1",
            listed(
                {"selector": selector, "minAvailable": number, "maxUnavailable": number},
                ["selector"],
            ),
        ),
        "ServiceAccount": plain(
            "ServiceAccount", "v1", automountServiceAccountToken={"type": "boolean"}
        ),
        "Namespace": plain("Namespace", "v1"),
    }
    about = (
        f"KubeRay {version}, https://github.com/ray-project/kuberay, Apache-2.0; its {FOLDER}, reduced by "
        "tests/cluster/make_schemas.py"
    )
    made = {"$comment": about} | named(schemas)
    lines = [
        f"{json.dumps(name)}: {json.dumps(part, sort_keys=True, separators=(',', ':'))}"
        for name, part in sorted(made["$defs"].items())
    ]
    content = f'{{"$comment": {json.dumps(about)}, "$defs": {{\n' + ",\n".join(lines) + "\n}}\n"
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
