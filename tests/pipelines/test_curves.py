"""Every key of the log is drawn, where it belongs."""

import json

import pytest

from pipelines.curves import sections
from pipelines.history import parse


def drawn(**values: float) -> dict[str, list[str]]:
    """Section -> titles of its charts, for two lines of a log."""
    lines = [json.dumps({"images": number} | values) for number in (1, 2)]
    made = sections(parse("\n".join(lines)))
    return {part.title: [f.findtext("figcaption/b") or "" for f in part.figures] for part in made}


@pytest.mark.parametrize(
    ("key", "section", "titles"),
    [
        ("loss/8", "Training", ["Loss"]),
        ("grad_norm", "Training", ["Gradient norm"]),
        ("learning_rate", "Training", ["Learning rate"]),
        ("val/loss/8", "Validation", ["Validation loss at 8 px"]),
        ("val/8", "Validation", ["Validation loss at 8 px"]),
        (
            "val/loss/8/logsnr_-3",
            "Validation",
            ["Validation loss by noise level", "Validation loss at 8 px"],
        ),
        ("val/fd_lite0/8", "Validation", ["val/fd_lite0/8"]),
        ("score/fd_lite0/8", "Validation", ["fd_lite0 while training"]),
        ("score/is/8", "Validation", ["is while training"]),
        ("score/other", "Other values", ["score/other"]),
        ("loss/8/logsnr_-3", "Loss by noise level", ["Loss by noise level", "Loss at 8 px"]),
        ("images_per_second", "Speed and memory", ["Speed"]),
        ("utilization", "Speed and memory", ["Utilization"]),
        ("time/data", "Speed and memory", ["Where the time goes"]),
        ("memory/host_bytes", "Speed and memory", ["Memory"]),
        ("loss", "Other values", ["loss"]),
        ("loss/8/other", "Other values", ["loss/8/other"]),
        ("anything", "Other values", ["anything"]),
    ],
)
def test_a_key_has_its_place(key, section, titles) -> None:
    assert drawn(**{key: 1.0}) == {section: titles}


def test_nothing_logged_draws_nothing() -> None:
    assert drawn() == {}


def test_time_that_nobody_spent_is_still_drawn() -> None:
    assert drawn(**{"time/data": 0.0}) == {"Other values": ["time/data"]}


def test_many_kinds_of_memory_are_several_charts() -> None:
    keys = {f"memory/device_{number}_bytes": 1e9 for number in range(17)}
    assert drawn(**keys) == {"Speed and memory": ["Memory"] * 3}


def test_a_score_is_one_chart_with_a_line_a_layer_in_its_color() -> None:
    values = {"loss/16": 2, "score/fd_lite0/16": 9, "score/fd_lite0/8": 8, "score/is_lite0/8": 1}
    made = sections(parse(json.dumps({"images": 1} | values)))
    figures = {f.findtext("figcaption/b"): f for part in made for f in part.figures}
    lines = [
        {p.attrib["class"] for p in figures[title].iter("path") if "line" in p.attrib["class"]}
        for title in ("Loss", "fd_lite0 while training", "is_lite0 while training")
    ]
    assert lines == [{"line kind-1"}, {"line kind-0", "line kind-1"}, {"line kind-0"}]


def test_a_layer_has_one_color_and_validation_is_dashed() -> None:
    line = json.dumps({"images": 1, "loss/8": 1, "loss/16": 2, "val/loss/16": 3})
    loss, validation = (part.figures[0] for part in sections(parse(line))[:2])
    colors = [
        {p.attrib["class"] for p in figure.iter("path") if "line" in p.attrib["class"].split()}
        for figure in (loss, validation)
    ]
    assert colors == [{"line kind-0", "line kind-1"}, {"line kind-1", "line kind-1 dashed"}]
