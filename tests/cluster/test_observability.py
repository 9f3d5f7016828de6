"""The dashboard asks for metrics that there are: ours as they are exposed, Ray's as its own dashboards ask for them."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
NAME = re.compile(r"\b(?:ray|layered|autoscaler)_\w+")
LABELS = re.compile(r"by \(([^)]*)\)|\{(\w+)[=!]")


@pytest.fixture
def dashboard():
    return json.loads((CLUSTER / "grafana" / "layered.json").read_text())


@pytest.fixture(scope="module")
def ours() -> dict[str, set[str]]:
    """Our metrics as Prometheus reads them, with their labels."""
    from prometheus_client.parser import text_string_to_metric_families

    from pipelines.serving.meters import Meters
    from pipelines.serving.orders import Distribution, Work

    meters = Meters()
    meters.requests.labels("/v1/images/generations", "200").inc()
    meters.pictures.labels("32x32").observe(1)
    meters.previews.labels("32x32").observe(1)
    some = Distribution((1.0,), (1, 0), 1.0)
    work = Work(replica="a", active=1, waiting=0, rows=some, seconds=some)
    text = meters.exposition([work]).decode()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def rays() -> set[str]:
    folder = resources.files("ray.dashboard.modules.metrics.dashboards")
    sources = [one for one in folder.iterdir() if one.name.endswith("_panels.py")]
    return {name for source in sources for name in NAME.findall(source.read_text())}


def expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def metrics(expression: str) -> set[str]:
    """Names of metrics, without the labels that begin alike."""
    return set(NAME.findall(re.sub(r"by \([^)]*\)|\{[^}]*\}", "", expression)))


def test_every_metric_is_exported(dashboard, ours, rays):
    asked = {name for expression in expressions(dashboard) for name in metrics(expression)}
    assert asked - set(ours) - rays == set()
    assert "layered_requests_total" in asked
    assert "ray_node_gpus_utilization" in asked


def test_a_metric_that_is_not_exported_is_found(dashboard, ours, rays):
    (panel, *_) = [panel for panel in dashboard["panels"] if "targets" in panel]
    panel["targets"][0]["expr"] = "sum(layered_request_total) + ray_node_gpu_use"
    asked = {name for expression in expressions(dashboard) for name in metrics(expression)}
    assert asked - set(ours) - rays == {"layered_request_total", "ray_node_gpu_use"}


def test_ours_are_asked_by_labels_that_they_have(dashboard, ours):
    for expression in expressions(dashboard):
        for name in metrics(expression) & set(ours):
            for grouped, matched in LABELS.findall(expression):
                wanted = {one.strip() for one in (grouped or matched).split(",")}
                assert wanted <= ours[name], expression


def test_all_that_serving_measures_is_shown(dashboard, ours):
    shown = " ".join(expressions(dashboard))
    for name in ours:
        base = re.sub(r"_(total|created|bucket|sum|count)$", "", name)
        assert base in shown, base


def test_parentheses_close_and_panels_do_not_overlap(dashboard):
    assert all(text.count("(") == text.count(")") for text in expressions(dashboard))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_prometheus_reads_the_key_from_a_file():
    content = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in content["scrape_configs"]}
    assert set(jobs["layered"]["authorization"]) == {"type", "credentials_file"}
    assert jobs["layered"]["metrics_path"] == "/metrics"
    # YAML would read a bare yes as true
    (keep, _) = jobs["ray-on-kubernetes"]["relabel_configs"]
    assert keep["regex"] == "yes;metrics"
