"""The sections of the configuration: what each setting means, and what it must satisfy alone.

No field has a default here: ``ray_config.yaml`` is the one place where values live. A section refuses a value with a ValueError
that begins with the field's name; `config` puts the section's before it.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from layered_model.steppers import SamplerKind


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Pictures and captions. Paths are local, ``s3://`` or ``package:name/path``."""

    train_annotations: str | None
    """Captions of the training split: a ``.json`` of COCO's form, for example ``annotations/captions_train2017.json``; a
    ``.parquet`` file or a folder of them, a row a picture; null where each picture has a ``.txt`` beside it, a caption a line."""
    train_images: str | None
    "Folder of the training split's pictures; null where the Parquet rows hold them."
    val_annotations: str | None
    "Captions of the validation split, in the same ways."
    val_images: str | None
    "Folder of the validation split's pictures; null for both means that there is no such split."
    image_column: str
    "Column of Parquet rows with the picture: bytes, a struct of ``bytes`` and ``path``, or a file's name."
    caption_column: str
    "Column of Parquet rows with the caption or the list of captions."
    id_column: str | None
    "Column of Parquet rows with the picture's number; null numbers the rows."
    crop: Literal["center", "random"]
    "Which square of a picture is kept: the middle, or one that the picture's id decides."
    image_format: Literal["png", "webp", "jpeg"]
    "Encoding of the prepared pictures; png and webp are lossless. A file that is such a square already is kept as it is."
    image_quality: int
    "Quality of jpeg, 1 to 100; the lossless formats ignore it."
    max_pixels: int
    "Larger pictures are rejected before they are decoded, which takes about 8 bytes a pixel of a worker's memory."
    rows_per_file: int
    "Pictures in one Parquet file."
    max_reject_fraction: float
    "Preparing fails when more than this fraction of the pictures cannot be used, in [0, 1]."

    def __post_init__(self) -> None:
        check(1 <= self.image_quality <= 100, "image_quality", self, "from 1 to 100")
        check_positive(self, "rows_per_file", "max_pixels")
        check_fraction(self, "max_reject_fraction")
        if self.train_annotations is None and self.train_images is None:
            raise ValueError("train_annotations=None must be given, or train_images, or both")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The frozen text encoder."""

    encoder: str
    """Name on the model hub, a directory, or ``package:name/path`` for a directory inside an installed package. ``none`` prepares
    pictures and captions without embeddings, for another `prepare` to read."""
    revision: str | None
    "Commit of the model on the hub; null for a directory."
    max_tokens: int
    "Longer captions are cut here."
    precision: Literal["float32", "bfloat16"]
    "Of the encoder's weights and arithmetic; embeddings are stored as float16."
    batch_size: int
    "Captions encoded together, of like length."
    num_actors: int
    "Copies of the encoder working side by side: one for each GPU or, without GPUs, for each CPU."
    use_gpu: bool | None
    "Give each copy a GPU, and wait for it where the cluster can grow; null shares out the GPUs that are there when it begins."

    def __post_init__(self) -> None:
        check_positive(self, "max_tokens", "batch_size", "num_actors")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Training. Lengths count pictures seen, so that they do not change with the batch size."""

    num_images: int
    "Pictures to train on, counting repeats."
    batch_size: int
    "Pictures of one optimizer step, over all workers."
    accumulation_steps: int
    "Parts in which a worker does its share of a batch, one after the other: less memory, the same step."
    num_workers: int
    "Processes, each with a copy of the model."
    min_workers: int | None
    "Go on with as few as this when nodes are lost, and with more again when they come back; null for no fewer."
    cpus_per_worker: float
    "CPUs that Ray reserves for a worker, which decodes pictures in as many threads."
    use_gpu: bool
    "Give each worker a GPU."
    optimizer: Literal["adamw", "muon"]
    "AdamW, or Muon for the convolutions and AdamW for the rest: more per step, fewer steps. See `pipelines.optimizers`."
    learning_rate: float
    "Peak of the learning rate, of one scale for both optimizers."
    warmup_images: int
    "The learning rate rises linearly over this many pictures."
    cooldown_images: int
    "It falls linearly to zero over the last so many pictures; 0 for not at all."
    weight_decay: float
    "Decoupled weight decay, times the learning rate."
    grad_clip: float
    "Largest norm of the gradient."
    ema_relative_width: float
    "Width of the averaged weights' window relative to the length of training, in (0, 0.28]."
    ema_decay: float | None
    "Average with this fixed decay instead, for example 0.9999; null for the relative width."
    ema_snapshot_widths: tuple[float, ...]
    """Widths that are averaged beside and kept at each checkpoint, from which any other can be made after training, for example
    [0.05, 0.1]; each takes a model's room at each checkpoint. Empty for none. See `pipelines.snapshots`."""
    text_dropout: float
    "Fraction of pictures trained without their caption, which guidance needs; in [0, 1]."
    precision: Literal["float32", "bfloat16"]
    "Of the network's arithmetic; weights, noise and loss stay float32."
    compile: bool
    "Compile the network: some minutes at the start, faster after. Worth it on a GPU."
    checkpoint_upper_layers: bool
    "Compute the layers above the trunk again on the way back in place of keeping their activations: less memory, more time."
    crop_resolution: int | None
    """Side, in pixels of the top, of the random square on which the layers above the trunk are trained while the trunk sees the
    whole picture; null for all of it. Needs model.upper_norm=pixel."""
    grow_from: str | None
    "Directory of a trained model with fewer resolutions, whose weights the lower layers start from; null for none."
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...]
    "What shows the log beside ``metrics.jsonl``; mlflow and wandb need their packages. See `pipelines.trackers`."
    log_every_images: int
    "Pictures between two lines of metrics."
    checkpoint_every_images: int
    "Pictures between two checkpoints."
    num_checkpoints_kept: int
    "Older checkpoints are deleted."
    keep_checkpoints_every_images: int | None
    "Checkpoints at multiples of this are kept for good; null for none."
    keep_best_checkpoint: bool
    "Keep the one with the lowest validation loss too."
    validate_every_images: int
    "Pictures between two validation losses."
    num_validation_images: int
    "Of the validation split, for its loss, with the same times and noise each time; 0 for none."
    score_every_images: int
    "Pictures between two scores of what the averaged weights draw (see `pipelines.running_score`); 0 for never."
    num_score_images: int
    "Pictures that are drawn for a score, of captions of the validation split, and at most as many as that has."
    grid_every_images: int
    "Pictures between two grids of samples."
    max_failures: int
    "How often a lost worker is replaced and training goes on from the last checkpoint."
    max_skipped_steps: int
    "Steps whose gradient is not finite and that are left out; training stops at one more."

    def __post_init__(self) -> None:
        check_positive(
            self,
            "num_images",
            "batch_size",
            "accumulation_steps",
            "num_workers",
            "cpus_per_worker",
            "learning_rate",
            "grad_clip",
            "log_every_images",
            "checkpoint_every_images",
            "num_checkpoints_kept",
            "validate_every_images",
            "grid_every_images",
        )
        check_not_negative(
            self,
            "warmup_images",
            "cooldown_images",
            "weight_decay",
            "num_validation_images",
            "score_every_images",
            "max_failures",
            "max_skipped_steps",
        )
        check(self.num_score_images >= 2, "num_score_images", self, "at least 2")
        if self.keep_checkpoints_every_images is not None:
            check_positive(self, "keep_checkpoints_every_images")
        check(
            0.0 < self.ema_relative_width <= 0.28, "ema_relative_width", self, "above 0, up to 0.28"
        )
        if self.ema_decay is not None:
            check(0.0 <= self.ema_decay < 1.0, "ema_decay", self, "from 0 to below 1, or null")
        widths = self.ema_snapshot_widths
        distinct = len(set(widths)) == len(widths) and all(0.0 < width <= 0.28 for width in widths)
        check(distinct, "ema_snapshot_widths", self, "distinct numbers above 0, up to 0.28")
        check_fraction(self, "text_dropout")
        self._check_shares()

    def _check_shares(self) -> None:
        fewest = self.num_workers if self.min_workers is None else self.min_workers
        allowed = 1 <= fewest <= self.num_workers
        check(
            allowed, "min_workers", self, f"from 1 to train.num_workers={self.num_workers}, or null"
        )
        for workers in range(fewest, self.num_workers + 1):
            if self.batch_size % (workers * self.accumulation_steps):
                raise ValueError(
                    f"batch_size={self.batch_size} must be a multiple of {workers} workers times "
                    f"train.accumulation_steps={self.accumulation_steps}, so that every worker gets equally "
                    f"many; train.num_workers={self.num_workers}, train.min_workers={self.min_workers}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    sampler: SamplerKind
    "DPM-Solver++(2M), flow or SDE; DDIM; DDPM; or Heun, which evaluates the model twice a step."
    num_steps: int
    "Steps from noise to a picture; 20 to 30 do for dpmpp_2m, 50 or more for ddim, hundreds for ddpm."
    guidance: float
    "w in uncond + w (cond - uncond); 1 is off."
    layer_guidance: tuple[float, ...]
    "The same of each layer, low to high; empty for guidance in all of them."
    fuse_weight: float
    "How far lower layers decide their band of the picture, in [0, 1]; 0 is the top layer alone."
    hand_over: float | None
    "Logsnr of the reference below which the lowest layer runs alone, for example -4, which saves time; null for never."

    def __post_init__(self) -> None:
        check_positive(self, "num_steps")
        check_not_negative(self, "guidance")
        check_fraction(self, "fuse_weight")
        known = all(0 <= scale < math.inf for scale in self.layer_guidance)
        check(known, "layer_guidance", self, "0 or above")
        if len(set(self.layer_guidance)) > 1 and self.fuse_weight == 0:
            raise ValueError(
                f"layer_guidance={self.layer_guidance} acts on the layers' bands of the picture, so that fuse_weight must be "
                "above 0, for example 1"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a `LayeredPipeline`'s call."""
        return {
            "sampler": self.sampler,
            "num_steps": self.num_steps,
            "guidance": self.layer_guidance or self.guidance,
            "fuse_weight": self.fuse_weight,
            "hand_over": self.hand_over,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Scores of the trained model at every resolution."""

    split: Literal["train", "val"]
    "Whose captions are drawn, and whose pictures are the reference."
    model: str | None
    "Directory of the model that is scored, such as one of `layered export`; null for the run's own."
    layer_captions: tuple[int, ...]
    """Whose caption each layer follows, low to high: 0 for the picture's own, 1 for that of the next picture drawn, and so on.
    Shows what each layer's prompt decides; empty for the own in all of them."""
    num_images: int
    "Pictures drawn. A distance of Frechet's kind is biased by c/N, so compare equal numbers only."
    batch_size: int
    "Pictures drawn together."
    num_samplers: int
    "Processes that draw, each with a copy of the model; as many as fit, up to this."
    cpus_per_sampler: float
    "CPUs that Ray reserves for one of them."
    num_extractors: int
    "Processes that extract features; as many as fit, up to this."
    cpus_per_extractor: float
    "CPUs that Ray reserves for one of them."
    extractor: Literal[
        "inception",
        "inception_pytorch",
        "inception_clean",
        "efficientnet_lite0",
        "dinov2",
        "clip",
    ]
    """Network whose features are compared; it names the scores. FID's is inception, with the resize of torch-fidelity,
    pytorch-fid or clean-fid; dinov2 and clip know no classes."""
    extractor_weights: str | None
    """Of inception the file pt_inception-2015-12-05-6726825d.pth, local or s3://; of dinov2 and clip a directory in transformers'
    form or a name on the model hub; null for the published ones, downloaded where there is a network."""
    extractor_sha256: str | None
    """SHA-256 of the weights file, for weights other than the published ones, after which the scores are then named
    (fd_inception_1a2b3c4d); null for the published ones."""
    clip_weights: str | None
    "CLIP as transformers has it, a directory or a name on the model hub: adds CMMD and the CLIP score; null for neither."
    untrained: bool
    "Score the same network with fresh weights too, as a yardstick."
    references: str | None
    "Directory that keeps features of the dataset's pictures, for all runs; null for the dataset's path with -features behind it."
    num_kept: int
    "First pictures that are kept as PNG; 24 of them are on the grid."
    num_nearest: int
    "Of those, how many are shown beside the most similar training pictures; 0 for none, and no features of these."
    sweep_guidance: tuple[float, ...]
    "Values of sample.guidance that are scored too; empty for the configured one alone."
    sweep_num_steps: tuple[int, ...]
    "Values of sample.num_steps that are scored too, each with each guidance."

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_samplers", "num_extractors", "num_kept")
        check_positive(self, *counts, "cpus_per_sampler", "cpus_per_extractor")
        check(self.num_images >= 20, "num_images", self, "at least 20, to have an interval")
        check_not_negative(self, "num_nearest")
        check(min(self.layer_captions, default=0) >= 0, "layer_captions", self, "0 or above")
        for name, least in (("sweep_guidance", 0), ("sweep_num_steps", 1)):
            values = getattr(self, name)
            sound = all(value >= least for value in values) and len(set(values)) == len(values)
            check(sound, name, self, f"different numbers from {least} on")
        stated = self.extractor_sha256
        check(
            stated is None or re.fullmatch("[0-9a-f]{64}", stated) is not None,
            "extractor_sha256",
            self,
            "64 digits from 0 to f, or null",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Drawing for others over HTTP."""

    host: str
    "Address to listen at; 127.0.0.1 for this machine alone. Wider without serve.require_key is warned of."
    port: int
    "TCP port."
    min_replicas: int
    "Copies of the model that are always there."
    max_replicas: int
    "Copies that there may be when many pictures are waited for."
    cpus_per_replica: float
    "CPUs that Ray reserves for each; it computes with as many threads."
    use_gpu: bool
    "Give each replica a GPU."
    precision: Literal["float32", "bfloat16"]
    "Of the network's arithmetic."
    max_pictures: int
    "Pictures on their way at once in a replica, which share passes of the network; each holds some memory."
    max_rows: int
    "Rows of one pass of the network; a picture under guidance takes two. On CPU 8 at most, see `layered_model.rows`."
    max_queued: int
    "Pictures that wait in a replica; the next is told to come again later."
    max_seconds: float
    "From the acceptance of a picture to its end, waiting included; what takes longer is given up."
    max_images: int
    "Pictures of one request."
    max_steps: int
    "Steps of one picture."
    max_previews: int
    "Previews of one picture."
    max_prompt_characters: int
    "Of each prompt; how many tokens fit is the model's own limit."
    max_body_bytes: int
    "Of a request."
    text_cache: int
    "Prompts whose embeddings a replica keeps."
    reload_seconds: float | None
    "Look so often whether another model lies in the run's directory, and draw with that from then on; null for never."
    require_key: bool
    "Draw only for who shows an API key."
    keys_file: str | None
    "File of API keys, ``name: key`` a line; null for those in the environment's LAYERED_API_KEYS alone."
    requests_per_minute: int
    "Of one key, or without keys of one address; the next is told to come again later."
    max_concurrent: int
    "Requests of one key, or without keys of one address, that are being answered at once."
    cors_origins: tuple[str, ...]
    "Other sites whose pages may call, for example https://example.org; empty for none."
    url_seconds: float
    "How long a picture that was asked for as a URL can be fetched."
    drain_seconds: float
    "How long a replica that shall go may take to finish what it has accepted."

    def __post_init__(self) -> None:
        check(1 <= self.port <= 65535, "port", self, "from 1 to 65535")
        check_positive(
            self,
            "min_replicas",
            "cpus_per_replica",
            "max_pictures",
            "max_rows",
            "max_queued",
            "max_seconds",
            "max_images",
            "max_steps",
            "max_prompt_characters",
            "max_body_bytes",
            "text_cache",
            "requests_per_minute",
            "max_concurrent",
            "url_seconds",
            "drain_seconds",
        )
        check_not_negative(self, "max_previews")
        if self.reload_seconds is not None:
            check_positive(self, "reload_seconds")
        check(bool(self.host), "host", self, "an address, for example 127.0.0.1")
        fewest = f"at least serve.min_replicas={self.min_replicas}"
        check(self.max_replicas >= self.min_replicas, "max_replicas", self, fewest)
        room = self.max_pictures + self.max_queued
        most = f"at most serve.max_pictures + serve.max_queued={room}: all are accepted or none"
        check(self.max_images <= room, "max_images", self, most)
        check(self.max_rows % 2 == 0, "max_rows", self, "even: guidance takes pairs")
        for origin in self.cors_origins:
            sound = origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin) is not None
            check(sound, "cors_origins", self, "origins such as https://example.org, or *")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Ray. The first two matter only where a stage starts a local Ray, not where it joins a cluster."""

    num_cpus: int | None
    "Logical CPUs of a local Ray; null for what the machine has."
    object_store_bytes: int | None
    "Memory of a local Ray's object store; null lets Ray decide."
    shared_paths: bool
    "Say that every node of a cluster sees local paths, for example over NFS; s3:// needs no such promise."

    def __post_init__(self) -> None:
        if self.num_cpus is not None:
            check_positive(self, "num_cpus")
        if self.object_store_bytes is not None:
            least = 75 * 2**20
            check(
                self.object_store_bytes >= least,
                "object_store_bytes",
                self,
                f"at least {least}, which Ray needs",
            )


def check(condition: bool, name: str, section: object, expected: str) -> None:
    """Refuses a field's value unless the condition holds; says what is expected."""
    if not condition:
        raise ValueError(f"{name}={getattr(section, name)!r} must be {expected}")


def check_positive(section: object, *names: str) -> None:
    """Refuses values of 0 or below."""
    for name in names:
        check(0 < getattr(section, name) < math.inf, name, section, "above 0")


def check_not_negative(section: object, *names: str) -> None:
    """Refuses values below 0."""
    for name in names:
        check(0 <= getattr(section, name) < math.inf, name, section, "0 or above")


def check_fraction(section: object, name: str) -> None:
    """Refuses a value outside [0, 1]."""
    check(0.0 <= getattr(section, name) <= 1.0, name, section, "from 0 to 1")
