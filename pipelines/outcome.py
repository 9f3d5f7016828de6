"""What came of an evaluation, from the features in its stores: scores, sheets of pictures, warnings.

Called by `evaluate`, in Ray.
"""

import functools
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines import scores, storage
from pipelines.drawing import real_pictures, texts_of
from pipelines.evaluation import Plan
from pipelines.extraction import Series
from pipelines.grid import contact_sheet, nearest_sheet
from pipelines.schema import CAPTIONS
from pipelines.scores import Measure, Scores
from pipelines.scoring import (
    Comparison,
    Memorisation,
    memorisation,
    score_reference,
    score_with_clip,
)
from pipelines.session import Progress

GRID_PICTURES, GRID_BLOCKS = 24, 3
FEW, MANY = 512, 4096
Key = tuple[int, str, int]
"""Resolution, kind, and number among the series that are drawn."""
PARTS: list[tuple[Measure, ...]] = [("distance", "kernel", "classes"), ("limit",), ("neighbours",)]
"""Of the scores of many pictures, each computed by itself."""


def scored(plan: Plan) -> dict[str, Any]:
    """Scores, those of a sweep, and how near samples come to training pictures; in tasks of one thread each."""
    import ray

    drawn, real = plan.find("trained"), plan.find("real")
    calls: list[tuple[Key, Callable[[], Scores]]] = []
    for size in plan.resolutions:
        for number, series in enumerate([*drawn, *plan.find("untrained")]):
            of = size, series.kind, number
            calls += [(of, task.score) for task in _comparisons(plan, series, real[0], size)]
        if (clip := plan.specs.clip) is not None:
            (captions,) = plan.find("captions")
            for number, series in enumerate(drawn):
                stores = [series.store(clip, size), real[0].store(clip, size), captions.store(clip)]
                of = size, "trained", number
                calls.append((of, functools.partial(score_with_clip, clip, *stores)))
        store = real[0].store(plan.specs.main, size)
        one = functools.partial(score_reference, plan.specs.main, store)
        calls.append(((size, "reference", 0), one))
    task = ray.remote(num_cpus=1)
    if training := real[1:]:
        stores = [
            series.store(plan.specs.main, plan.resolutions[-1])
            for series in (drawn[0], real[0], *training)
        ]
        num_shown = plan.work.options.num_nearest
        near = task(memorisation).remote(*stores, drawn[0].num_kept, num_shown)
    # Tables of few pictures are sooner computed than a process is started.
    few = max(series.num_images for series in plan.work.series) <= FEW
    parts = [calls] if few else [[call] for call in calls]
    waiting = [task(_called).remote([function for _, function in part]) for part in parts]
    found: dict[Key, Scores] = defaultdict(dict)
    with Progress("scores", len(calls), "tables") as progress:
        for part, answer in zip(parts, waiting, strict=True):
            for (key, _), values in zip(part, ray.get(answer), strict=True):
                found[key] |= values
            progress.update(len(part))

    def drawn_by(number: int) -> dict[str, Any]:
        return {str(size): found[size, "trained", number] for size in plan.resolutions}

    result: dict[str, Any] = {"scores": drawn_by(0)}
    for (size, kind, _), values in found.items():
        if kind in ("untrained", "reference"):
            result["scores"][str(size)] |= {kind: values}
    if training:
        result["memorisation"] = _memorisation(plan, training[0], ray.get(near))
    if cells := plan.settings["sweep"]:
        samples = [
            json.loads(json.dumps(asdict(series.sample))) for series in drawn if series.sample
        ]
        result["sweep"] = [
            {
                "guidance": cell["guidance"],
                "num_steps": cell["num_steps"],
                "scores": drawn_by(samples.index(cell)),
            }
            for cell in cells
        ]
    return result


def _called(functions: Sequence[Callable[[], Scores]]) -> list[Scores]:
    return [function() for function in functions]


def _comparisons(plan: Plan, series: Series, real: Series, size: int) -> list[Comparison]:
    """Tasks for one table; many pictures take minutes, which are shared out."""
    parts = [scores.MEASURES] if series.num_images < MANY else PARTS
    if series.kind == "untrained":
        parts = [("distance", "classes")]
    extractor = plan.specs.main
    return [
        Comparison(
            extractor=extractor,
            drawn=series.store(extractor, size),
            real=real.store(extractor, size),
            measures=measures,
        )
        for measures in parts
    ]


def _memorisation(plan: Plan, training: Series, near: Memorisation) -> dict[str, Any]:
    """For the result, with the words of captions."""
    texts = _texts(plan, near.numbers)
    seen = sorted({row for rows in near.rows for row in rows})
    captions = plan.dataset.read("train", [CAPTIONS], seen).column(CAPTIONS).to_pylist()
    words = {row: texts[0] for row, texts in zip(seen, captions, strict=True)}
    return {
        "resolution": plan.resolutions[-1],
        "num_training_images": training.num_images,
        "median_distance": near.median_distance,
        "median_distance_of_reference": near.median_distance_of_reference,
        "nearest": [
            {
                "index": number,
                "caption": text,
                "neighbours": [
                    {"row": row, "caption": words[row], "distance": distance}
                    for row, distance in zip(rows, distances, strict=True)
                ],
            }
            for number, text, rows, distances in zip(
                near.numbers, texts, near.rows, near.distances, strict=True
            )
        ],
    }


def grid(plan: Plan) -> Image.Image:
    """Captions and what was drawn for them."""
    numbers = range(min(GRID_PICTURES, plan.work.series[0].num_kept))
    shown = {size: [_kept(plan, size, n) for n in numbers] for size in plan.resolutions}
    return contact_sheet(_texts(plan, numbers), shown, blocks=GRID_BLOCKS)


def nearest(plan: Plan, result: dict[str, Any]) -> Image.Image:
    """Samples beside the training pictures that they are most like."""
    size, shown = plan.resolutions[-1], []
    for entry in result["memorisation"]["nearest"]:
        neighbours = entry["neighbours"]
        pictures = real_pictures(
            plan.diffusion, plan.dataset, "train", [neighbour["row"] for neighbour in neighbours]
        )[size]
        beside = [
            (picture, neighbour["caption"], neighbour["distance"])
            for picture, neighbour in zip(pictures, neighbours, strict=True)
        ]
        shown.append((_kept(plan, size, entry["index"]), entry["caption"], beside))
    return nearest_sheet(shown)


def _kept(plan: Plan, size: int, number: int) -> NDArray[np.uint8]:
    content = storage.read_bytes(plan.work.series[0].kept(size, number))
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _texts(plan: Plan, numbers: Sequence[int]) -> list[str]:
    captions = [plan.work.captions[number] for number in numbers]
    return texts_of(plan.dataset, plan.work.options.split, captions)


def warnings(plan: Plan) -> list[str]:
    """What must be said about the scores."""
    settings = plan.settings
    return scores.sample_warnings(
        settings["num_images"], settings["num_references"], plan.specs.main
    )
