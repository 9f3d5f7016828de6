"""Files of `ray up`: valid to Ray itself, of the Ray that is pinned, with tokens, and able to hold what the presets ask for."""

import copy
import re
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ["aws.yaml", "gcp.yaml"]
VERSION = re.compile(r"rayproject/ray:([0-9.]+)-py311")


@pytest.fixture(params=FILES)
def launcher(request):
    return yaml.safe_load((CLUSTER / request.param).read_text())


def problems(launcher: dict, ray_version: str) -> list[str]:
    """What is wrong beyond Ray's own schema."""
    found = []
    docker = launcher["docker"]
    for name, image in [
        *((f"docker.{kind}_image", docker[f"{kind}_image"]) for kind in ("head", "worker")),
        *(
            (f"available_node_types.{name}.docker.worker_image", node["docker"]["worker_image"])
            for name, node in launcher["available_node_types"].items()
            if "docker" in node
        ),
    ]:
        if VERSION.findall(image) != [ray_version]:
            found.append(f"{name}={image}: not of Ray {ray_version}")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in launcher[key]:
            if "ray start" in command and not command.startswith("RAY_AUTH_MODE=token ray start"):
                found.append(f"{key}: starts without RAY_AUTH_MODE=token")
    if "--dashboard-host=127.0.0.1" not in launcher["head_start_ray_commands"][-1]:
        found.append("head_start_ray_commands: the dashboard listens to more than the head")
    if "--env RAY_AUTH_MODE=token" not in docker["run_options"]:
        found.append("docker.run_options: no --env RAY_AUTH_MODE=token")
    if launcher["file_mounts"].get("/home/ray/.ray/auth_token") != "~/.ray/auth_token":
        found.append("file_mounts: the token does not go to /home/ray/.ray/auth_token")
    if re.search(r"AKIA|SECRET|private_key\b|PASSWORD", str(launcher)):
        found.append("a credential is written out")
    return found


def test_a_host_that_is_gone_is_missed_soon_and_alike_by_all_nodes():
    from ray._raylet import Config

    waits, *others = (
        dict(re.findall(r"RAY_(grpc_client_keepalive_\w+)=(\d+)", (CLUSTER / name).read_text()))
        for name in ("Dockerfile", *FILES)
    )
    assert others == [waits, waits]
    assert set(waits) == {"grpc_client_keepalive_time_ms", "grpc_client_keepalive_timeout_ms"}
    assert all(int(wait) < getattr(Config, name)() for name, wait in waits.items())


def test_ray_accepts_it(launcher, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(launcher))
    validate_config(prepared)
    # In its own words, not by Ray's defaults, whose dashboard listens to all.
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[key] == launcher[key]


@pytest.fixture(scope="module")
def ec2_errors():
    """What the interface of EC2 refuses in a node's configuration, which Ray hands on as it is."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape

    def errors(node_config: dict) -> str:
        given = node_config | {"MinCount": 1, "MaxCount": 1}
        return ParamValidator().validate(given, shape).generate_report()

    return errors


def test_ec2_takes_every_node(ec2_errors):
    launcher = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    for node in launcher["available_node_types"].values():
        assert ec2_errors(node["node_config"]) == ""
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    config = launcher["available_node_types"]["gpu"]["node_config"]
    assert 'Unknown parameter in input: "InstanceMarketOption"' in ec2_errors(
        config | {"InstanceMarketOption": {}}
    )
    assert "Invalid type for parameter IamInstanceProfile" in ec2_errors(
        config | {"IamInstanceProfile": "layered-worker"}
    )


@pytest.mark.parametrize(
    "path", [("max_workerz",), ("available_node_types", "gpu", "max_worker"), ("docker", "imag")]
)
def test_ray_refuses_a_misspelt_key(launcher, path):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    place = launcher
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        validate_config(prepare_config(launcher))


def test_ray_refuses_a_part_of_a_gpu(launcher):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    launcher["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match=r"0\.5 is not of type 'integer'"):
        validate_config(prepare_config(launcher))


def test_versions_tokens_and_the_dashboard(launcher, ray_version):
    assert problems(launcher, ray_version) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (
            ("docker", "head_image"),
            "docker.io/rayproject/ray:2.59.0-py311-cpu",
            "docker.head_image",
        ),
        (
            ("available_node_types", "gpu", "docker", "worker_image"),
            "docker.io/rayproject/ray:latest-gpu",
            "available_node_types.gpu.docker.worker_image",
        ),
        (("worker_start_ray_commands",), ["ray start --address=$RAY_HEAD_IP:6379"], "worker_start"),
        (("docker", "run_options"), [], "docker.run_options"),
        (("file_mounts",), {}, "file_mounts"),
        (("auth",), {"ssh_user": "u", "ssh_private_key": "AKIAEXAMPLE"}, "a credential"),
        (
            ("head_start_ray_commands",),
            ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"],
            "head_start_ray_commands: the dashboard",
        ),
    ],
)
def test_a_mistake_is_named(launcher, ray_version, path, value, told):
    place = launcher
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (line,) = problems(launcher, ray_version)
    assert line.startswith(told)


def test_the_head_does_no_work_and_every_pool_is_bounded(launcher):
    nodes = launcher["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in nodes.items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) == launcher["max_workers"]


def test_every_file_that_is_mounted_is_there(launcher):
    for source in launcher["file_mounts"].values():
        assert source.startswith("~") or (CLUSTER.parent / source).exists(), source


def test_what_is_installed_is_what_is_pinned(launcher):
    commands = [*launcher["setup_commands"], *launcher["head_setup_commands"]]
    assert all("--constraint " in command for command in commands if "pip install" in command)
    for command in (command for command in commands if "pip install" in command):
        (package,) = re.findall(r"(\S+)$", command)
        # The package itself, what is pinned there, or what says its version here
        pinned = f"\n{package}==" in (CLUSTER.parent / "constraints.txt").read_text()
        assert package == "." or pinned or "==" in package, command
