"""Pictures and captions -> prepared dataset, on Ray Data.

The pictures are listed before Ray starts (`pipelines.sources`) and cut into units of ``data.rows_per_file``. Each unit is
decoded by a task, gets its text from an actor that holds the encoder, and becomes one Parquet file (`pipelines.units`).
The manifest is written last: a directory with one is a finished dataset, and

    rows + rejects = pictures of the source.

Running the same command again after an interruption keeps the files that are there and makes the missing ones; on a
finished dataset it does nothing. Content is decided by `schema.Settings` alone, neither by the number of workers nor by
the order in which they finish. Run by `cli`.
"""

import collections
import dataclasses
import functools
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from layered_model.text import describe
from pipelines import paths, schema, storage, units
from pipelines.annotations import ENTRIES, Listing
from pipelines.config import Config, UserError, fingerprint
from pipelines.schema import Counts, DataFile, Manifest, Settings, Split, TextSize
from pipelines.session import (
    Needs,
    Progress,
    connect,
    event,
    keep_actors,
    may_grow,
    resources,
)
from pipelines.sources import Row, Source, open_source

logger = logging.getLogger(__name__)

SETTING_KEYS = {
    "version": "version of the dataset's format",
    "encoder": "text.encoder",
    "encoder_weights": "weights of text.encoder",
    "text_width": "model.text_width",
    "encoder_precision": "text.precision",
    "encoder_batch_size": "text.batch_size",
    "max_tokens": "text.max_tokens",
    "resolution": "model.resolutions",
}
"""What a user knows a setting as; the others are ``data.<name>``."""

REASONS_SHOWN = 8
"""Kinds of rejects that the summary names."""

NO_PICTURES = Listing(entries=ENTRIES.empty_table(), sha256=None)

Finished = dict[tuple[str, int], tuple[DataFile, Counts]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be made."""

    dataset: str
    "Absolute path."
    sources: dict[str, Source | None]
    "Split -> what it is made from; None for a split without pictures."
    listings: dict[str, Listing]
    settings: Settings

    @property
    def fingerprint(self) -> str:
        """Of the settings."""
        return fingerprint(self.settings)

    @property
    def num_images(self) -> int:
        """Pictures of the sources."""
        return sum(listing.num_images for listing in self.listings.values())

    def num_units(self, split: str) -> int:
        """Files of a split; at least one, so that a reader finds the columns."""
        return max(1, math.ceil(self.listings[split].num_images / self.settings.rows_per_file))

    def units(self) -> Iterator[tuple[str, int]]:
        """Split and number of every file."""
        for split in schema.SPLITS:
            yield from ((split, index) for index in range(self.num_units(split)))

    def row(self, split: str, index: int) -> Row:
        """What `units.decode_unit` makes a file of."""
        step = self.settings.rows_per_file
        entries = self.listings[split].entries.slice(index * step, step)
        return {"split": split, "index": index, "entries": units.to_bytes(entries)}


def check(config: Config) -> list[str]:
    """Checks all input without starting Ray.

    Returns:
        Lines that say what would be done.

    Raises:
        UserError: an input is missing or broken, or the output cannot be written or holds something else.
    """
    plan = _plan(config)
    state = "is finished already" if _is_finished(plan) else "would be written"
    return [
        f"dataset {plan.dataset} {state}: {plan.num_images} pictures of "
        f"{plan.settings.resolution} px, text by {plan.settings.encoder}"
    ]


def run(config: Config) -> Manifest:
    """Prepares a dataset, or what is missing of it.

    Returns:
        What the finished dataset holds.

    Raises:
        UserError: as `check`, or too many pictures cannot be used.
    """
    plan = _plan(config)
    if _is_finished(plan):
        event(logger, "kept", dataset=plan.dataset, state="finished already")
        content = storage.read_bytes(storage.join(plan.dataset, schema.MANIFEST))
        return Manifest.from_json(content.decode())
    storage.require_writable(plan.dataset, "dataset")
    begun = dataclasses.asdict(plan.settings) | {schema.PLANNED: plan.num_images}
    content = (json.dumps(begun, indent=2) + "\n").encode()
    storage.write_atomically(storage.join(plan.dataset, schema.SETTINGS), content)
    finished = _find_finished(plan)
    missing = [unit for unit in plan.units() if unit not in finished]
    if missing:
        rows = [plan.row(*unit) for unit in missing]
        finished |= _make(config, plan, rows, finished)
    manifest = _manifest(plan, finished)
    _check_rejects(config, plan, manifest)
    for folder in ("", *schema.SPLITS, schema.REJECTS_FOLDER):
        storage.sweep(storage.join(plan.dataset, folder))
    storage.write_atomically(
        storage.join(plan.dataset, schema.MANIFEST), manifest.to_json().encode()
    )
    storage.remove(storage.join(plan.dataset, schema.SETTINGS))
    for name, split in manifest.splits.items():
        event(logger, "prepared", split=name, **dataclasses.asdict(split.counts))
    event(logger, "wrote", dataset=plan.dataset)
    return manifest


def _plan(config: Config) -> Plan:
    data, text = config.data, config.text
    sources = {split: open_source(data, split) for split in schema.SPLITS}
    listings = {
        split: NO_PICTURES if source is None else source.listing()
        for split, source in sources.items()
    }
    settings = Settings(
        version=schema.VERSION,
        train_annotations=listings["train"].sha256,
        train_images=data.train_images,
        val_annotations=listings["val"].sha256,
        val_images=data.val_images,
        crop=data.crop,
        max_pixels=data.max_pixels,
        resolution=config.model.resolutions[-1],
        image_format=data.image_format,
        image_quality=data.image_quality if data.image_format == "jpeg" else None,
        rows_per_file=data.rows_per_file,
        encoder=text.encoder,
        encoder_weights=_encoder_weights(config),
        encoder_precision=text.precision,
        encoder_batch_size=text.batch_size,
        text_width=config.model.text_width,
        max_tokens=text.max_tokens,
    )
    plan = Plan(
        dataset=storage.absolute(config.dataset),
        sources=sources,
        listings=listings,
        settings=settings,
    )
    _check_same_settings(plan)
    return plan


def _encoder_weights(config: Config) -> str:
    """What tells the encoder from others; checks that it is there and fits the model."""
    text, width = config.text, config.model.text_width
    if text.encoder == schema.NO_ENCODER:
        return schema.NO_ENCODER
    try:
        encoder = describe(text.encoder, revision=text.revision, max_tokens=text.max_tokens)
    except ValueError as error:
        raise UserError(f"text.encoder: {error}") from error
    if encoder.width != width:
        raise UserError(
            f"model.text_width={width} must be {encoder.width}, which is what "
            f"text.encoder={text.encoder!r} gives"
        )
    return encoder.weights


def _check_same_settings(plan: Plan) -> None:
    """Refuses a directory in which another dataset, or something else, has begun."""
    there = _settings_there(plan.dataset)
    if there is None:
        if not storage.is_empty(plan.dataset):
            raise UserError(
                f"dataset={plan.dataset!r}: holds other files; give another dataset=DIR"
            )
        return
    now = json.loads(json.dumps(dataclasses.asdict(plan.settings)))
    changes = [
        f"{SETTING_KEYS.get(name, 'data.' + name)} was {there.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if there.get(name) != value
    ]
    if changes:
        raise UserError(
            f"dataset={plan.dataset!r} was made with other settings: {'; '.join(changes)}; "
            "give another dataset=DIR, or delete this one"
        )


def _settings_there(dataset: str) -> dict[str, object] | None:
    """Settings of the dataset in a directory, finished or not; None if there is none."""
    for name in (schema.MANIFEST, schema.SETTINGS):
        path = storage.join(dataset, name)
        try:
            if storage.exists(path):
                tree = json.loads(storage.read_bytes(path))
                settings: dict[str, object] = tree["settings"] if name == schema.MANIFEST else tree
                return settings
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path!r} is broken ({error!r}); delete this dataset") from error
    return None


def _is_finished(plan: Plan) -> bool:
    return storage.exists(storage.join(plan.dataset, schema.MANIFEST))


def _find_finished(plan: Plan) -> Finished:
    """Files of an earlier run; they count only if the null prompt is there too, which the first file's writer makes."""
    found: Finished = {}
    if not storage.exists(storage.join(plan.dataset, schema.NULL_TEXT)):
        return found
    for split, index in plan.units():
        file = units.find_finished(plan.dataset, plan.fingerprint, split, index)
        if file is not None:
            found[split, index] = file
    if found:
        event(logger, "prepare", files_kept=len(found))
    return found


def _make(config: Config, plan: Plan, missing: list[Row], kept: Finished) -> Finished:
    """Makes the missing files on Ray."""
    has_text = plan.settings.encoder != schema.NO_ENCODER
    num_actors = min(config.text.num_actors, len(missing)) if has_text else 0
    data = config.data
    named = (data.train_images, data.val_images, data.train_annotations, data.val_annotations)
    # COCO's captions are read here only; Parquet files by the workers.
    read = [path for path in named if path is not None and not path.endswith(".json")]
    made: Finished = {}
    # Without GPUs, encoders make do with the CPUs that there are.
    wanted = needs(config) if config.text.use_gpu else Needs(stage="prepare")
    wanted = replace(wanted, paths=(config.dataset, *read))
    done = _images(kept)
    with connect(config, wanted), Progress("prepare", plan.num_images, "images", done) as progress:
        import ray.data

        # One block a unit: a block may hold several without harm, but one for all would leave cores idle.
        rows = ray.data.from_items(missing, override_num_blocks=len(missing))
        num_cpus, num_gpus = _shares(num_actors, config.text.use_gpu)
        decode = functools.partial(units.decode_unit, sources=plan.sources, settings=plan.settings)
        # No limit; but without one Ray may fuse this stage into the few actors of the next.
        tasks = ray.data.TaskPoolStrategy(size=len(missing))
        rows = rows.map(decode, compute=tasks, num_cpus=num_cpus)
        target: dict[str, Any] = {
            "dataset": plan.dataset,
            "fingerprint": plan.fingerprint,
            "settings": replace(plan.settings, encoder=paths.located(plan.settings.encoder)),
        }
        if num_actors:
            keep_actors()
            # All from the beginning; but one is enough to go on, where a node is lost and decoding needs its share of the rest.
            pool = ray.data.ActorPoolStrategy(
                min_size=1, max_size=num_actors, initial_size=num_actors
            )
            rows = rows.map(
                units.EncodeAndWrite,
                fn_constructor_kwargs={**target, "device": "cuda" if num_gpus else "cpu"},
                compute=pool,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
        else:
            write = functools.partial(units.write_unit, encode=units.no_text, **target)
            rows = rows.map(write, compute=tasks, num_cpus=num_cpus)
        for row in rows.iter_rows():
            file, counts = units.finished_from_json(row["file"])
            made[row["split"], row["index"]] = file, counts
            progress.update(counts.images + counts.rejects, rejects=_rejects(kept | made))
    return made


def needs(config: Config) -> Needs:
    """What a cluster must be able to give for all encoders at their full size."""
    text = config.text
    return Needs(
        stage="prepare",
        workers=0 if text.encoder == schema.NO_ENCODER else text.num_actors,
        gpus_per_worker=1.0 if text.use_gpu else 0.0,
    )


def _shares(num_actors: int, use_gpu: bool | None) -> tuple[float, float]:
    """CPUs of a task or an encoder, and GPUs of an encoder: as asked, or of those that there are.

    One CPU each, or less where the encoders would take them all and leave nothing to decode with, and no more nodes can come.
    """
    nodes = resources()
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    share = 1.0 if may_grow() else min(1.0, cpus / (num_actors + 1))
    found = min(1.0, gpus / num_actors) if num_actors else 0.0
    return share, found if use_gpu is None else float(use_gpu)


def _images(files: Finished) -> int:
    return sum(counts.images + counts.rejects for _, counts in files.values())


def _rejects(files: Finished) -> int:
    return sum(counts.rejects for _, counts in files.values())


def _manifest(plan: Plan, finished: Finished) -> Manifest:
    splits = {}
    for split in schema.SPLITS:
        files = [finished[split, index] for index in range(plan.num_units(split))]
        counts = sum((counts for _, counts in files), start=Counts())
        listing = plan.listings[split]
        if counts.images + counts.rejects != listing.num_images:
            raise RuntimeError(
                f"{split}: {counts} are not the {listing.num_images} pictures there are"
            )
        splits[split] = Split(
            counts=counts,
            text_size=_text_size(counts, plan.settings),
            files=tuple(file for file, _ in files),
        )
        if listing.num_strays:
            event(logger, "prepare", split=split, captions_of_no_picture=listing.num_strays)
    return Manifest(
        fingerprint=plan.fingerprint,
        settings=plan.settings,
        rows_per_group=schema.ROWS_PER_GROUP,
        splits=splits,
    )


def _text_size(counts: Counts, settings: Settings) -> TextSize:
    token_bytes = 2 * settings.text_width
    return TextSize(
        bytes_per_caption=round(counts.tokens * token_bytes / max(counts.captions, 1), 1),
        padded_bytes_per_caption=settings.max_tokens * token_bytes,
    )


def _check_rejects(config: Config, plan: Plan, manifest: Manifest) -> None:
    """Says why pictures were rejected, and fails if they are too many."""
    num_rejects = sum(split.counts.rejects for split in manifest.splits.values())
    if not num_rejects:
        return
    reasons: collections.Counter[str] = collections.Counter()
    for unit in plan.units():
        path = storage.join(plan.dataset, schema.rejects_file(*unit))
        if storage.exists(path):
            rejects = pq.read_table(io.BytesIO(storage.read_bytes(path)))
            reasons.update(_reason(row) for row in rejects.to_pylist())
    common = reasons.most_common(REASONS_SHOWN)
    summary = ", ".join(f"{reason} ({count})" for reason, count in common)
    if num_others := num_rejects - sum(count for _, count in common):
        summary += f", others ({num_others})"
    event(logger, "rejected", images=num_rejects, of=plan.num_images, reasons=summary)
    allowed = config.data.max_reject_fraction
    if num_rejects > allowed * plan.num_images:
        least = math.ceil(num_rejects / plan.num_images * 1000) / 1000
        raise UserError(
            f"data.max_reject_fraction={allowed:g}: {num_rejects} of {plan.num_images} pictures "
            f"cannot be used: {summary}; {plan.dataset}/rejects lists them. To go on without them, "
            f"run again with data.max_reject_fraction={least:g}"
        )


def _reason(reject: dict[str, str]) -> str:
    """Stage and error without numbers, so that rejects of the same kind are counted together."""
    return f"{reject['stage']}: {re.sub('0x[0-9a-f]+|[0-9]+', 'N', reject['error'])}"


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["prepare", *sys.argv[1:]]))
