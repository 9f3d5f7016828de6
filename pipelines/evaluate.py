"""Scores of a trained model, at every resolution at once: pictures for N captions, their features, distances and shares.

What is compared:

* trained: one picture for one caption of each of N pictures of ``evaluate.split``. Pictures are taken in the order of
  sha256(seed, image id), the same hash chooses the caption, and sample i is drawn from a seed made of (seed, i) alone.
* real: all pictures of the split, brought to lower resolutions by the model's own downscale, clamped, in 8 bits.
* untrained (``evaluate.untrained``), a yardstick: the same captions and seeds drawn by the same network with fresh weights.
* training pictures at the highest resolution (``evaluate.num_nearest``), to see whether samples are copies of some.

Two pools of actors work, one that draws and one that extracts features; pictures stream from the one to the other through
Ray Data, which lets the pools grow while there is more to do. Features are kept in Parquet files of 128 pictures each (see
`extraction`), in the run's directory, those of real pictures beside the dataset for all runs. What is there is not made
again: a killed job goes on when it is started anew, and other settings reuse what they have in common. Scores are taken from
the files alone, so they are equal to the bit whatever the number of actors, losses and restarts.

Each sampler gets a GPU where training does (``train.use_gpu``), and shares it with an extractor. The untrained network is
drawn without guidance, which would change nothing: its output is zero whatever the text. Writes ``metrics.json`` (scores, and
everything that decides them), ``grid.png``, ``nearest.png`` and the report. With equal settings finished files stay as they are.
"""

import functools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines import cli, outcome, score_report, scores, storage, trackers
from pipelines.attempts import Attempts
from pipelines.config import Config, UserError
from pipelines.errors import StageFailed
from pipelines.evaluation import Plan
from pipelines.extraction import Draw, Extract, Row, Worker, load
from pipelines.grid import png_bytes
from pipelines.score_tables import tracked
from pipelines.session import (
    Needs,
    Progress,
    connect,
    event,
    keep_actors,
    may_grow,
    resources,
)

logger = logging.getLogger(__name__)

SAMPLER_GPUS, EXTRACTOR_GPUS = 0.75, 0.25


def check(config: Config) -> list[str]:
    """Refuse what cannot be evaluated; say what `run` would do.

    Raises:
        UserError: there is no model or no dataset, they do not fit each other, or the split has too few pictures.
    """
    plan, options = Plan.of(config), config.evaluate
    drawn = sum(series.num_images for series in plan.work.series if series.is_drawn)
    (real, *_) = plan.find("real")
    return [
        f"draw {drawn} pictures with {plan.work.model} for captions of {options.split} in {plan.dataset.path}",
        f"score them at {', '.join(map(str, plan.resolutions))} pixels with {plan.specs.main.name}",
        f"keep features of real pictures in {real.root}",
        f"write {plan.layout.scores}, {plan.layout.grid} and {plan.layout.evaluation_html}",
    ]


def run(config: Config) -> dict[str, Any]:
    """Evaluate the model of a run; return what ``metrics.json`` holds.

    Raises:
        UserError: as `check` says.
        StageFailed: the processes that do a unit died again and again.
    """
    plan = Plan.of(config)
    result = _finished(plan)
    made = "wrote" if result is None else "kept"
    if result is None:
        storage.require_writable(plan.layout.path, "run")
        for series in plan.find("real"):
            storage.require_writable(series.root, "evaluate.references")
        result = _evaluate(config, plan)
    sys.stdout.write(score_report.table(result) + "\n")
    layout = plan.layout
    event(logger, made, scores=layout.scores, grid=layout.grid, report=layout.evaluation_html)
    return result


def needs(config: Config) -> Needs:
    """What a cluster must be able to give, before evaluation begins: one sampler, and one extractor beside it."""
    options = config.evaluate
    return Needs(
        stage="evaluate",
        workers=1,
        cpus_per_worker=options.cpus_per_sampler,
        gpus_per_worker=float(config.train.use_gpu),
        cpus_for_tasks=options.cpus_per_extractor + 1,
        paths=(config.dataset, config.run, *filter(None, [options.references, options.model])),
    )


def _finished(plan: Plan) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings."""
    layout = plan.layout
    if not all(map(storage.exists, (layout.scores, layout.grid, layout.evaluation_html))):
        return None
    earlier: dict[str, Any] = json.loads(storage.read_bytes(layout.scores))
    return earlier if earlier.get("settings") == plan.settings else None


def _evaluate(config: Config, plan: Plan) -> dict[str, Any]:
    gpus = int(config.train.use_gpu)
    missing = {number: series.missing(plan.specs) for number, series in enumerate(plan.work.series)}
    with connect(config, needs(config)):
        try:
            _extract(plan, missing, gpus)
            found = outcome.scored(plan)
        except Exception as error:
            raise _failed(error) from error
    found |= {"settings": plan.settings, "warnings": outcome.warnings(plan)}
    content = scores.to_json(found)
    result: dict[str, Any] = json.loads(content)
    sheets = {"grid": outcome.grid(plan)}
    if "memorisation" in result:
        sheets["nearest"] = outcome.nearest(plan, result)
    for name, sheet in sheets.items():
        storage.write_atomically(getattr(plan.layout, name), png_bytes(sheet))
    score_report.write_all(plan.layout, result)
    # Trackers know a run that was trained, not where another's model is scored.
    if config.evaluate.model is None:
        trackers.add(
            plan.layout,
            plan.pipeline.config.num_images_trained,
            tracked(result),
            {f"evaluate/{name}": sheet for name, sheet in sheets.items()},
        )
    # Last: who finds it finds all the others.
    storage.write_atomically(plan.layout.scores, content)
    return result


def _extract(plan: Plan, missing: dict[int, list[int]], gpus: int) -> None:
    """Make every feature that is not there."""
    series = plan.work.series
    total = sum(one.num_images for one in series)
    left = sum(len(series[number].images(shard)) for number, shard in _units(missing))
    with Progress("evaluate", total, "images", total - left) as progress:
        if not left:
            return
        for row in _stream(plan, missing, gpus):
            progress.update(len(series[row["series"]].images(row["shard"])))


def _units(missing: dict[int, list[int]]) -> list[tuple[int, int]]:
    return [(number, shard) for number, shards in missing.items() for shard in shards]


def _stream(plan: Plan, missing: dict[int, list[int]], gpus: int) -> Iterator[Row]:
    """Rows of finished units, as they come."""
    import ray.data

    context = ray.data.DataContext.get_current()
    # Otherwise what a worker raised is only text in the middle of another error.
    context.raise_original_map_exception = True
    keep_actors()
    work, options = plan.work, plan.work.options
    attempts = ray.remote(num_cpus=0)(Attempts).remote()

    def pool(actor: type[Worker], size: int, cpus: float, share: float) -> dict[str, Any]:
        return {
            "fn": actor,
            "fn_constructor_args": (work, attempts),
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=size),
            "num_cpus": cpus,
            "num_gpus": share * gpus,
        }

    drawn = [unit for unit in _units(missing) if work.series[unit[0]].is_drawn]
    loaded = [unit for unit in _units(missing) if not work.series[unit[0]].is_drawn]
    parts = []
    if drawn:
        size = min(options.num_samplers, len(drawn))
        sampler = pool(Draw, size, options.cpus_per_sampler, SAMPLER_GPUS)
        parts.append(_rows(drawn).map(**sampler))
    if loaded:
        task = functools.partial(load, work=work, diffusion=plan.diffusion)
        # No limit; but without one Ray may fuse this stage into the few actors of the next.
        tasks = ray.data.TaskPoolStrategy(size=len(loaded))
        parts.append(_rows(loaded).map(task, compute=tasks, num_cpus=_task_cpus(plan)))
    pictures = parts[0].union(*parts[1:]) if parts[1:] else parts[0]
    size = min(options.num_extractors, len(drawn) + len(loaded))
    extractor = pool(Extract, size, options.cpus_per_extractor, EXTRACTOR_GPUS)
    yield from pictures.map(**extractor).iter_rows()


def _rows(units: Sequence[tuple[int, int]]) -> Any:
    """A dataset of units, each a block, so that they can be handed out one by one."""
    import ray.data

    rows = [{"series": series, "shard": shard} for series, shard in units]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _task_cpus(plan: Plan) -> float:
    """One CPU for a task that loads pictures, or what is left beside one actor of each pool where no more nodes can come."""
    options = plan.work.options
    left = sum(node.get("CPU", 0) for node in resources())
    left -= options.cpus_per_sampler + options.cpus_per_extractor
    return 1.0 if may_grow() or left >= 1 else max(left, 0.1)


def _failed(error: Exception) -> Exception:
    """What to tell when the work has failed."""
    cause = getattr(error, "cause", error)  # Ray's errors hold the worker's own
    if isinstance(cause, (UserError, StageFailed)):
        return cause
    first = str(cause).strip().partition("\n")[0]
    return StageFailed(
        f"evaluation failed: {type(cause).__name__}: {first}; what is finished is kept, and the same "
        "command goes on from there"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``layered evaluate``."""
    return cli.main(["evaluate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
