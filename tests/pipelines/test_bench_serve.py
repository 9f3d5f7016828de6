"""The benchmark of serving: what it refuses and prints, and a whole run of it on a tiny network."""

import json

import pytest

from pipelines import bench_serve, cli
from pipelines.bench_serve import Result, Round, Saturation, Settings, Soak, growth, require_answers
from pipelines.errors import UserError
from pipelines.serving.load import Answer, Ask, Kind

TINY = (
    "model.resolutions=[8,16]",
    "model.channels=[8,8,8]",
    "model.blocks=[1,1,1]",
    "model.attention=[0,1]",
    "model.embedding_width=16",
    "model.head_width=8",
    "diffusion.reference_resolution=8",
    "sample.num_steps=8",
)


def answered(outcome: str, seconds: float = 1.0) -> Answer:
    return Answer(ask=Ask(kind=Kind(16, 4), number=1), outcome=outcome, began=0.0, ended=seconds)


def test_answers_that_are_no_pictures_end_the_benchmark():
    require_answers([answered("200")])
    with pytest.raises(UserError, match="'429': 1"):
        require_answers([answered("200"), answered("429")])
    with pytest.raises(UserError, match="not at all"):
        require_answers([])


def test_growth_leaves_the_first_quarter_out():
    rising = [(float(t), 1000 if t < 10 else 2000 + 3 * t) for t in range(41)]
    assert growth(rising) == (2030, 2120, pytest.approx(3.0))
    assert growth([(0.0, 7)]) == (7, 7, 0.0)


def test_the_table_tells_ratios_of_rounds():
    rounds = [
        Round(
            saturation=Saturation(
                bare=4.0, served=served, bare_seconds={"16x4": 0.25}, cpu_seconds={"bare": 0.2}
            ),
            latency={"layered": [(16, 0.5), (32, ours)], "batched": [(16, 2.0), (32, 2.0)]},
            streams=[(32, 0.1, 0.4)],
        )
        for served, ours in ((3.0, 0.5), (3.6, 1.5), (3.6, 0.5))
    ]
    soak = Soak(rate=4.3, outcomes={"200": 7, "429": 1}, memory={"replica": [(0.0, 2**20)]})
    result = Result(batch_sizes={16: 8}, rate=2.1, peer_batch_size=4, rounds=rounds, soak=soak)
    settings = Settings(seconds=1, rounds=3, clients=1, load=0.7, soak=1, threads=1)
    text = "\n".join(bench_serve.table(settings, result))
    assert "served / bare 0.90 (0.82 to 0.90)" in text
    assert "ratio of medians   0.25 (0.25 to 0.38)" in text
    assert "ratio 0.25 (0.25 to 0.25)" in text
    assert "200: 7, 429: 1" in text
    assert "@serve.batch(4)" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--seconds", "0.5"], "--seconds 0.5 must be at least 1"),
        (["--load", "1"], "--load 1 must be at least 0 and below 1"),
        (["--soak", "-1"], "--soak -1 must not be negative"),
        (["model.chanels=[8]"], "model.chanels"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, capsys):
    assert cli.main(["bench", "serve", *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.soak
def test_a_whole_run(local_ray, tmp_path, capsys):
    options = ["--seconds", "1", "--rounds", "1", "--clients", "4", "--soak", "3", "--threads", "1"]
    output = tmp_path / "bench.json"
    assert cli.main(["bench", "serve", *options, *TINY, "--output", str(output)]) == 0
    told = json.loads(output.read_text())
    (one,) = told["rounds"]
    assert one["saturation"]["bare"] > 0
    assert one["saturation"]["served"] > 0
    assert all(seconds > 0 for seconds in one["saturation"]["cpu_seconds"].values())
    assert len(one["latency"]["layered"]) == len(one["latency"]["batched"]) > 0
    assert {resolution for resolution, _, _ in one["streams"]} == {16}
    assert all(0 < preview < picture for _, preview, picture in one["streams"])
    assert set(told["soak"]["outcomes"]) <= {"200", "429", "hung up"}
    assert all(size > 2**20 for name in told["soak"]["memory"].values() for _, size in name)
    text = capsys.readouterr().out
    for word in ("saturation", "latency", "preview", "overload"):
        assert word in text
