"""From captions and photographs to features in stores: the work of `evaluate` in Ray's workers.

A unit is one shard of a series (`feature_store.SHARD_IMAGES` pictures of one kind), at every resolution at once. It goes through
Ray Data as one row:

    row {series, shard}   --Draw, an actor with the model--   or   --load, a task, for photographs and words-->
                          + {"32": pixels of all its pictures, for each resolution}
                          --Extract, an actor with the extractors-->   a Parquet file in each of the series' stores

What a unit's files hold depends on the series and the shard alone, down to the size of batches, and each appears with one atomic
write. So it does not matter who makes them, how many work, or that one is made twice after a worker was lost.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from layered_model import LayeredPipeline
from layered_model.diffusion import LayeredDiffusion
from layered_model.features import ExtractorSpec, FeatureExtractor
from layered_model.vision import ClipText
from pipelines import extractors, storage
from pipelines.config import fingerprint
from pipelines.dataset import PreparedDataset
from pipelines.drawing import Caption, Pyramid, batches_of, draw, real_pictures, texts_of
from pipelines.errors import StageFailed
from pipelines.feature_store import SHARD_IMAGES, Contents, FeatureStore
from pipelines.grid import png_bytes
from pipelines.sections import EvaluateConfig, SampleConfig
from pipelines.session import setup_logging
from pipelines.statistics_files import made_by

Kind = Literal["trained", "untrained", "real", "captions"]
Row = dict[str, Any]

MAX_ATTEMPTS = 4
"""How often a unit is begun at most, if the process dies each time."""
FEATURE_BATCH = 64
"""Pictures that an extractor gets at once; a part of what decides the last digits, so it is no setting."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Pictures of one kind, or captions, and where their features are or will be.

    Args:
        kind: drawn by the trained model, or the same with fresh weights; a split's own; or the words of captions.
        split: of the dataset.
        num_images: how many.
        resolutions: of the pictures; none for captions.
        root: directory of the stores.
        settings: everything that decides the pictures, but resolution and number. Values of JSON.
        sample: how they are drawn.
        pictures: directory of those that are kept as PNG.
        num_kept: so many are, from the first.
        layer_captions: whose caption each layer follows, as in the configuration.
    """

    kind: Kind
    split: str
    num_images: int
    resolutions: tuple[int, ...]
    root: str
    settings: dict[str, Any]
    sample: SampleConfig | None = None
    pictures: str = ""
    num_kept: int = 0
    layer_captions: tuple[int, ...] = ()

    @property
    def is_drawn(self) -> bool:
        """Whether a model makes the pictures."""
        return self.kind in ("trained", "untrained")

    def store(self, extractor: ExtractorSpec, resolution: int | None = None) -> FeatureStore:
        """Where the features are; `resolution` is None for captions."""
        settings = {
            **self.settings,
            **made_by(extractor),
            "feature_batch": FEATURE_BATCH,
            "resolution": resolution,
        }
        of = {"real": self.split}.get(self.kind, self.kind)
        name = "-".join(map(str, [of, *([resolution] if resolution else []), extractor.name]))
        decides = fingerprint(settings | {"num_images": self.num_images})
        return FeatureStore(
            path=storage.join(self.root, f"{name}-{decides}"),
            num_images=self.num_images,
            dim=extractor.dim,
            num_classes=extractor.num_classes or 0,
            settings=settings,
        )

    def stores(self, specs: "Specs") -> list[FeatureStore]:
        """All stores of the series."""
        if self.kind == "captions":
            return [] if specs.clip is None else [self.store(specs.clip)]
        return [self.store(spec, size) for size in self.resolutions for spec in specs.of_pictures]

    def kept(self, resolution: int, image: int) -> str:
        """Path of a picture that is kept."""
        return storage.join(self.pictures, str(resolution), f"{image:05d}.png")

    def images(self, shard: int) -> range:
        """Numbers of a shard's pictures."""
        return range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, self.num_images))

    def missing(self, specs: "Specs") -> list[int]:
        """Shards that have yet to be made, or to be finished."""
        missing = {shard for store in self.stores(specs) for shard in store.missing()}
        for resolution in self.resolutions if self.num_kept else ():
            there = set(storage.list_directory(storage.join(self.pictures, str(resolution))))
            missing |= {
                image // SHARD_IMAGES
                for image in range(self.num_kept)
                if self.kept(resolution, image).rpartition("/")[2] not in there
            }
        return sorted(missing)


class Specs(NamedTuple):
    """The extractors of an evaluation, without their networks."""

    main: ExtractorSpec
    clip: ExtractorSpec | None
    "For CMMD and the CLIP score."

    @property
    def of_pictures(self) -> list[ExtractorSpec]:
        """Those that every picture is given to."""
        return [self.main, *([self.clip] if self.clip is not None else [])]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker is told."""

    series: tuple[Series, ...]
    captions: tuple[Caption, ...]
    "That pictures are drawn for, in their order."
    dataset: str
    "Path of the prepared dataset."
    model: str
    "Path of the model's directory."
    options: EvaluateConfig
    device: str

    def of(self, row: Row) -> tuple[Series, range]:
        """The series and the pictures of a unit."""
        series = self.series[row["series"]]
        return series, series.images(row["shard"])

    def captions_of(self, images: range, offset: int = 0) -> Sequence[Caption]:
        """What the pictures are drawn for; with an offset, the words of so many pictures further on, round to the first."""
        count = len(self.captions)
        return [
            self.captions[(i + offset) % count]._replace(seed=self.captions[i].seed) for i in images
        ]


class Worker:
    """What actors have in common.

    Args:
        work: what all are told.
        attempts: handle of the actor `attempts.Attempts`; None to count nothing.
    """

    what: str
    "It does to pictures."

    def __init__(self, work: Work, attempts: Any = None) -> None:
        setup_logging()
        self.work = work
        self.attempts = attempts

    def begin(self, row: Row) -> tuple[Series, range]:
        """The series and the pictures of a unit.

        Raises:
            StageFailed: it was begun too often.
        """
        series, images = self.work.of(row)
        if self.attempts is not None:
            import ray

            counted = self.attempts.begin.remote(self.what, row["series"], row["shard"])
            if ray.get(counted) > MAX_ATTEMPTS:
                raise StageFailed(
                    f"evaluation failed: {MAX_ATTEMPTS} processes were lost while they {self.what} pictures "
                    f"{images.start} to {images.stop - 1} ({series.kind}), perhaps for want of memory: lower "
                    "evaluate.batch_size, or see Ray's logs; the same command goes on from what is finished"
                )
        return series, images


class Draw(Worker):
    """An actor that holds the model, and draws the pictures of a unit."""

    what = "drew"

    def __init__(self, work: Work, attempts: Any = None) -> None:
        super().__init__(work, attempts)
        torch.set_num_threads(max(1, int(work.options.cpus_per_sampler)))
        self.dataset = PreparedDataset.open(work.dataset)
        self.trained = LayeredPipeline.from_pretrained(work.model, work.device)

    @functools.cached_property
    def untrained(self) -> LayeredPipeline:
        """The same network with fresh weights."""
        return self.trained.untrained()

    def __call__(self, row: Row) -> Row:
        """Adds pixels."""
        series, images = self.begin(row)
        if series.sample is None:
            raise ValueError(f"pictures of kind {series.kind} are not drawn")
        lowest, *higher = series.layer_captions or (0,)
        sizes = self.trained.resolutions[1:] if higher else ()
        pictures = draw(
            self.trained if series.kind == "trained" else self.untrained,
            self.dataset,
            series.split,
            self.work.captions_of(images, lowest),
            series.sample,
            self.work.options.batch_size,
            {
                size: self.work.captions_of(images, offset)
                for size, offset in zip(sizes, higher, strict=True)
                if offset != lowest
            },
        )
        return row | _packed(pictures, self.trained.resolutions)


def load(row: Row, *, work: Work, diffusion: LayeredDiffusion) -> Row:
    """Adds pixels of a split's pictures to a unit; captions have none."""
    series, images = work.of(row)
    pictures: Pyramid = {}
    if series.kind == "real":
        torch.set_num_threads(1)
        dataset = PreparedDataset.open(work.dataset)
        found = real_pictures(diffusion, dataset, series.split, images)
        pictures = {resolution: found[resolution] for resolution in series.resolutions}
    return row | _packed(pictures, diffusion.resolutions)


def _packed(pictures: Pyramid, resolutions: Sequence[int]) -> Row:
    """As columns of bytes, the same for every kind of unit."""
    return {str(r): pictures[r].tobytes() if r in pictures else b"" for r in resolutions}


class Extract(Worker):
    """An actor that holds the extractors, and writes the features of a unit."""

    what = "extracted features of"

    def __init__(self, work: Work, attempts: Any = None) -> None:
        super().__init__(work, attempts)
        torch.set_num_threads(max(1, int(work.options.cpus_per_extractor)))
        self.networks = load_extractors(work.options, work.device)

    @functools.cached_property
    def clip_text(self) -> ClipText:
        """CLIP's tower that reads captions."""
        return ClipText(self.work.device, weights=self.work.options.clip_weights)

    def __call__(self, row: Row) -> Row:
        """Writes the unit's files; returns what is left of it."""
        series, images = self.begin(row)
        if series.kind == "captions":
            self._embed(series, row["shard"])
        for resolution in series.resolutions:
            shape = (len(images), resolution, resolution, 3)
            pixels = np.frombuffer(row[str(resolution)], np.uint8).reshape(shape)
            # Pictures first: a shard whose features are there is finished.
            for image, picture in zip(images, pixels, strict=True):
                if image < series.num_kept:
                    content = png_bytes(Image.fromarray(picture))
                    storage.write_atomically(series.kept(resolution, image), content)
            for network in self.networks:
                store = series.store(network.spec, resolution)
                store.write(row["shard"], features_of(network, pixels))
        return {"series": row["series"], "shard": row["shard"]}

    def _embed(self, series: Series, shard: int) -> None:
        dataset = PreparedDataset.open(self.work.dataset)
        captions = self.work.captions_of(series.images(shard))
        texts = texts_of(dataset, series.split, captions)
        parts = [
            self.clip_text([texts[number] for number in numbers]).cpu().numpy()
            for numbers in batches_of(len(texts), FEATURE_BATCH)
        ]
        features = np.concatenate(parts)[: len(texts)]
        (store,) = series.stores(specs_of(self.networks))
        store.write(shard, Contents(features, None))


def load_extractors(options: EvaluateConfig, device: str = "cpu") -> list[FeatureExtractor]:
    """The extractor of the scores, and CLIP if it is asked for.

    Raises:
        UserError: as `extractors.load`.
    """
    found = [extractors.load(options, device)]
    if options.clip_weights is not None:
        names = extractors.Names("extractor", "evaluate.clip_weights", "the SHA-256")
        found.append(extractors.load_named("clip", device, options.clip_weights, None, names))
    return found


def specs_of(networks: Sequence[FeatureExtractor]) -> Specs:
    """What `load_extractors` returned, without the networks."""
    main, *others = (network.spec for network in networks)
    return Specs(main, others[0] if others else None)


def features_of(network: FeatureExtractor, pixels: UInt8[ndarray, "n h w 3"]) -> Contents:
    """Features and logits of pictures, in batches of one size."""
    features, logits = [], []
    for batch in _batches(pixels):
        found = network(torch.from_numpy(batch))
        features.append(found.features.cpu().numpy())
        if found.logits is not None:
            logits.append(found.logits.cpu().numpy())
    count = len(pixels)
    return Contents(
        np.concatenate(features)[:count], np.concatenate(logits)[:count] if logits else None
    )


def _batches(pixels: UInt8[ndarray, "n h w 3"]) -> Iterator[UInt8[ndarray, "b h w 3"]]:
    for numbers in batches_of(len(pixels), FEATURE_BATCH):
        yield pixels[numbers]
