"""The benchmark: counts, equal multiply-adds, what it reports, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from layered_model.presets import PRESETS
from layered_model.unet import UNetConfig, make_network
from pipelines import bench, cli, costs, peer
from pipelines.contenders import NUM_TOKENS

TINY = UNetConfig(
    resolutions=(8, 16),
    channels=(16, 32, 48),
    blocks=(1, 1, 1),
    attention=(0, 1),
    mid_blocks=1,
    embedding_width=16,
    head_width=16,
    text_width=8,
    dropout=0.0,
)


def test_multiply_adds_of_a_convolution_are_those_of_the_formula() -> None:
    convolution = nn.Conv2d(5, 7, 3, padding=1)
    assert costs.macs(lambda: convolution(torch.zeros(2, 5, 8, 8))) == 2 * 64 * 5 * 7 * 9


def test_saved_bytes_are_the_inputs_that_gradients_need() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    x = torch.zeros(5, 4)
    # the input of each linear map, which for the second is the sigmoid's output; weights are not counted
    assert costs.saved_bytes(network, lambda: network(x)) == 4 * (5 * 4 + 5 * 8)


def test_rounds_interleave_and_leave_warm_up_out() -> None:
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = costs.rounds(jobs, repeats=3, warm_up=1, synchronize=lambda: None)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    together = ["".join(sorted(calls[i : i + 3])) for i in range(0, 12, 3)]
    assert together == ["abc"] * 4
    assert {calls[i] for i in range(3, 12, 3)} == {"a", "b", "c"}  # each leads once


def test_a_ratio_is_formed_within_a_round() -> None:
    # the machine slows down threefold: the ratio stays
    spread = costs.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (spread.low, spread.median, spread.high) == (0.5, 0.5, 0.5)


def test_the_peer_has_equal_multiply_adds_and_the_same_levels() -> None:
    config = replace(PRESETS["64T"], dropout=0.0)
    goal = costs.network_macs(config, NUM_TOKENS)
    matched = peer.match(config, goal, NUM_TOKENS)
    assert abs(peer.count(config, matched.widths, NUM_TOKENS) / goal - 1) <= peer.TOLERANCE
    assert len(matched.widths) == len(config.channels)
    assert all(
        0.6 < theirs / ours < 1.5 and theirs % 16 == 0
        for theirs, ours in zip(matched.widths, config.channels, strict=True)
    )


def test_an_early_exit_costs_less_than_the_whole() -> None:
    low, high = (costs.network_macs(PRESETS["64T"], NUM_TOKENS, r) for r in (16, 32))
    assert low < high < costs.network_macs(PRESETS["64T"], NUM_TOKENS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_reports_every_network_and_ratio(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(peer, "TOLERANCE", 0.5)  # so few widths leave little choice
    output = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    arguments = ["tiny", "--device", "cpu", "--threads", "1", "--batch-size", "1"]
    assert cli.main(["bench", *arguments, "--repeats", "3", "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    assert "layered / diffusers" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert {"machine", "settings", "presets"} == set(result)
    assert result["machine"]["threads"] == 1
    measured = result["presets"]["tiny"]
    networks = measured["networks"]
    assert set(networks) == {"layered", "single_scale", "diffusers", "exit_8"}
    for name in ("layered", "single_scale", "diffusers"):
        assert {"macs", "parameters", "saved_bytes_per_picture", "seconds"} <= set(networks[name])
        assert {work: len(taken) for work, taken in networks[name]["seconds"].items()} == (
            dict.fromkeys(bench.WORKS, 3)
        )
    assert set(measured["ratios"]) == {"single_scale", "diffusers"}
    for ratios in measured["ratios"].values():
        assert {"macs", "saved_bytes_per_picture", *bench.WORKS} <= set(ratios)
        assert set(ratios["training_step"]) == {"median", "low", "high"}
    network = make_network(TINY)
    assert networks["layered"]["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["512X"], "preset='512X' must be one of 64T, 128S"),
        (["64T", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["64T", "--device", "tpu"], "--device tpu must be cpu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(["bench", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1
