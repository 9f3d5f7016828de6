"""What the stages agree on: the layout of a prepared dataset and of a run, column names, and the manifest.

A dataset is ``manifest.json``, written last; ``train/00000.parquet`` ... and ``val/...``, one row an image;
``rejects/train-00000.parquet`` ... where pictures could not be used; and ``null_text.npy``, the embedding of the empty
caption. docs/dataset.md describes it for those who read it without this project. Nothing here imports Ray.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

VERSION = 1
"""Of the dataset's format; a reader refuses any other."""

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
SETTINGS = "preparing.json"
"""Settings of a dataset that is not finished, and `PLANNED`; gone once the manifest is there."""
PLANNED = "num_images"
"""Pictures that it is being made of, used or not."""
NULL_TEXT = "null_text.npy"
REJECTS_FOLDER = "rejects"
ROWS_PER_GROUP = 64
"""Rows are in an order that does not depend on content, so that a row group is a random sample."""

NO_ENCODER = "none"
"""In place of an encoder's name and weights: captions have no tokens."""

IMAGE_ID, FILE_NAME, WIDTH, HEIGHT = "image_id", "file_name", "width", "height"
IMAGE, CAPTIONS, CAPTION_IDS = "image", "captions", "caption_ids"
TEXT_COLUMNS = TEXT, TEXT_LENGTHS = "text", "text_lengths"

OUR_METADATA = b"layered"
"""Key of a JSON object in each file's metadata: fingerprint, resolution, text_width and the file's counts."""

_COLUMNS = {
    IMAGE_ID: (pa.int64(), {"dtype": "int64", "_type": "Value"}),
    FILE_NAME: (pa.string(), {"dtype": "string", "_type": "Value"}),
    WIDTH: (pa.int32(), {"dtype": "int32", "_type": "Value"}),
    HEIGHT: (pa.int32(), {"dtype": "int32", "_type": "Value"}),
    IMAGE: (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
    CAPTIONS: (pa.list_(pa.string()), ("string",)),
    CAPTION_IDS: (pa.list_(pa.int64()), ("int64",)),
    # Not nullable: read in three quarters of the time.
    TEXT: (pa.list_(pa.field("element", pa.float16(), nullable=False)), ("float16",)),
    TEXT_LENGTHS: (pa.list_(pa.int32()), ("int32",)),
}
"""Column -> Arrow type, and feature of Hugging Face `datasets`; a tuple is a list of that type."""

REJECTS = pa.schema(
    [
        (IMAGE_ID, pa.int64()),
        (FILE_NAME, pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)
"""Pictures that are not in the dataset: ``stage`` is ``index``, ``read`` or ``decode``."""


def arrow_schema(ours: dict[str, Any]) -> pa.Schema:
    """Schema of the Parquet files, with the features of Hugging Face `datasets` and our own metadata."""
    features = {
        name: {"feature": {"dtype": feature[0], "_type": "Value"}, "_type": "Sequence"}
        if isinstance(feature, tuple)
        else feature
        for name, (_, feature) in _COLUMNS.items()
    }
    metadata = {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        OUR_METADATA: json.dumps(ours, sort_keys=True).encode(),
    }
    return pa.schema([(name, kind) for name, (kind, _) in _COLUMNS.items()], metadata=metadata)


def ours_of(found: pa.Schema) -> dict[str, Any]:
    """Our own metadata of a file's schema; empty for a file that is not ours."""
    ours: dict[str, Any] = json.loads((found.metadata or {}).get(OUR_METADATA, b"{}"))
    return ours


def data_file(split: str, index: int) -> str:
    """Path of a Parquet file inside the dataset."""
    return f"{split}/{index:05d}.parquet"


def rejects_file(split: str, index: int) -> str:
    """Path of the rejected pictures that would have been in `data_file`."""
    return f"{REJECTS_FOLDER}/{split}-{index:05d}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of the pictures and captions of a file or a split; adds up."""

    images: int = 0
    "Rows."
    rejects: int = 0
    "Pictures of the annotation file that are not rows; images + rejects are all of them."
    captions: int = 0
    "Captions of the rows."
    tokens: int = 0
    "Of those captions."
    empty_captions: int = 0
    "Captions without a word, dropped from pictures that have others."
    truncated_captions: int = 0
    "Captions with more tokens than were kept."

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        names = (field.name for field in dataclasses.fields(self))
        return Counts(**dict(zip(names, (a + b for a, b in pairs), strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One Parquet file of a split."""

    path: str
    "Inside the dataset."
    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSize:
    """Room that the text of a caption takes, on average."""

    bytes_per_caption: float
    padded_bytes_per_caption: float
    "What it would take with every caption padded to ``max_tokens``."


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split of a dataset."""

    counts: Counts
    text_size: TextSize
    files: tuple[DataFile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that decides a dataset's content. Equal settings, equal bytes."""

    version: int
    train_annotations: str | None
    "sha256 of the file, or of what a source of another kind lists; None without the split."
    train_images: str | None
    "As configured."
    val_annotations: str | None
    val_images: str | None
    crop: Literal["center", "random"]
    max_pixels: int
    "Of a picture that is not rejected for its size."
    resolution: int
    "Pixels of a side."
    image_format: Literal["png", "webp", "jpeg"]
    image_quality: int | None
    "Of jpeg; None for the lossless formats."
    rows_per_file: int
    encoder: str
    "Name, as configured; `NO_ENCODER` for a dataset without text."
    encoder_weights: str
    "`layered_model.text.EncoderInfo.weights`."
    encoder_precision: str
    encoder_batch_size: int
    "Captions encoded together; another number moves the last bit of some values."
    text_width: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """``manifest.json``: what a finished dataset is and holds."""

    fingerprint: str
    "Of the settings."
    settings: Settings
    rows_per_group: int
    splits: dict[str, Split]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is not a manifest, or of another version.
        """
        try:
            tree = json.loads(text)
            version = tree["settings"]["version"]
            if version != VERSION:
                raise ValueError(f"format version {version}; this program reads {VERSION}")
            splits = {
                name: Split(
                    counts=Counts(**split["counts"]),
                    text_size=TextSize(**split["text_size"]),
                    files=tuple(DataFile(**file) for file in split["files"]),
                )
                for name, split in tree["splits"].items()
            }
            settings = Settings(**tree["settings"])
            return cls(
                fingerprint=tree["fingerprint"],
                settings=settings,
                rows_per_group=tree["rows_per_group"],
                splits=splits,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error


@dataclass(frozen=True, slots=True)
class RunDir:
    """Where things are in a run's directory."""

    path: str
    "Of the run's directory, absolute."

    @property
    def config(self) -> str:
        """The resolved configuration."""
        return f"{self.path}/config.yaml"

    @property
    def checkpoints(self) -> str:
        """Directory of Ray Train's checkpoints."""
        return f"{self.path}/checkpoints"

    @property
    def metrics_log(self) -> str:
        """One JSON object a line, written while training."""
        return f"{self.path}/metrics.jsonl"

    @property
    def tensorboard(self) -> str:
        """TensorBoard's events; for runs on a local path only."""
        return f"{self.path}/tensorboard"

    @property
    def samples(self) -> str:
        """Directory of the grids drawn while training."""
        return f"{self.path}/samples"

    @property
    def model(self) -> str:
        """Directory that `LayeredPipeline.from_pretrained` loads."""
        return f"{self.path}/model"

    @property
    def snapshots(self) -> str:
        """Directory of averaged weights kept while training, each a model's directory."""
        return f"{self.path}/snapshots"

    @property
    def scores(self) -> str:
        """Results of the evaluation."""
        return f"{self.path}/metrics.json"

    @property
    def grid(self) -> str:
        """Picture of captions and samples, from the evaluation."""
        return f"{self.path}/grid.png"

    @property
    def nearest(self) -> str:
        """Picture of samples beside the training pictures nearest to them, from the evaluation."""
        return f"{self.path}/nearest.png"

    @property
    def sweep(self) -> str:
        """Charts of an evaluation's sweep over guidance and steps."""
        return f"{self.path}/sweep.svg"

    @property
    def evaluation_md(self) -> str:
        """The evaluation for people to read."""
        return f"{self.path}/evaluation.md"

    @property
    def evaluation_html(self) -> str:
        """The same as a page that holds its pictures."""
        return f"{self.path}/evaluation.html"

    @property
    def environment(self) -> str:
        """What training ran on: versions of packages, devices, number of workers; of the last start."""
        return f"{self.path}/environment.json"

    @property
    def report(self) -> str:
        """The page that `layered report` writes."""
        return f"{self.path}/report.html"
