"""Whether a preset fits the manifests: the paper's fits those that are here, and one that does not is told."""

from pathlib import Path

import pytest
import yaml

from pipelines import manifests
from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.manifests import STAGES, Pool, fits, needs, read

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(scope="module")
def coco512():
    return load_config("coco512")


def pool(name="gpu", **changes):
    given = {"key": f"{name}.max_workers", "cpus": 92.0, "gpus": 8.0, "max_nodes": 1}
    return Pool(name=name, **{**given, **changes})


def test_a_stage_is_checked_at_its_full_size(coco512):
    sizes = {stage: needs(coco512, stage) for stage in STAGES}
    assert sizes["prepare"].workers == coco512.text.num_actors == 8
    assert (sizes["prepare"].cpus_per_worker, sizes["prepare"].gpus_per_worker) == (1, 0)
    assert needs(load_config("coco512", ["text.use_gpu=true"]), "prepare").gpus_per_worker == 1
    assert (sizes["train"].workers, sizes["train"].cpus_per_worker) == (8, 8)
    assert sizes["evaluate"].workers == coco512.evaluate.num_samplers == 8
    assert sizes["evaluate"].cpus_for_tasks == 4 * 2 + 1
    assert sizes["serve"].workers == coco512.serve.max_replicas
    elastic = load_config("coco512", ["train.min_workers=7", "train.batch_size=448"])
    assert needs(elastic, "train").workers == 8
    with pytest.raises(UserError, match="stage='sample' must be one of prepare, train"):
        needs(coco512, "sample")


@pytest.mark.parametrize("preset", ["coco512", "coco1024", "photo128", "emoji128"])
@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_presets_fit_the_launchers(preset, name):
    config = load_config(preset)
    (cluster,) = read(CLUSTER / name)
    assert cluster.stages == STAGES
    assert fits(config, cluster.pools) == []


def test_what_does_not_fit_names_the_stage_and_the_key_to_raise(coco512):
    cpu = pool("cpu", cpus=32.0, gpus=0.0, max_nodes=4)
    assert fits(coco512, [cpu, pool()]) == []
    (line,) = fits(coco512, [cpu, pool(gpus=4.0)], ["train"])
    assert line.startswith("train: 8 workers of 8 CPU and 1 GPU each")
    assert "gpu 1 x (92 CPU, 4 GPU); raise gpu.max_workers" in line
    # Enough GPUs, of nodes too small for one worker
    assert fits(coco512, [pool(cpus=4.0, gpus=1.0, max_nodes=8)], ["train"])
    assert fits(coco512, [pool(cpus=8.0, gpus=1.0, max_nodes=8)], ["train"]) == []
    (line,) = fits(coco512, [pool("cpu", cpus=4.0, gpus=0.0)], ["prepare"])
    assert "raise cpu.max_workers" in line


def test_pods_are_counted_as_kuberay_counts_them(tmp_path):
    def group(limits, **told):
        containers = [{"resources": {"limits": limits}}]
        return {"rayStartParams": told, "template": {"spec": {"containers": containers}}}

    cluster = {
        "headGroupSpec": group({"cpu": "4"}, **{"num-cpus": "0"}),
        "workerGroupSpecs": [
            group({"cpu": "7500m", "nvidia.com/gpu": 2}) | {"groupName": "gpu", "maxReplicas": 3}
        ],
    }
    path = tmp_path / "job.yaml"
    job = {"entrypoint": "python -m pipelines.train --preset demo", "rayClusterSpec": cluster}
    path.write_text(yaml.safe_dump({"kind": "RayJob", "spec": job}))
    (found,) = read(path)
    assert found.stages == ("train",)
    head, gpu = found.pools
    assert (head.cpus, head.max_nodes) == (0, 1)
    assert (gpu.cpus, gpu.gpus, gpu.max_nodes) == (8, 2, 3)
    assert gpu.key == "spec.rayClusterSpec.workerGroupSpecs[0].maxReplicas"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("max_workers: 5 -> max_workers: 4", "max_workers=4 is less than the 5 nodes"),
        ("    max_workers: 1\n -> ", "available_node_types.gpu.max_workers is missing"),
        ("available_node_types: -> node_types:", "neither a file of `ray up` nor a RayCluster"),
        ("head_node_type: head -> ", "head_node_type is missing"),
        ("cluster_name: layered -> [", "not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path, capsys, change, told):
    path = tmp_path / "aws.yaml"
    old, new = change.split(" -> ")
    text = (CLUSTER / "aws.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert manifests.main([str(path), "--preset", "coco512"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert told in line


def test_the_command_says_so_of_each_stage(capsys):
    aws = str(CLUSTER / "aws.yaml")
    assert manifests.main([aws, "--preset", "coco512"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(STAGES)
    assert (
        manifests.main([aws, "--preset", "coco512", "--stage", "train", "train.num_workers=16"])
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {aws}: train: 16 workers of 8 CPU and 1 GPU")
    assert manifests.main(["nowhere.yaml", "--preset", "coco512"]) == 2
    assert "nowhere.yaml: No such file" in capsys.readouterr().err
    assert manifests.main([aws, "--preset", "coco"]) == 2
    assert "preset='coco' must be one of" in capsys.readouterr().err
