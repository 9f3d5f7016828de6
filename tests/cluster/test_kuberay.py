"""KubeRay's manifests: of the form that Kubernetes takes, of one version, closed, and able to hold the paper's preset."""

import copy
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.manifests import fits, read

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY = CLUSTER / "kuberay"
CLUSTER_FILE, SERVICE_FILE = "kuberay/raycluster.yaml", "kuberay/serve/rayservice.yaml"
IMAGES = {"layered-cpu", "layered-gpu"}
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
CREDENTIAL = re.compile(
    r"\bAKIA[0-9A-Z]{12,}|-----BEGIN|\bhf_[A-Za-z0-9]{20,}|\bgh[ps]_[A-Za-z0-9]{20,}"
)


def ray_clusters(documents: dict) -> Iterator[tuple[str, dict[str, Any]]]:
    for file, objects in documents.items():
        for one in objects:
            for key, spec in (("spec", one.get("spec", {})), *nested(one)):
                if "headGroupSpec" in spec:
                    yield f"{file}: {key}", spec


def nested(one: dict) -> list:
    spec = one.get("spec", {})
    return [
        (f"spec.{key}", spec[key]) for key in ("rayClusterSpec", "rayClusterConfig") if key in spec
    ]


def pods(documents: dict) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, spec in ray_clusters(documents):
        yield f"{place}.headGroupSpec", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{place}.workerGroupSpecs[{group['groupName']}]", group["template"]


def containers(documents: dict) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, pod in pods(documents):
        for kind in ("initContainers", "containers"):
            for one in pod["spec"].get(kind, []):
                yield f"{place}.{kind}[{one['name']}]", one
    for place, spec in ray_clusters(documents):
        yield f"{place}.autoscalerOptions", spec["autoscalerOptions"]


def problems(documents: dict, ray_version: str) -> list[str]:
    """What is wrong beyond the schemas; each line names file and key."""
    found = []
    for place, spec in ray_clusters(documents):
        if spec.get("rayVersion") != ray_version:
            found.append(f"{place}.rayVersion: {spec.get('rayVersion')} is not {ray_version}")
        if spec.get("authOptions") != {"mode": "token"}:
            found.append(f"{place}.authOptions: no token is asked for")
        if not spec.get("enableInTreeAutoscaling") or spec["autoscalerOptions"]["version"] != "v2":
            found.append(f"{place}.autoscalerOptions: not the autoscaler of version 2")
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            found.append(f"{place}.headGroupSpec.rayStartParams: the head would work")
    for place, one in containers(documents):
        found += [f"{place}.{line}" for line in container_problems(one)]
    for place, pod in pods(documents):
        labels = pod["metadata"]["labels"]
        if labels.get("app.kubernetes.io/part-of") != "layered":
            found.append(f"{place}.metadata.labels: the network policy does not hold for it")
        volumes = {one["name"] for one in pod["spec"]["volumes"]}
        for one in pod["spec"]["containers"]:
            paths = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
            if not {"/tmp", "/home/layered"} <= set(paths) or not set(paths.values()) <= volumes:
                found.append(f"{place}.containers[{one['name']}].volumeMounts: {paths}")
    for file, objects in documents.items():
        found += [f"{file}: kind: a secret" for one in objects if one["kind"] == "Secret"]
        if CREDENTIAL.search(yaml.safe_dump_all(objects)):
            found.append(f"{file}: a credential is written out")
    return found


def container_problems(one: dict) -> Iterator[str]:
    context = one.get("securityContext", {})
    wanted = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for key, value in wanted.items():
        if context.get(key) != value:
            yield f"securityContext.{key}: {context.get(key)} is not {value}"
    if not context.get("runAsUser"):
        yield "securityContext.runAsUser: root, or the image's"
    if "image" in one and one["image"] not in IMAGES:
        yield f"image: {one['image']} has a version of its own; version/kustomization.yaml has the one"
    resources = one.get("resources", {})
    for kind in ("limits", "requests"):
        if not {"cpu", "memory"} <= set(resources.get(kind, {})):
            yield f"resources.{kind}: of cpu and memory not both"
    for variable in one.get("env", []):
        if SECRET.search(variable["name"]) and "value" in variable:
            yield f"env[{variable['name']}]: a credential is written out"


def test_every_object_is_of_its_kinds_form(kuberay, schema_errors):
    found = {
        f"{file}: {error}"
        for file, objects in kuberay.items()
        for one in objects
        for error in schema_errors(one)
    }
    assert found == set()
    kinds = {one["kind"] for objects in kuberay.values() for one in objects}
    assert {"RayCluster", "RayJob", "RayService", "NetworkPolicy"} < kinds


def test_versions_tokens_containers_and_secrets(kuberay, ray_version):
    assert problems(kuberay, ray_version) == []
    assert len(list(containers(kuberay))) == 3 + 1 + 2 + 1


def at(document, path):
    """The part of a document, and the last step to it."""
    for key in path[:-1]:
        document = document[key]
    return document, path[-1]


HEAD = ("spec", "headGroupSpec", "template", "spec", "containers", 0)
GPU = ("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (
            ("spec", "enableInTreeAutoscalingg"),
            True,
            r"\$\.spec: Additional .*enableInTreeAutoscalingg",
        ),
        (("specification",), {}, "specification"),
        (("spec", "workerGroupSpecs", 1, "maxReplica"), 2, "workerGroupSpecs.1.: .*maxReplica"),
        ((*HEAD, "resorces"), {}, "containers.0.: .*resorces"),
        ((*HEAD, "securityContext", "readOnlyRootFileSystem"), True, "readOnlyRootFileSystem"),
        ((*HEAD, "ports", 0, "containerPort"), "6379", "containerPort: '6379' is not of type"),
        ((*HEAD, "resources", "limits", "cpu"), "eight", "limits.cpu: 'eight' does not match"),
        (("spec", "authOptions", "mode"), "tokens", r"authOptions.mode: 'tokens' is not one of"),
        (
            ("spec", "autoscalerOptions", "idleTimeoutSeconds"),
            2**31,
            "idleTimeoutSeconds: .*maximum",
        ),
        (("spec", "workerGroupSpecs", 0, "groupName"), None, "groupName: None is not of type"),
        ((*HEAD, "volumeMounts"), [{"name": "a", "mountPath": "/a"}] * 2, "'/a'} occurs twice"),
        (("apiVersion",), "ray.io/v1alpha1", r"'ray.io/v1' was expected"),
    ],
)
def test_a_mistake_of_form_is_refused_where_it_stands(kuberay, schema_errors, path, value, told):
    (document,) = copy.deepcopy(kuberay[CLUSTER_FILE])
    place, key = at(document, path)
    place[key] = value
    assert any(re.search(told, error) for error in schema_errors(document)), schema_errors(document)


def test_what_is_missing_is_refused(kuberay, schema_errors):
    (document,) = copy.deepcopy(kuberay[CLUSTER_FILE])
    del document["spec"]["headGroupSpec"]["template"]
    assert schema_errors(document) == ["$.spec.headGroupSpec: 'template' is a required property"]
    assert schema_errors({"kind": "Deployment"}) == ["kind: Deployment is not known here"]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("spec", "rayVersion"), "2.59.0", "spec.rayVersion"),
        (("spec", "authOptions"), {"mode": "disabled"}, "spec.authOptions"),
        (("spec", "authOptions"), None, "spec.authOptions"),
        (("spec", "autoscalerOptions", "version"), "v1", "spec.autoscalerOptions"),
        (
            (*GPU, "securityContext"),
            {},
            "workerGroupSpecs[gpu].containers[ray-worker].securityContext",
        ),
        (
            (*GPU, "image"),
            "rayproject/ray:2.59.0",
            "workerGroupSpecs[gpu].containers[ray-worker].image",
        ),
        ((*GPU, "resources"), {}, "workerGroupSpecs[gpu].containers[ray-worker].resources.limits"),
        (
            (*HEAD, "env"),
            [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}],
            "containers[ray-head].env[AWS_SECRET_ACCESS_KEY]",
        ),
        ((*HEAD, "env"), [{"name": "A", "value": "AKIAIOSFODNN7EXAMPLE"}], "a credential"),
        ((*HEAD, "volumeMounts"), [], "containers[ray-head].volumeMounts"),
        (
            ("spec", "headGroupSpec", "template", "metadata", "labels"),
            {},
            "headGroupSpec.metadata.labels",
        ),
    ],
)
def test_a_mistake_is_named_by_file_and_key(kuberay, ray_version, path, value, told):
    documents = copy.deepcopy(kuberay)
    place, key = at(documents[CLUSTER_FILE][0], path)
    place[key] = value
    found = problems(documents, ray_version)
    assert found
    assert all(line.startswith(f"{CLUSTER_FILE}: ") for line in found)
    assert any(told in line for line in found), found


@pytest.mark.parametrize("key", ["runAsNonRoot", "readOnlyRootFilesystem", "runAsUser"])
def test_a_container_as_root_is_named(kuberay, ray_version, key):
    documents = copy.deepcopy(kuberay)
    place, last = at(
        documents[SERVICE_FILE][0]["spec"], ("rayClusterConfig", *HEAD[1:], "securityContext")
    )
    place[last] = place[last] | {key: 0}
    (line,) = problems(documents, ray_version)
    assert line.startswith(
        f"{SERVICE_FILE}: spec.rayClusterConfig.headGroupSpec.containers[ray-head]."
    )
    assert f"securityContext.{key}" in line


def test_the_service_serves_what_the_file_of_serve_deploy_does(kuberay):
    (service,) = kuberay[SERVICE_FILE]
    ours = yaml.safe_load(service["spec"]["serveConfigV2"])
    plain = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    # Reached from other machines, so with keys.
    plain["http_options"]["host"] = "0.0.0.0"
    plain["applications"][0]["args"]["overrides"].append("serve.require_key=true")
    assert ours == plain
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": ours["http_options"]["port"]} in container["ports"]
    (keys,) = [one for one in container["env"] if one["name"] == "LAYERED_API_KEYS"]
    assert "optional" not in keys["valueFrom"]["secretKeyRef"]
    config = load_config("coco512", ours["applications"][0]["args"]["overrides"])
    assert config.serve.max_replicas == group["maxReplicas"]
    assert config.serve.drain_seconds < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_papers_preset_fits():
    config = load_config("coco512", ["serve.max_replicas=4"])
    (cluster,) = read(CLUSTER / CLUSTER_FILE)
    assert fits(config, cluster.pools, ["prepare", "train", "evaluate"]) == []
    (service,) = read(CLUSTER / SERVICE_FILE)
    assert service.stages == ("serve",)
    assert fits(config, service.pools, service.stages) == []


def test_a_pool_that_is_too_small_is_named(tmp_path):
    text = (CLUSTER / CLUSTER_FILE).read_text()
    path = tmp_path / "raycluster.yaml"
    path.write_text(text.replace('nvidia.com/gpu: "8"', 'nvidia.com/gpu: "4"'))
    (cluster,) = read(path)
    (line,) = fits(load_config("coco512"), cluster.pools, ["train"])
    assert "raise spec.workerGroupSpecs[1].maxReplicas" in line


def test_jobs_run_stages_that_there_are_with_arguments_they_take(kuberay):
    from pipelines import commands

    for stage in ("prepare", "train", "evaluate"):
        (job,) = kuberay[f"kuberay/rayjob-{stage}.yaml"]
        cluster = job["spec"]["clusterSelector"]["ray.io/cluster"]
        assert cluster == kuberay[CLUSTER_FILE][0]["metadata"]["name"]
        words = job["spec"]["entrypoint"].split()
        assert words[:3] == ["python", "-m", f"pipelines.{stage}"]
        options = commands.stage_parser(stage).parse_intermixed_args(words[3:])
        if stage != "evaluate":
            load_config(options.preset, options.overrides)
        with pytest.raises(UserError, match="runs on a cluster that is there already"):
            read(KUBERAY / f"rayjob-{stage}.yaml")


def kustomizations():
    return {
        path.parent: yaml.safe_load(path.read_text())
        for path in KUBERAY.rglob("kustomization.yaml")
    }


def test_kustomize_finds_every_file_and_applies_every_file_but_jobs():
    named = set()
    for folder, content in kustomizations().items():
        assert set(content) <= {
            *("apiVersion", "kind", "namespace", "resources", "components", "images", "patches")
        }
        for name in content.get("resources", []):
            assert (folder / name).is_file(), f"{folder}: {name}"
            named.add(folder / name)
        for name in content.get("components", []):
            assert (folder / name / "kustomization.yaml").is_file()
    files = {path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert {path.name for path in files - named} == {
        f"rayjob-{stage}.yaml" for stage in ("prepare", "train", "evaluate")
    }


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply` would send."""
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("no kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("name", [".", "serve"])
def test_kustomize_gives_objects_of_the_right_form_and_images(schema_errors, ray_version, name):
    objects = kustomized(KUBERAY / name)
    for one in objects:
        assert schema_errors(one) == []
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "layered"
    images = [one["image"] for _, one in containers({name: objects}) if "image" in one]
    assert len(images) == (3 if name == "." else 2)
    for image in images:
        assert re.fullmatch(
            rf"registry\.example\.com/layered:[\d.]+-ray{ray_version}-(cpu|gpu)", image
        )


def test_kustomize_mounts_the_shared_volume_where_it_is_asked_to(tmp_path, schema_errors):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "kustomization.yaml"
    file.write_text(file.read_text().replace("  # - shared-volume", "  - shared-volume"))
    objects = kustomized(file.parent)
    assert "PersistentVolumeClaim" in {one["kind"] for one in objects}
    assert [error for one in objects for error in schema_errors(one)] == []
    for _, pod in pods({"kustomized": objects}):
        assert "/data" in [one["mountPath"] for one in pod["spec"]["containers"][0]["volumeMounts"]]


def test_one_place_says_which_images_run(ray_version):
    version = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]["version"]
    images = kustomizations()[KUBERAY / "version"]["images"]
    assert {one["name"] for one in images} == IMAGES
    for one in images:
        kind = one["name"].removeprefix("layered-")
        assert one["newTag"] == f"{version}-ray{ray_version}-{kind}"


def test_the_shared_volume_is_mounted_by_every_pod(kuberay, schema_errors):
    (document,) = copy.deepcopy(kuberay[CLUSTER_FILE])
    (patch,) = kustomizations()[KUBERAY / "shared-volume"]["patches"]
    # JSON Patch (RFC 6902), of which "add" at the end of a list is all that is used
    for step in yaml.safe_load(patch["patch"]):
        assert step["op"] == "add"
        *path, last = [int(one) if one.isdigit() else one for one in step["path"].split("/")[1:]]
        assert last == "-"
        place, key = at(document, path)
        place[key] = [*place[key], step["value"]]
    assert schema_errors(document) == []
    (claim,) = kuberay["kuberay/shared-volume/persistentvolumeclaim.yaml"]
    for _, pod in pods({"x": [document]}):
        mounts = [one["mountPath"] for one in pod["spec"]["containers"][0]["volumeMounts"]]
        assert mounts == ["/tmp", "/home/layered", "/data"]
        (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == "data"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_accounts_policies_and_budgets_mean_pods_that_there_are(kuberay):
    accounts = {one["metadata"]["name"] for one in kuberay["kuberay/serviceaccounts.yaml"]}
    labels = []
    for _, pod in pods(kuberay):
        assert pod["spec"]["serviceAccountName"] in accounts
        labels.append(set(pod["metadata"]["labels"].items()))
    for objects in kuberay.values():
        for one in objects:
            spec = one.get("spec", {})
            selector = spec.get("podSelector") or spec.get("selector")
            if one["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
                wanted = set(selector["matchLabels"].items())
                assert any(wanted <= of_pod for of_pod in labels), one["metadata"]["name"]


def test_only_the_port_that_serves_is_open_to_others(kuberay):
    (nodes,) = kuberay["kuberay/networkpolicies.yaml"]
    (serve,) = kuberay["kuberay/serve/networkpolicy.yaml"]
    for rule in nodes["spec"]["ingress"]:
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                assert {port["port"] for port in rule["ports"]} <= {8265, 8000, 8080, 44217, 44227}
    (rule,) = serve["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8000]
