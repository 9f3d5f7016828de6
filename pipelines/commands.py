"""What `layered` understands: the arguments of each stage and benchmark. Imports nothing heavy: help must be quick.

Called by `cli`.
"""

import argparse
import os
from importlib import metadata
from typing import Any

from pipelines.descriptions import BENCHES, STAGES

DISTRIBUTION = "layered-diffusion-ray"
"""The package, as pip knows it."""

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

SUBMITTABLE = ("prepare", "train", "evaluate", "sample", "export", "demo", "ablate")
"""Stages that `submit` makes jobs of."""

CHAINABLE = ("prepare", "train", "evaluate")
"""Those that take the same arguments."""

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
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="what to do")
    return parser


def _version() -> str:
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION}, a checkout that nobody installed"


def parse(name: str, arguments: list[str]) -> argparse.Namespace:
    """Reads the words after the first; ends the process where they are wrong, or ask for help."""
    parser = stage_parser(name)
    if name != "submit":
        return parser.parse_intermixed_args(arguments)
    options, rest = parser.parse_known_args(arguments)
    return argparse.Namespace(**vars(options), rest=rest)


def stage_parser(name: str) -> argparse.ArgumentParser:
    """What reads the rest, of a stage or of ``bench`` and what it measures."""
    stage = STAGES.get(name) or BENCHES[name.removeprefix("bench ")]
    parser = argparse.ArgumentParser(
        prog=f"layered {name}",
        description=stage.description,
        epilog=f"example:\n  {stage.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Of the stage's own arguments, which `submit` hands on, none is a short form of one of its own.
        allow_abbrev=name != "submit",
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
            "--dry-run",
            action="store_true",
            help="check what can be checked without Ray, say what would be done",
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
    parser.add_argument(
        "--ema-width",
        type=float,
        metavar="W",
        help="average of another relative width, of what train.ema_snapshot_widths kept (RUN/model_W)",
    )
    parser.add_argument(
        "--with-text-encoder",
        action="store_true",
        help="put the text encoder beside the network, so that nothing else is needed for drawing",
    )


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a run; local or s3://")
    parser.add_argument("--output", metavar="FILE", help="where to write (RUN/report.html)")


def _add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "layered submit STAGE[,STAGE...] [the stage's own arguments] [options]"
    parser.add_argument(
        "stage",
        nargs="?",
        metavar="STAGE",
        help=f"{', '.join(SUBMITTABLE)}; or a chain of {', '.join(CHAINABLE)}, with commas",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, http://head:8265 (RAY_API_SERVER_ADDRESS)",
    )
    parser.add_argument("--wait", action="store_true", help="show the log; exit as the job does")
    parser.add_argument("--id", metavar="NAME", help="of the new job (Ray makes one up)")
    parser.add_argument(
        "--env",
        metavar="KEY[=VALUE]",
        action="append",
        default=[],
        help="environment variable for the job, with the value it has here; no secrets",
    )
    parser.add_argument(
        "--pip", action="store_true", help="install the packages of constraints.txt for the job"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the line, send nothing"
    )
    parser.add_argument("--follow", metavar="ID", help="show the log of an earlier job, as --wait")
    parser.add_argument("--stop", metavar="ID", help="stop a job, and wait until it has")


def _add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment", nargs="?", metavar="EXPERIMENT", help="a name of --list, or a .yaml file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting of all cells")
    parser.add_argument("--list", action="store_true", help="say which experiments there are")
    parser.add_argument(
        "--scale", choices=["small", "full"], help="(the one of the preset, or else small)"
    )
    parser.add_argument("--preset", help="in place of the scale's")
    parser.add_argument(
        "--config", metavar="FILE", help="instead of the ray_config.yaml that comes along"
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="in place of the scale's")
    parser.add_argument(
        "--parallel", help="stages side by side (as many as there is room for)", **_NUMBER
    )
    parser.add_argument(
        "--store", metavar="DIR", default="runs/ablate", help="of all cells (runs/ablate)"
    )
    parser.add_argument("--dataset", metavar="DIR", help="prepared (one is prepared)")
    parser.add_argument(
        "--data", metavar="DIR", help="a folder of pictures, for experiments that compare data"
    )
    parser.add_argument(
        "--output", metavar="DIR", default="docs/results", help="of the report (docs/results)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run and what it costs"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing: report of what is there"
    )


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="a run, or a dataset; local or s3://")
    parser.add_argument("--json", action="store_true", help="for programs")


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
    "status": _add_status_arguments,
    "submit": _add_submit_arguments,
    "ablate": _add_ablate_arguments,
    "bench": _add_bench_arguments,
    "bench prepare": _add_bench_prepare_arguments,
    "bench loader": _add_bench_loader_arguments,
    "bench train": _add_bench_train_arguments,
    "bench serve": _add_bench_serve_arguments,
    "bench fid": _add_bench_fid_arguments,
}
"""Of what reads no configuration."""
