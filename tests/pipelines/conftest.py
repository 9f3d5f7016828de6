"""A small COCO of every kind of picture, good and bad, and `prepare` without Ray."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from layered_model import LayeredPipeline, ModelConfig, checkpoint, make_network
from layered_model.text import describe
from pipelines import prepare, storage, units
from pipelines.config import load_config
from pipelines.recipe import sampling_defaults
from tests.pipelines import nodes

WORDS = 4  # width of the toy text encoder
MAX_TOKENS = 12


def pixels(seed: int, height: int = 48, width: int = 80) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def _file(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _pictures() -> dict[int, tuple[str, bytes | None, list[str]]]:
    """Image id -> file name, content (None: no file), captions."""
    color = Image.fromarray(pixels(0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    jpeg = _file(Image.fromarray(pixels(1)), "JPEG", quality=95)
    deep = np.linspace(0, 65535, 48 * 80).astype(np.uint16).reshape(48, 80)
    return {
        1: ("good.jpg", jpeg, ["a cat", "a dog", "a cat", "two birds", "a  red\nbus"]),
        2: ("gray.png", _file(color.convert("L"), "PNG"), ["gray"]),
        3: ("cmyk.jpg", _file(color.convert("CMYK"), "JPEG"), ["printed"]),
        4: ("rgba.png", _file(Image.new("RGBA", (60, 60)), "PNG"), ["nothing to see"]),
        5: ("deep.png", _file(Image.fromarray(deep), "PNG"), ["deep"]),
        6: ("rotated.jpg", _file(color, "JPEG", exif=exif), ["turned"]),
        7: ("missing.jpg", None, ["not there"]),
        8: ("half.jpg", jpeg[: len(jpeg) // 2], ["cut in half"]),
        9: ("text.jpg", b"I am no picture", ["a text"]),
        10: ("one_empty.png", _file(color, "PNG"), ["", "has another"]),
        11: ("all_empty.png", _file(color, "PNG"), ["", "  "]),
        12: ("no_caption.png", _file(color, "PNG"), []),
        13: ("long.png", _file(color, "PNG"), ["word " * 1000]),
    }


BAD = {7: "read", 8: "decode", 9: "decode", 11: "index", 12: "index"}
"""Image id -> stage of its rejection; picture 1 also comes twice, and the second is rejected."""
NUM_TRAIN, NUM_VAL = 14, 5
NUM_MANY = 150  # of each split of `many`: two files of features


def flip_a_picture(path: Path, row_group: int) -> None:
    """Flips a bit of the pictures of a row group of a Parquet file."""
    group = pq.read_metadata(path).row_group(row_group)
    columns = [group.column(number) for number in range(group.num_columns)]
    (images,) = (column for column in columns if column.path_in_schema == "image.bytes")
    content = bytearray(path.read_bytes())
    content[images.data_page_offset + images.total_compressed_size - 20] ^= 1
    path.write_bytes(content)


def _write_split(folder: Path, split: str, pictures: dict, again: bool) -> None:
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for image_id, (name, content, captions) in pictures.items():
        images.append({"id": image_id, "file_name": name})
        if content is not None:
            (folder / split / name).write_bytes(content)
        annotations += [
            {"id": image_id * 100 + k, "image_id": image_id, "caption": caption}
            for k, caption in enumerate(captions)
        ]
    if again:
        images.append({"id": 1, "file_name": "gray.png"})
    tree = {"images": images, "annotations": annotations}
    (folder / f"captions_{split}.json").write_text(json.dumps(tree))


@pytest.fixture(scope="session")
def descendants():
    """Finds what a process started, and what that started: process ids and command lines."""
    return nodes.descendants


@pytest.fixture(scope="session")
def kill():
    """Ends processes that may be gone already."""
    return nodes.kill


@pytest.fixture(scope="session")
def s3_server(s3_port: int, tmp_path_factory) -> Iterator[subprocess.Popen]:
    """A server with a bucket, ``s3://bucket``. See `s3_server.py`."""
    pytest.importorskip("moto")
    with (tmp_path_factory.mktemp("s3") / "log").open("wb") as log:
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(s3_port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            # Refused until the server is up.
            filesystem, name = storage._remote("s3://bucket")
            filesystem.mkdir(name)
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """Folder with captions_{train,val}.json, train/ and val/; train has every fault there is."""
    folder = tmp_path_factory.mktemp("coco")
    _write_split(folder, "train", _pictures(), again=True)
    good = {
        20 + k: (f"{k}.png", _file(Image.fromarray(pixels(k)), "PNG"), [f"picture {k}"])
        for k in range(NUM_VAL)
    }
    _write_split(folder, "val", good, again=False)
    return folder


@pytest.fixture(scope="session")
def toy_encoder(tmp_path_factory) -> Path:
    """A directory that looks like an encoder to `describe`."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "config.json").write_text(json.dumps({"d_model": WORDS}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def configure(coco, toy_encoder, tmp_path):
    """Makes configurations that prepare `coco` into ``tmp_path/dataset``."""

    def make(*overrides: str):
        paths = {
            "data.train_annotations": coco / "captions_train.json",
            "data.train_images": coco / "train",
            "data.val_annotations": coco / "captions_val.json",
            "data.val_images": coco / "val",
            "text.encoder": toy_encoder,
            "dataset": tmp_path / "dataset",
        }
        settings = {
            "data.max_reject_fraction": 0.5,
            "data.rows_per_file": 4,
            "text.max_tokens": MAX_TOKENS,
            "model.text_width": WORDS,
            "model.resolutions": "[16,32,64]",
        }
        ours = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
        ours += [f"{key}={value}" for key, value in settings.items()]
        return load_config("demo", [*ours, *overrides])

    return make


class ToyEncoder:
    """One token a word, and one at the end; a token is made of the word's characters."""

    width = WORDS

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> "ToyEncoder":
        return cls()

    def encode(self, captions, batch_size=64):
        tokens = [self.embed(caption) for caption in captions]
        truncated = [len(caption.split()) + 1 > MAX_TOKENS for caption in captions]
        return SimpleNamespace(tokens=tokens, truncated=truncated)

    @staticmethod
    def embed(caption: str) -> torch.Tensor:
        words = [*caption.split(), "."][:MAX_TOKENS]
        rows = [[ord(word[k % len(word)]) for k in range(WORDS)] for word in words]
        return torch.tensor(rows, dtype=torch.float16)


@pytest.fixture(scope="session")
def embed():
    """What the toy encoder makes of a caption."""
    return lambda caption: ToyEncoder.embed(caption).numpy()


@pytest.fixture
def without_ray(monkeypatch):
    """`prepare` does its units here, one after the other; returns the list of those it made."""
    made = []

    def make(config, plan, missing, kept):
        monkeypatch.setattr("layered_model.text.TextEncoder", ToyEncoder)
        write = units.EncodeAndWrite(plan.dataset, plan.fingerprint, plan.settings, "cpu")
        files = {}
        for row in missing:
            done = write(units.decode_unit(row, sources=plan.sources, settings=plan.settings))
            files[row["split"], row["index"]] = units.finished_from_json(done["file"])
            made.append((row["split"], row["index"]))
        return files

    monkeypatch.setattr(prepare, "_make", make)
    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prepared_once() -> list[Path]:
    """Where `prepared` keeps its dataset for the next test."""
    return []


@pytest.fixture
def prepared(configure, without_ray, prepared_once, tmp_path, tmp_path_factory) -> Path:
    """``tmp_path/dataset`` as `prepare` makes it of `coco`: once, and each test has a copy."""
    if not prepared_once:
        prepare.run(configure())
        kept = tmp_path_factory.mktemp("prepared") / "dataset"
        prepared_once.append(Path(shutil.copytree(tmp_path / "dataset", kept)))
        return tmp_path / "dataset"
    without_ray.clear()
    return Path(shutil.copytree(prepared_once[0], tmp_path / "dataset"))


SMALL_MODEL = (
    "model.resolutions=[16,32]",
    "model.channels=[8,8,8]",
    "model.blocks=[1,1,1]",
    "model.attention=[0,1]",
    "model.embedding_width=16",
    "model.head_width=8",
    "diffusion.reference_resolution=16",
    "sample.num_steps=2",
    "sample.guidance=2.0",
)


def write_model(config, seed=0):
    """Writes a small random model, whose output is not zero, where training would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(config.model)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    model = ModelConfig(
        network=config.model,
        diffusion=config.diffusion,
        text=describe(config.text.encoder, max_tokens=config.text.max_tokens),
        sampling=sampling_defaults(config.sample),
        num_images_trained=0,
    )
    for name, content in checkpoint.encode(model, network.state_dict()).items():
        storage.write_atomically(f"{config.run}/model/{name}", content)


@pytest.fixture
def save_model():
    """Writes a small random model, whose output is not zero, where training would."""
    return write_model


@pytest.fixture
def trained(configure, save_model, tmp_path):
    """Configuration of a run that has a small random model."""
    config = configure(*SMALL_MODEL, f"run={json.dumps(str(tmp_path / 'run'))}")
    save_model(config)
    return config


@pytest.fixture(scope="session")
def served(t5) -> Path:
    """Directory of a small random model of 8, 16 and 32 pixels with the small T5, whose pictures follow the prompt."""
    config = load_config(
        "demo",
        [
            *SMALL_MODEL,
            "model.resolutions=[8,16,32]",
            "model.channels=[8,8,8,8]",
            "model.blocks=[1,1,1,1]",
            "model.text_width=24",
            "diffusion.reference_resolution=8",
            f"text.encoder={json.dumps(str(t5))}",
            f"run={json.dumps(str(t5.parent / 'served'))}",
        ],
    )
    write_model(config)
    return Path(config.run)


@pytest.fixture
def toy_prompts(monkeypatch):
    """Prompts are encoded by the toy encoder."""
    monkeypatch.setattr(LayeredPipeline, "text_encoder", ToyEncoder())


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """Two splits of drawn pictures, as a folder that `prepare` reads."""
    folder = tmp_path_factory.mktemp("many")
    for split, first in (("train", 1000), ("val", 0)):
        (folder / split).mkdir()
        tree: dict[str, list] = {"images": [], "annotations": []}
        for number in range(first, first + NUM_MANY):
            name = f"{number}.png"
            Image.fromarray(pixels(number, 32, 32)).save(folder / split / name)
            tree["images"].append({"id": number, "file_name": name})
            for k in range(2):
                caption = {"image_id": number, "id": 2 * number + k, "caption": f"picture {number}"}
                tree["annotations"].append(caption)
        (folder / f"captions_{split}.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def judged(trained, many, clip, without_ray):
    """Configuration of a prepared dataset and a run with a model, judged by a small CLIP."""
    paths = {
        f"{split}_{what}": str(many / path)
        for split in ("train", "val")
        for what, path in (("annotations", f"captions_{split}.json"), ("images", split))
    }
    data = dataclasses.replace(trained.data, rows_per_file=100, **paths)
    config = dataclasses.replace(trained, data=data)
    prepare.run(config)
    options = {
        "num_images": 140,
        "batch_size": 48,
        "num_samplers": 1,
        "num_extractors": 1,
        "extractor": "clip",
        "extractor_weights": str(clip),
        "num_kept": 30,
        "num_nearest": 2,
        "untrained": False,
    }
    evaluate = dataclasses.replace(config.evaluate, **options)
    return dataclasses.replace(config, evaluate=evaluate)
