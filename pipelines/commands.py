"""What `layered` understands: its stages and benchmarks, and the arguments of each. Imports nothing heavy: help must be quick.

Called by `cli`.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What the help says about a stage."""

    summary: str
    description: str
    example: str


STAGES = {
    "prepare": Stage(
        summary="pictures and captions -> dataset",
        description="Reads pictures and captions (COCO's files, Parquet rows, or a folder of pictures with .txt files), crops\n"
        "and resizes the pictures, encodes the captions, and writes a dataset of Parquet files. What cannot be used is\n"
        "listed with its reason. Interrupted, the same command goes on where it was.",
        example="layered prepare --preset photo128 data.train_images=s3://bucket/train2017",
    ),
    "inspect": Stage(
        summary="what a dataset holds; --check: whether all of it is sound",
        description="Prints what a prepared dataset holds and how it was made, and writes a contact sheet of pictures with\n"
        "captions. With --check everything is read, and the exit code is 1 where something is not as the manifest says.",
        example="layered inspect datasets/demo --check",
    ),
    "train": Stage(
        summary="dataset -> model",
        description="Trains a layered model on a prepared dataset. The same command again goes on from the last\n"
        "checkpoint.",
        example="layered train --preset demo train.num_images=4096",
    ),
    "evaluate": Stage(
        summary="model and dataset -> scores",
        description="Draws pictures for captions of the validation split and scores them at every resolution. With --generated\n"
        "and --reference it scores a folder of anyone's pictures instead, and needs neither run nor dataset.",
        example="layered evaluate --run runs/demo evaluate.num_images=256\n"
        "  layered evaluate --generated samples/ --reference coco/val2017/ --extractor inception",
    ),
    "export": Stage(
        summary="checkpoint -> model",
        description="Writes the averaged weights of a run's newest checkpoint, or of another, as a model's directory. Training\n"
        "does so by itself at its end.",
        example="layered export runs/coco512 --num-images 5000000 --output models/early",
    ),
    "report": Stage(
        summary="run -> one page with curves, pictures and scores",
        description="Writes one HTML page about a run, finished or not: curves of all that was logged, grids of samples,\n"
        "scores, configuration and environment. The page needs no other file and no network.",
        example="layered report runs/demo",
    ),
    "sample": Stage(
        summary="model and a prompt -> pictures",
        description="Draws pictures of a prompt at every resolution, as PNG files and one sheet. With --server a server of\n"
        "`layered serve` draws them, at one resolution, and neither run nor preset is needed; an API key is read from the\n"
        "environment's LAYERED_API_KEY.",
        example='layered sample "a red apple" --run runs/demo --seed 7\n'
        '  layered sample "a red apple" --server http://127.0.0.1:8000 --size 32',
    ),
    "serve": Stage(
        summary="model -> a page, and an HTTP interface as OpenAI's",
        description="Draws for others over HTTP on Ray Serve: a page for people, the OpenAI images API for programs, previews\n"
        "while a picture is being drawn. Ends when it is interrupted. A model that is exported anew is picked up.",
        example="layered serve --run runs/demo serve.port=8080",
    ),
    "demo": Stage(
        summary="prepare, train, evaluate and sample the embedded pictures",
        description="Runs prepare, train, evaluate and sample as jobs of a local Ray. Interrupted, it goes on where it was.",
        example="layered demo",
    ),
    "bench": Stage(
        summary="speed and memory of networks, and of the stages",
        description="Measures the networks of presets of shape (64T, 128S, 256S, S, B, L) beside the single-scale network\n"
        "and diffusers' U-Net of equal multiply-adds, in one run. Reads no configuration. `layered bench prepare`,\n"
        "`layered bench loader`, `layered bench train`, `layered bench serve` and `layered bench fid` measure those; each\n"
        "has its own --help.",
        example="layered bench 64T --threads 1 --output bench.json",
    ),
    "config": Stage(
        summary="print a resolved configuration",
        description="Prints what a stage would be run with.",
        example="layered config --preset coco512 train.num_workers=16",
    ),
}

BENCHES = {
    "prepare": Stage(
        summary="",
        description="Measures prepare on made-up pictures of COCO's sizes beside its work alone in a pool of processes, and the\n"
        "memory it takes. Settings are those of the preset coco512.",
        example="layered bench prepare --num-images 5000 20000 model.resolutions=[64,128,256]",
    ),
    "train": Stage(
        summary="",
        description="Measures training under Ray Train beside a bare PyTorch loop on the same batches, with as many threads.",
        example="layered bench train --workers 1 2 --threads 2",
    ),
    "fid": Stage(
        summary="",
        description="Measures the Frechet distance beside scipy.linalg.sqrtm, in time and in error, and the Inception network\n"
        "beside torch-fidelity's, where an interpreter that has it is named.",
        example="layered bench fid --oracle-python .venv-oracles/bin/python",
    ),
    "serve": Stage(
        summary="",
        description="Measures serving over HTTP on a local Ray: images/s beside the bare pipeline, waiting times beside the\n"
        "same server with Ray Serve's @serve.batch, first previews, and with --soak an overload. Random weights.",
        example="layered bench serve --threads 1 --rounds 5 --soak 600",
    ),
    "loader": Stage(
        summary="",
        description="Measures the training loader beside decoding alone and beside other loaders that are installed.",
        example="layered bench loader --dataset datasets/coco --batch-size 64",
    ),
}
"""What `bench` measures beside networks."""


CONFIGURED = ("preset", "config", "dataset", "run", "print_config", "dry_run")
"""Options of stages that have a configuration."""

FOLDER_OPTIONS = (
    "generated",
    "reference",
    "extractor",
    "weights",
    "sha256",
    "output",
    "features",
    "save_statistics",
    "device",
    "batch_size",
    "threads",
)
"""Of `evaluate`, for a folder of pictures; a run has its configuration."""

_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def top_parser() -> argparse.ArgumentParser:
    """What reads the first word."""
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:{width}}  {stage.summary}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="layered",
        usage="layered STAGE [options] [key=value ...]",
        description=f"Layered diffusion: text to pictures of several resolutions at once.\n\nstages:\n{stages}",
        epilog="`layered STAGE --help` says more about one. Start with `layered demo`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="what to do")
    return parser


def stage_parser(name: str) -> argparse.ArgumentParser:
    """What reads the rest, of a stage or of ``bench`` and what it measures."""
    stage = STAGES.get(name) or BENCHES[name.removeprefix("bench ")]
    parser = argparse.ArgumentParser(
        prog=f"layered {name}",
        description=stage.description,
        epilog=f"example:\n  {stage.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name in ARGUMENTS:
        ARGUMENTS[name](parser)
        return parser
    if name == "sample":
        _add_sample_arguments(parser)
    if name == "evaluate":
        _add_folder_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument("--preset", help="preset of the configuration file")
    parser.add_argument(
        "--config", metavar="FILE", help="instead of the ray_config.yaml that comes along"
    )
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset; the same as dataset=DIR"
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="directory of the run; without --preset, its configuration is used again",
    )
    if name != "config":
        parser.add_argument("--print-config", action="store_true", help="print it and do nothing")
        parser.add_argument(
            "--dry-run", action="store_true", help="check everything, say what would be done"
        )
    return parser


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--seed", type=int, help="pictures of one seed are the same every time")
    parser.add_argument("--num-steps", type=int, metavar="N", help="as sample.num_steps=N")
    parser.add_argument("--guidance", type=float, metavar="W", help="as sample.guidance=W")
    parser.add_argument("--num-images", type=int, default=4, metavar="N", help="how many (4)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where to write (the run's samples/; with --server samples/)",
    )
    parser.add_argument("--server", metavar="URL", help="let this server draw")
    parser.add_argument(
        "--size", help="pixels of a side, with --server (its highest resolution)", **_NUMBER
    )


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `folders.Settings`, which has their defaults: what is not given is not there."""
    group = parser.add_argument_group(
        "a folder of pictures",
        "png, jpeg and webp, also in subfolders",
        argument_default=argparse.SUPPRESS,
    )
    group.add_argument("--generated", metavar="DIR", help="pictures to score")
    group.add_argument(
        "--reference", metavar="DIR|FILE.npz", help="real pictures, or statistics of them"
    )
    group.add_argument("--extractor", metavar="NAME", help="inception for FID (efficientnet_lite0)")
    group.add_argument(
        "--weights", metavar="FILE", help="of the extractor, also s3:// (the published ones)"
    )
    group.add_argument("--sha256", metavar="HEX", help="of weights that are not the published ones")
    group.add_argument("--output", metavar="FILE", help="(metrics.json)")
    group.add_argument(
        "--features", metavar="DIR", help="keep features here, and use those that are there"
    )
    group.add_argument(
        "--save-statistics", metavar="FILE.npz", help="write the reference's for another time"
    )
    group.add_argument("--device", metavar="cpu|cuda", help="the GPU where there is one")
    group.add_argument("--batch-size", help="pictures (32)", **_NUMBER)
    group.add_argument("--threads", help="(one a core)", **_NUMBER)


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="a prepared dataset")
    parser.add_argument("--check", action="store_true", help="read everything")
    parser.add_argument(
        "--sheet", metavar="FILE", help="the contact sheet (NAME.png here, NAME the dataset's)"
    )
    parser.add_argument("--no-sheet", action="store_true", help="write none")
    parser.add_argument(
        "--num-images", type=int, default=24, metavar="N", help="on the contact sheet (24)"
    )


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    parser.add_argument("--output", metavar="DIR", help="where to write (RUN/model)")
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="pictures seen by the checkpoint (the newest)"
    )


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a run; local or s3://")
    parser.add_argument("--output", metavar="FILE", help="where to write (RUN/report.html)")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help="shapes (64T 128S; S B on a GPU)"
    )
    parser.add_argument("--device", metavar="cpu|cuda", help="the GPU where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU's arithmetic")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures (4; 16 on a GPU)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (9)")


def _add_bench_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument(
        "--num-images", nargs="+", default=[2000], help="of each run without text (2000)", **_NUMBER
    )
    parser.add_argument(
        "--text-images",
        dest="num_text_images",
        default=384,
        help="of a run with text encoding (384); 0 for none",
        **_NUMBER,
    )
    parser.add_argument(
        "--encoder", help="of that run, as text.encoder (random weights of flan-t5-base's size)"
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="captions file in COCO's form, whose sizes and captions are taken (drawn from COCO's)",
    )


def _add_bench_loader_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset (one is made up and prepared)"
    )
    parser.add_argument("--num-images", default=2048, help="to make up (2048)", **_NUMBER)
    parser.add_argument("--batch-size", default=32, help="pictures (32)", **_NUMBER)
    parser.add_argument("--threads", default=_cores(), help="that decode (one a core)", **_NUMBER)
    parser.add_argument("--repeats", default=5, help="rounds (5)", **_NUMBER)


def _add_bench_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument("--preset", default="demo", help="preset of the configuration (demo)")
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset (the preset's, prepared)"
    )
    parser.add_argument(
        "--workers", dest="num_workers", nargs="+", default=[1], help="of each run (1)", **_NUMBER
    )
    parser.add_argument(
        "--threads", default=_cores(), help="of all workers together (one a core)", **_NUMBER
    )
    parser.add_argument("--turns", default=10, help="of 8 seconds, of both (10)", **_NUMBER)


def _add_bench_serve_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    seconds: dict[str, Any] = {"type": float, "metavar": "S"}
    parser.add_argument("--seconds", default=30.0, help="of each load of a round (30)", **seconds)
    parser.add_argument("--rounds", default=3, help="(3)", **_NUMBER)
    parser.add_argument("--clients", default=24, help="that ask at once (24)", **_NUMBER)
    parser.add_argument(
        "--load",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="of what can be served, for waiting times (0.7); 0 for none",
    )
    parser.add_argument("--soak", default=0.0, help="of overload (0: none)", **seconds)
    parser.add_argument(
        "--threads", default=_cores(), help="of each that draws (one a core)", **_NUMBER
    )


def _add_bench_fid_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    parser.add_argument(
        "--dimension", default=2048, help="features (2048); 0 for no distances", **_NUMBER
    )
    parser.add_argument(
        "--num-images", default=64, help="of a round of extractors (64); 0 for none", **_NUMBER
    )
    parser.add_argument("--batch-size", default=64, help="pictures (64)", **_NUMBER)
    parser.add_argument(
        "--threads", default=_cores(), help="of the extractors (one a core)", **_NUMBER
    )
    parser.add_argument("--repeats", default=3, help="rounds (3)", **_NUMBER)
    parser.add_argument(
        "--oracle-python", metavar="FILE", help="interpreter that has torch-fidelity"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="write every figure as JSON")


ARGUMENTS = {
    "inspect": _add_inspect_arguments,
    "export": _add_export_arguments,
    "report": _add_report_arguments,
    "bench": _add_bench_arguments,
    "bench prepare": _add_bench_prepare_arguments,
    "bench loader": _add_bench_loader_arguments,
    "bench train": _add_bench_train_arguments,
    "bench serve": _add_bench_serve_arguments,
    "bench fid": _add_bench_fid_arguments,
}
"""Of what reads no configuration."""
