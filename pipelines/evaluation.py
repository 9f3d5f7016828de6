"""What an evaluation is: which pictures are compared, where their features lie, and everything that decides the scores.

Called by `evaluate` and `outcome`.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Any, Self

import torch

from layered_model import LayeredPipeline
from layered_model.diffusion import LayeredDiffusion
from pipelines import paths, scores, storage
from pipelines.config import Config, UserError, fingerprint
from pipelines.dataset import PreparedDataset
from pipelines.drawing import choose_captions
from pipelines.extraction import Kind, Series, Specs, Work, load_extractors, specs_of
from pipelines.feature_store import SHARD_IMAGES
from pipelines.runs import load_model
from pipelines.schema import RunDir
from pipelines.sections import SampleConfig
from pipelines.statistics_files import made_by

VERSION = 2
"""Of the protocol of `evaluate`; features and scores of another are not taken for these."""
CAPTION_RULE = "one a picture; pictures, captions and noise by seed"
REFERENCE_RULE = (
    "all pictures of the split; lower resolutions by the model's downscale, clamped, in 8 bits"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """An evaluation whose inputs were found to be there and to fit each other."""

    layout: RunDir
    dataset: PreparedDataset
    pipeline: LayeredPipeline
    specs: Specs
    work: Work
    settings: dict[str, Any]
    "Everything that decides the result."

    @classmethod
    def of(cls, config: Config) -> Self:
        """Find and check everything that an evaluation needs.

        Raises:
            UserError: there is no model or no dataset, they do not fit each other, or the split has too few pictures.
        """
        options, layout = config.evaluate, RunDir(storage.absolute(config.run))
        dataset = PreparedDataset.open(config.dataset)
        _check_numbers(config, dataset)
        pipeline = _load(config)
        model = pipeline.config
        _check_layers(config, pipeline)
        dataset.check_matches(
            dataclasses.replace(config, model=model.network, diffusion=model.diffusion)
        )
        specs = specs_of(load_extractors(options))
        series = tuple(_series(config, layout, dataset, pipeline))
        captions = choose_captions(dataset, options.split, options.num_images, config.seed)
        return cls(
            layout=layout,
            dataset=dataset,
            pipeline=pipeline,
            specs=specs,
            work=Work(
                series=series,
                captions=tuple(captions),
                dataset=dataset.path,
                model=str(pipeline.path),
                options=paths.placed(config).evaluate,
                device=_device(config),
            ),
            settings=_settings(config, series[0], specs, dataset, pipeline),
        )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Of the model, low to high."""
        return self.pipeline.resolutions

    @property
    def diffusion(self) -> LayeredDiffusion:
        """How pictures are brought to lower resolutions."""
        return self.pipeline.diffusion

    def find(self, kind: str, split: str | None = None) -> list[Series]:
        """Series of a kind; those of the trained model begin with the configured one."""
        found = [series for series in self.work.series if series.kind == kind]
        return [series for series in found if split in (None, series.split)]


def _load(config: Config) -> LayeredPipeline:
    """The model that is named, or the run's."""
    named = config.evaluate.model
    if named is None:
        return load_model(config)
    try:
        return LayeredPipeline.from_pretrained(storage.absolute(named))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"evaluate.model={named!r}: {error}") from error


def _check_numbers(config: Config, dataset: PreparedDataset) -> None:
    options, available = config.evaluate, dataset.num_images(config.evaluate.split)
    if options.num_images > available:
        raise UserError(
            f"evaluate.num_images={options.num_images} must be at most {available}, the pictures of "
            f"{options.split} in dataset={config.dataset!r}"
        )
    if options.batch_size > SHARD_IMAGES:
        raise UserError(
            f"evaluate.batch_size={options.batch_size} must be at most {SHARD_IMAGES}, the pictures "
            "that are drawn and kept as one"
        )


def _check_layers(config: Config, pipeline: LayeredPipeline) -> None:
    """Settings that must fit the model's layers."""
    count, sample = len(pipeline.resolutions), config.sample
    for key, values in (
        ("sample.layer_guidance", sample.layer_guidance),
        ("evaluate.layer_captions", config.evaluate.layer_captions),
    ):
        if values and len(values) != count:
            raise UserError(
                f"{key}={list(values)} must hold one for each of the model's {count} layers, "
                f"{', '.join(map(str, pipeline.resolutions))} pixels, or be empty"
            )
    if sample.hand_over is not None and not pipeline.diffusion.one_state:
        raise UserError(
            f"sample.hand_over={sample.hand_over} needs a model with shared noise, and this one's layers have a state each"
        )


def _settings(
    config: Config,
    drawn: Series,
    specs: Specs,
    dataset: PreparedDataset,
    pipeline: LayeredPipeline,
) -> dict[str, Any]:
    """Everything that decides the result."""
    options = config.evaluate
    number, num_references = options.num_images, dataset.num_images(options.split)
    settings = {
        **drawn.settings,
        "num_images": number,
        "captions": CAPTION_RULE,
        "num_references": num_references,
        "references": REFERENCE_RULE,
        "downscale": pipeline.diffusion.kernel,
        "resolutions": pipeline.resolutions,
        **made_by(specs.main),
        "clip_sha256": None if specs.clip is None else specs.clip.weights_sha256,
        **scores.decide(number, num_references),
        "untrained": options.untrained,
        "num_kept": options.num_kept,
        "num_nearest": options.num_nearest,
        "sweep": [dataclasses.asdict(cell) for cell in _sweep(config)],
    }
    normal: dict[str, Any] = json.loads(json.dumps(settings))
    return normal


def _device(config: Config) -> str:
    return "cuda" if config.train.use_gpu else "cpu"


def _sweep(config: Config) -> list[SampleConfig]:
    """Every guidance with every number of steps; none where there is nothing to sweep."""
    options, sample = config.evaluate, config.sample
    if not (options.sweep_guidance or options.sweep_num_steps):
        return []
    return [
        dataclasses.replace(sample, guidance=guidance, num_steps=num_steps)
        for num_steps, guidance in itertools.product(
            options.sweep_num_steps or [sample.num_steps],
            options.sweep_guidance or [sample.guidance],
        )
    ]


def _series(
    config: Config, layout: RunDir, dataset: PreparedDataset, pipeline: LayeredPipeline
) -> list[Series]:
    """All series; the first is the trained model's as configured."""
    options, root = config.evaluate, storage.join(layout.path, "features")
    number, resolutions = options.num_images, pipeline.resolutions
    base = {
        "version": VERSION,
        "dataset_fingerprint": dataset.manifest.fingerprint,
        "split": options.split,
        "device": _device(config),
        "torch": torch.__version__,
        "extractor_threads": max(1, int(options.cpus_per_extractor)),
    }
    captions = base | {"seed": config.seed}
    drawn = captions | {
        "model_sha256": pipeline.weights_sha256,
        "model_config": pipeline.config_hash,
        "batch_size": options.batch_size,
        "sampler_threads": max(1, int(options.cpus_per_sampler)),
    }

    def of_model(kind: Kind, sample: SampleConfig, num_kept: int = 0) -> Series:
        decisive = {**dataclasses.asdict(sample), "layer_captions": options.layer_captions}
        settings = drawn | json.loads(json.dumps(decisive))
        return Series(
            kind=kind,
            split=options.split,
            num_images=number,
            resolutions=resolutions,
            root=root,
            settings=settings,
            sample=sample,
            pictures=storage.join(layout.path, f"pictures-{fingerprint(settings)}"),
            num_kept=min(number, num_kept),
            layer_captions=options.layer_captions,
        )

    def of_dataset(split: str, sizes: tuple[int, ...]) -> Series:
        return Series(
            kind="real",
            split=split,
            num_images=dataset.num_images(split),
            resolutions=sizes,
            root=storage.absolute(options.references or f"{dataset.path}-features"),
            settings=base | {"split": split, "downscale": pipeline.diffusion.kernel},
        )

    series = [of_model("trained", config.sample, options.num_kept)]
    series += [of_model("trained", cell) for cell in _sweep(config) if cell != config.sample]
    if options.untrained:
        series.append(of_model("untrained", dataclasses.replace(config.sample, guidance=1.0)))
    series.append(of_dataset(options.split, resolutions))
    if options.num_nearest and options.split != "train":
        series.append(of_dataset("train", resolutions[-1:]))
    if options.clip_weights is not None:
        series.append(
            Series(
                kind="captions",
                split=options.split,
                num_images=number,
                resolutions=(),
                root=root,
                settings=captions,
            )
        )
    return series
