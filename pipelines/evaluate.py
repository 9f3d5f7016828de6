"""Scores of a trained model: samples for N captions, features in Ray actors, Frechet distance and Inception-style score.

What is compared, at every resolution of the model:

* trained: one picture for one caption of each of N pictures of ``evaluate.split``. Pictures are taken in the order of
  sha256(seed, image id), the same hash chooses the caption, and sample i is drawn from a seed made of (seed, i) alone.
* reference: all pictures of the split, brought to lower resolutions by the model's own downscale, clamped, in 8 bits.
* untrained (``evaluate.untrained``): the same captions and seeds drawn by the same network with fresh weights.

Work is cut into fixed blocks by index, so the scores do not depend on the number of actors or on who finishes first, and a
block whose actor dies is done again by another. Statistics merge in the order of the blocks (see `metrics`). The
reference's are kept in the run's directory and used again as long as what decides them stays the same.

Each actor gets a GPU where training does (``train.use_gpu``). The untrained network is drawn without guidance, which would
change nothing: its output is zero whatever the text. Writes ``metrics.json`` (scores, and everything that decides them) and
``grid.png``. With equal settings the finished files are left as they are.
"""

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layered_model.features import FeatureExtractor, load_extractor
from pipelines import cli, metrics, storage
from pipelines.config import Config, UserError, fingerprint
from pipelines.dataset import PreparedDataset
from pipelines.grid import contact_sheet, png_bytes
from pipelines.metrics import FeatureStatistics, Statistics
from pipelines.runs import load_model
from pipelines.schema import CAPTIONS, RunDir
from pipelines.scoring import Block, Caption, Kind, Scored, Scorer, choose_captions, cut, num_splits
from pipelines.session import Needs, Progress, connect, event

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the protocol above; scores of another are not taken for finished."""
GRID_PICTURES, GRID_BLOCKS = 24, 3
MAX_RESTARTS = 3
"""How often a lost actor is replaced, and its block done again."""


Totals = dict[tuple[Kind, int, int], Statistics]
"Statistics by kind, resolution and split."


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The inputs of a run, found to be there and to fit each other."""

    layout: RunDir
    dataset: PreparedDataset
    extractor: FeatureExtractor
    resolutions: tuple[int, ...]
    reference: dict[str, Any]
    "Everything that decides the reference's statistics."
    settings: dict[str, Any]
    "Everything that decides the scores."

    @property
    def references(self) -> str:
        """File of the reference's statistics."""
        return storage.join(self.layout.path, f"reference-{fingerprint(self.reference)}.npz")


def check(config: Config) -> list[str]:
    """Refuse what cannot be evaluated; say what `run` would do.

    Raises:
        UserError: there is no model or no dataset, they do not fit each other, or the split has too few pictures.
    """
    plan, options = _plan(config), config.evaluate
    drawn = options.num_images * (2 if options.untrained else 1)
    return [
        f"draw {drawn} pictures with {plan.layout.model} for captions of {options.split} in {plan.dataset.path}",
        f"score them at {', '.join(map(str, plan.resolutions))} pixels with {plan.extractor.name}",
        f"write {plan.layout.scores} and {plan.layout.grid}",
    ]


def run(config: Config) -> dict[str, Any]:
    """Evaluate the model of a run; return what ``metrics.json`` holds.

    Raises:
        UserError: as `check` says.
    """
    plan = _plan(config)
    result = _finished(plan)
    if result is None:
        storage.require_writable(plan.layout.path, "run")
        result = _evaluate(config, plan)
    else:
        event(logger, "evaluate", finished=plan.layout.scores)
    sys.stdout.write(metrics.score_table(result) + "\n")
    return result


def _plan(config: Config) -> Plan:
    options, layout = config.evaluate, RunDir(storage.absolute(config.run))
    dataset = PreparedDataset.open(config.dataset)
    available = dataset.num_images(options.split)
    if options.num_images > available:
        raise UserError(
            f"evaluate.num_images={options.num_images} must be at most {available}, the pictures of "
            f"{options.split} in dataset={config.dataset!r}"
        )
    pipeline = load_model(config)
    model = pipeline.config
    dataset.check_matches(
        dataclasses.replace(config, model=model.network, diffusion=model.diffusion)
    )
    try:
        extractor = load_extractor(options.extractor)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"evaluate.extractor={options.extractor!r}: {error}") from error
    reference = {
        "version": VERSION,
        "dataset_fingerprint": dataset.manifest.fingerprint,
        "split": options.split,
        "num_references": available,
        "references": "all pictures of the split; lower resolutions by the model's downscale, clamped, in 8 bits",
        "downscale": pipeline.diffusion.kernel,
        "resolutions": list(pipeline.resolutions),
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "preprocess": extractor.preprocess,
        "batch_size": options.batch_size,
    }
    drawn = {
        "num_images": options.num_images,
        "captions": "one a picture; pictures, captions and noise by seed",
        "seed": config.seed,
        "num_splits": num_splits(options.num_images),
        "untrained": options.untrained,
        "model_sha256": pipeline.weights_sha256,
        **dataclasses.asdict(config.sample),
    }
    return Plan(
        layout=layout,
        dataset=dataset,
        extractor=extractor,
        resolutions=pipeline.resolutions,
        reference=reference,
        settings=reference | drawn,
    )


def _finished(plan: Plan) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings."""
    if not (storage.exists(plan.layout.scores) and storage.exists(plan.layout.grid)):
        return None
    earlier: dict[str, Any] = json.loads(storage.read_bytes(plan.layout.scores))
    return earlier if earlier.get("settings") == plan.settings else None


def _evaluate(config: Config, plan: Plan) -> dict[str, Any]:
    options = config.evaluate
    captions = choose_captions(plan.dataset, options.split, options.num_images, config.seed)
    blocks = cut("trained", captions, options.batch_size, GRID_PICTURES)
    if options.untrained:
        blocks += cut("untrained", captions, options.batch_size)
    known: Totals = {}
    if storage.exists(plan.references):
        packed = metrics.unpack(storage.read_bytes(plan.references))
        known = {("reference", *_numbers(name)): value for name, value in packed.items()}
    else:
        rows = [Caption(row, 0, 0) for row in range(plan.dataset.num_images(options.split))]
        blocks += cut("reference", rows, options.batch_size)
    totals, shown = _score(config, plan, blocks)
    if not known:
        named = {f"{r}-{split}": v for (kind, r, split), v in totals.items() if kind == "reference"}
        storage.write_atomically(plan.references, metrics.pack(named))
    result = {
        "scores": _scores(plan, totals | known),
        "settings": plan.settings,
        "warnings": _warnings(plan),
    }
    for warning in result["warnings"]:
        logger.warning(warning)
    sheet = contact_sheet(_texts(plan, captions[:GRID_PICTURES]), shown, blocks=GRID_BLOCKS)
    storage.write_atomically(plan.layout.grid, png_bytes(sheet))
    storage.write_atomically(plan.layout.scores, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _numbers(name: str) -> tuple[int, int]:
    resolution, split = name.split("-")
    return int(resolution), int(split)


def _score(
    config: Config, plan: Plan, blocks: Sequence[Block]
) -> tuple[Totals, dict[int, list[NDArray[np.uint8]]]]:
    """Score all blocks in actors; merge in the order of the blocks, whatever order they come back in."""
    options, gpus = config.evaluate, int(config.train.use_gpu)
    needs = Needs(
        stage="evaluate",
        workers=options.num_actors,
        cpus_per_worker=options.cpus_per_actor,
        gpus_per_worker=gpus,
        paths=(config.dataset, config.run),
    )
    totals: Totals = {}
    shown: dict[int, list[NDArray[np.uint8]]] = {resolution: [] for resolution in plan.resolutions}
    waiting: dict[int, Scored] = {}
    num_merged, num_pictures = 0, sum(len(block.captions) for block in blocks)
    with connect(config, needs), Progress("evaluate", num_pictures, "images") as progress:
        import ray
        from ray.util import ActorPool

        actor = ray.remote(
            num_cpus=options.cpus_per_actor,
            num_gpus=gpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )(Scorer)
        pool = ActorPool(
            [
                actor.remote(config, plan.layout.model, plan.dataset.path)
                for _ in range(min(options.num_actors, len(blocks)))
            ]
        )
        results = pool.map_unordered(
            lambda actor, item: actor.score.remote(*item), enumerate(blocks)
        )
        for number, scored in results:
            waiting[number] = scored
            progress.update(len(blocks[number].captions))
            while num_merged in waiting:
                _add(totals, shown, blocks[num_merged], waiting.pop(num_merged))
                num_merged += 1
    return totals, shown


def _add(
    totals: Totals, shown: dict[int, list[NDArray[np.uint8]]], block: Block, scored: Scored
) -> None:
    for resolution, statistics in scored.statistics.items():
        key = (block.kind, resolution, block.split)
        totals[key] = totals[key].merge(statistics) if key in totals else statistics
        shown[resolution] += list(scored.shown[resolution])


def _scores(plan: Plan, totals: Totals) -> dict[str, Any]:
    """Scores by resolution: the trained model's, and below them those of the yardsticks."""
    scores: dict[str, Any] = {}
    for resolution in plan.resolutions:
        parts: dict[Kind, list[Statistics]] = {}
        for (kind, of, _), statistics in totals.items():
            if of == resolution:
                parts.setdefault(kind, []).append(statistics)
        real = _all(parts["reference"])
        entry = scores[str(resolution)] = _score_of(plan, parts["trained"], real)
        if "untrained" in parts:
            entry["untrained"] = _score_of(plan, parts["untrained"], real)
        entry["reference"] = _score_of(plan, parts["reference"], None)
    return scores


def _score_of(
    plan: Plan, parts: Sequence[Statistics], real: FeatureStatistics | None
) -> dict[str, Any]:
    """Scores of one kind of pictures, given in the splits of the Inception-style score."""
    prefix = plan.extractor.prefix
    mean, deviation = metrics.inception_score([part.classes for part in parts])
    distance = {} if real is None else {f"fd_{prefix}": metrics.frechet_distance(_all(parts), real)}
    return distance | {f"is_{prefix}": mean, f"is_{prefix}_std": deviation}


def _all(parts: Sequence[Statistics]) -> FeatureStatistics:
    return functools.reduce(FeatureStatistics.merge, (part.features for part in parts))


def _warnings(plan: Plan) -> list[str]:
    num_images, dim = plan.settings["num_images"], plan.extractor.dim
    if num_images >= dim:
        return []
    return [
        f"{num_images} pictures are fewer than the {dim} features of {plan.extractor.name}: the distance "
        "is biased upwards by about c/N; compare it only with runs of the same N"
    ]


def _texts(plan: Plan, captions: Sequence[Caption]) -> list[str]:
    rows = [caption.row for caption in captions]
    lists = plan.dataset.read(plan.settings["split"], [CAPTIONS], rows).column(CAPTIONS).to_pylist()
    return [texts[caption.caption] for texts, caption in zip(lists, captions, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """``layered evaluate``."""
    return cli.main(["evaluate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
