"""What networks cost: multiply-adds counted on the meta device, where nothing is computed."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layered_model.growth import check_growth
from layered_model.presets import PRESETS
from layered_model.unet import make_network
from pipelines.config import load_config

ROOT = Path(__file__).parents[2]
TOKENS = 64


pytestmark = pytest.mark.usefixtures("unchecked")


@functools.cache
def cost(config, num_tokens=TOKENS, num_layers=None):
    """Multiply-adds of one forward pass of one picture, and parameters."""
    with torch.device("meta"):
        network = make_network(config)
        x = [torch.empty(1, 3, r, r) for r in config.layers[:num_layers]]
        text = torch.empty(1, num_tokens, config.text_width)
        mask = torch.ones(1, num_tokens, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            network(x, torch.zeros(1), text, mask)
    return counter.get_total_flops() / 2, sum(p.numel() for p in network.parameters())


def ratio(config, num_tokens=TOKENS):
    """Multiply-adds of the layered network over those of the single-scale network of the same shape."""
    single = dataclasses.replace(config, kind="single_scale")
    return cost(config, num_tokens)[0] / cost(single, num_tokens)[0]


@pytest.mark.parametrize("preset", ["emoji128", "photo128"])  # the others are those of a name below
def test_so_does_each_preset_of_the_pipeline(preset):
    config = load_config(preset, [])
    assert 0.85 <= ratio(config.model, config.text.max_tokens) <= 0.87


def test_the_demo_saves_more_because_its_trunk_is_thin():
    config = load_config("demo", [])
    assert round(ratio(config.model, config.text.max_tokens), 2) == 0.65


@pytest.mark.parametrize(("preset", "name"), [("coco512", "B"), ("coco1024", "coco1024")])
def test_presets_of_the_pipeline_are_those_of_the_same_name(preset, name):
    assert load_config(preset, []).model == PRESETS[name]


def test_the_fourth_layer_grows_from_the_third():
    check_growth(PRESETS["B"], PRESETS["coco1024"])


def table_of_costs():
    """Rows of the table of costs in docs/paper.md: preset, giga multiply-adds layered and single-scale, ratio, parameters."""
    text = (ROOT / "docs" / "paper.md").read_text()
    number = r"([\d.]+)"
    row = (
        rf"\| (\w+) \|.*\| {number} \| {number} \| {number} \| {number} \| {number} \| {number} \|"
    )
    return [(name, *map(float, values)) for name, *values in re.findall(row, text)]


def test_the_documented_table_holds_every_preset():
    assert [name for name, *_ in table_of_costs()] == list(PRESETS)


@pytest.mark.parametrize("row", table_of_costs(), ids=lambda row: row[0])
def test_a_layered_network_costs_a_seventh_less_as_documented(row):
    name, layered, single, share, without_top, trunk, millions = row
    config = PRESETS[name]
    macs, parameters = cost(config)
    reference = cost(dataclasses.replace(config, kind="single_scale"))[0]
    exits = [cost(config, num_layers=n)[0] for n in (len(config.layers) - 1, 1)]
    digits = 2 if macs < 1e11 else 1
    counted = [round(value / 1e9, digits) for value in (macs, reference, *exits)]
    assert counted == [layered, single, without_top, trunk]
    assert 0.85 <= macs / reference <= 0.87
    assert round(macs / reference, 4) == share
    assert round(parameters / 1e6, 1) == millions


def counts_in_comments():
    """Parameters and operations that the comment before a preset of ray_config.yaml states."""
    text = (ROOT / "ray_config.yaml").read_text()
    claim = r"# (?:.*\W)?(\d+) M parameters, (\d+) GMAC(?s:.*?)\n  (\w+):\n"
    return [(name, int(macs), int(params)) for params, macs, name in re.findall(claim, text)]


def test_presets_state_what_they_cost():
    assert {"emoji128", "photo128", "coco512", "coco1024"} <= {
        name for name, *_ in counts_in_comments()
    }


@pytest.mark.parametrize(("preset", "giga_macs", "million_parameters"), counts_in_comments())
def test_presets_cost_what_their_comments_say(preset, giga_macs, million_parameters):
    config = load_config(preset, [])
    macs, parameters = cost(config.model, config.text.max_tokens)
    assert round(macs / 1e9) == giga_macs
    assert round(parameters / 1e6) == million_parameters
