"""Whether what a preset asks for can ever be given by the cluster that a manifest describes, before anything is rented.

    python -m pipelines.manifests cluster/aws.yaml --preset coco512
    python -m pipelines.manifests cluster/kuberay/raycluster.yaml --preset coco512 train.num_workers=4

A manifest is a file of Ray's cluster launcher, or one of KubeRay's RayCluster, RayJob and RayService. It is read as pools of
equal nodes, and the most nodes that these may ever have are checked by `session.check_resources`, as those of a running cluster
are, which cannot be asked how far its autoscaler may go. Each stage is checked at its full size, not at the least it starts with.
Called as a command, and by the tests of the manifests.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from pipelines import evaluate, prepare, serve, train
from pipelines.config import Config, load_config
from pipelines.errors import UserError
from pipelines.session import Needs, check_resources

STAGES = ("prepare", "train", "evaluate", "serve")
GPU_RESOURCE = "nvidia.com/gpu"

_ENTRYPOINT = re.compile(r"python -m pipelines\.(\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Equal nodes."""

    name: str
    "As the manifest has it."
    key: str
    "Where the manifest says how many there may be."
    cpus: float
    "That Ray may use, of each node."
    gpus: float
    "Of each node."
    max_nodes: int
    "At the most."


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What one manifest describes."""

    source: str
    "File and object, for messages."
    pools: tuple[Pool, ...]
    "The head among them."
    stages: tuple[str, ...]
    "That it is for."


def needs(config: Config, stage: str) -> Needs:
    """What a stage asks for at its full size, where a cluster can grow.

    Raises:
        UserError: there is no such stage.
    """
    options = config.evaluate
    if stage == "prepare":
        return prepare.needs(config)
    if stage == "train":
        return replace(train.needs(config), workers=config.train.num_workers)
    if stage == "evaluate":
        tasks = options.num_extractors * options.cpus_per_extractor + 1
        return replace(
            evaluate.needs(config), workers=options.num_samplers, cpus_for_tasks=float(tasks)
        )
    if stage == "serve":
        return replace(serve.needs(config), workers=config.serve.max_replicas)
    raise UserError(f"stage={stage!r} must be one of {', '.join(STAGES)}")


def fits(config: Config, pools: Sequence[Pool], stages: Sequence[str] = STAGES) -> list[str]:
    """What does not fit.

    Returns:
        A line for each stage whose workers, and the tasks beside them, the pools can never hold.
    """
    nodes = [{"CPU": pool.cpus, "GPU": pool.gpus} for pool in pools for _ in range(pool.max_nodes)]
    found = []
    for stage in stages:
        wanted = needs(config, stage)
        try:
            check_resources(wanted, nodes)
        except UserError:
            found.append(_misfit(wanted, pools))
    return found


def _misfit(wanted: Needs, pools: Sequence[Pool]) -> str:
    gpus = f" and {wanted.gpus_per_worker:g} GPU" if wanted.gpus_per_worker else ""
    there = ", ".join(
        f"{pool.name} {pool.max_nodes} x ({pool.cpus:g} CPU, {pool.gpus:g} GPU)" for pool in pools
    )
    useful = [pool for pool in pools if (pool.gpus > 0) == (wanted.gpus_per_worker > 0)] or pools
    return (
        f"{wanted.stage}: {wanted.workers} workers of {wanted.cpus_per_worker:g} CPU{gpus} each, and "
        f"{wanted.cpus_for_tasks:g} CPU for tasks, never fit into {there}; raise "
        f"{' or '.join(pool.key for pool in useful)}, or take larger machines"
    )


def read(path: str | Path) -> list[Cluster]:
    """The clusters that a file describes.

    Raises:
        UserError: the file is not there, not YAML, of no kind that is known here, or lacks what is read.
    """
    try:
        documents = [one for one in yaml.safe_load_all(Path(path).read_text()) if one is not None]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a manifest") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        clusters = [cluster for one in documents for cluster in _clusters(str(path), one)]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, AttributeError, ValueError, InvalidOperation) as error:
        raise UserError(f"{path}: not of a manifest's form: {error}") from error
    if not clusters:
        raise UserError(
            f"{path}: neither a file of `ray up` nor a RayCluster, RayJob or RayService"
        )
    return clusters


def _clusters(path: str, document: Mapping[str, Any]) -> Iterator[Cluster]:
    if "available_node_types" in document:
        yield Cluster(source=path, pools=tuple(_launched(path, document)), stages=STAGES)
        return
    kind, spec = document.get("kind"), document.get("spec", {})
    if kind == "RayCluster":
        yield Cluster(source=path, pools=tuple(_pods(spec, "spec")), stages=STAGES)
    elif kind == "RayJob":
        found = _ENTRYPOINT.search(spec["entrypoint"])
        if found is None or found[1] not in STAGES:
            raise UserError(
                f"{path}: spec.entrypoint={spec['entrypoint']!r} must be `python -m pipelines.` and one of "
                f"{', '.join(STAGES)}"
            )
        if "rayClusterSpec" not in spec:
            raise UserError(
                f"{path}: runs on a cluster that is there already, spec.clusterSelector={spec['clusterSelector']}; "
                "name the file of that one"
            )
        pools = tuple(_pods(spec["rayClusterSpec"], "spec.rayClusterSpec"))
        yield Cluster(source=path, pools=pools, stages=(found[1],))
    elif kind == "RayService":
        pools = tuple(_pods(spec["rayClusterConfig"], "spec.rayClusterConfig"))
        yield Cluster(source=path, pools=pools, stages=("serve",))


def _launched(path: str, document: Mapping[str, Any]) -> Iterator[Pool]:
    """Pools of the cluster launcher: https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html."""
    head, total = document["head_node_type"], 0
    for name, node in document["available_node_types"].items():
        key = f"available_node_types.{name}"
        if name != head and "max_workers" not in node:
            raise UserError(
                f"{path}: {key}.max_workers is missing; without it the pool has no bound"
            )
        max_nodes = 1 if name == head else node["max_workers"]
        total += 0 if name == head else max_nodes
        yield Pool(
            name=name,
            key=f"{key}.max_workers",
            cpus=node["resources"].get("CPU", 0),
            gpus=node["resources"].get("GPU", 0),
            max_nodes=max_nodes,
        )
    if total > document["max_workers"]:
        raise UserError(
            f"{path}: max_workers={document['max_workers']} is less than the {total} nodes that the pools may have together"
        )


def _pods(spec: Mapping[str, Any], key: str) -> Iterator[Pool]:
    """Pools of KubeRay: `ray start` is told the limits of a group's first container, CPUs rounded up."""
    head = spec["headGroupSpec"]
    yield _group(head, "head", f"{key}.headGroupSpec", 1)
    for number, group in enumerate(spec.get("workerGroupSpecs", [])):
        place = f"{key}.workerGroupSpecs[{number}]"
        yield _group(group, group["groupName"], f"{place}.maxReplicas", group["maxReplicas"])


def _group(group: Mapping[str, Any], name: str, key: str, max_nodes: int) -> Pool:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    told = group.get("rayStartParams", {})
    return Pool(
        name=name,
        key=key,
        cpus=float(told["num-cpus"]) if "num-cpus" in told else ceil(_quantity(limits["cpu"])),
        gpus=float(told.get("num-gpus", _quantity(limits.get(GPU_RESOURCE, 0)))),
        max_nodes=max_nodes,
    )


def _quantity(text: str | int) -> Decimal:
    """A number of CPUs or GPUs as Kubernetes writes it."""
    text = str(text)
    return Decimal(text[:-1]) / 1000 if text.endswith("m") else Decimal(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each stage; exit code 2 where one does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.manifests",
        description="Whether what a preset asks for can ever be given by the clusters that a manifest describes.",
    )
    parser.add_argument("manifest", help="file of `ray up`, or KubeRay's")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `layered`")
    parser.add_argument("--preset", required=True, help="name in the configuration")
    parser.add_argument("--config", help="another file than ray_config.yaml")
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    options = parser.parse_intermixed_args(argv)
    try:
        config = load_config(options.preset, options.overrides, options.config)
        clusters = read(options.manifest)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    failed = 0
    for cluster in clusters:
        for stage in [options.stage] if options.stage else cluster.stages:
            misfits = fits(config, cluster.pools, [stage])
            failed += len(misfits)
            for line in misfits:
                sys.stderr.write(f"error: {cluster.source}: {line}\n")
            if not misfits:
                sys.stdout.write(f"{cluster.source}: {stage} of {config.preset} fits\n")
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
