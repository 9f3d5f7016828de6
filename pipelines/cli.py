"""The command line: ``layered STAGE ...`` and ``python -m pipelines.STAGE ...`` are the same thing.

A stage is a module with two functions: ``check(config)`` raises `UserError` where an input is missing and returns lines that
say what the stage would do; ``run(config)`` does it. It is imported only when its turn comes, so that help is quick and a
mistake in the configuration is told before Ray starts.

Exit codes: 0 done, 1 failed, 2 a mistake of the user's (one line, no traceback), 130 interrupted, 143 terminated.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pipelines.config import Config


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
        description="Draws pictures for captions of the validation split and scores them at every resolution.",
        example="layered evaluate --run runs/demo evaluate.num_images=256",
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
        description="Draws pictures of a prompt at every resolution, as PNG files and one sheet.",
        example='layered sample "a red apple" --run runs/demo --seed 7',
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
        "`layered bench loader` and `layered bench train` measure those; each has its own --help.",
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
    "loader": Stage(
        summary="",
        description="Measures the training loader beside decoding alone and beside other loaders that are installed.",
        example="layered bench loader --dataset datasets/coco --batch-size 64",
    ),
}
"""What `bench` measures beside networks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: stage and its arguments; those of the process where absent.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _top_parser().parse_args(arguments[:1]).stage
    if name == "bench" and arguments[1:2] and arguments[1] in BENCHES:
        name = f"bench {arguments.pop(1)}"
    options = _stage_parser(name).parse_intermixed_args(arguments[1:])
    signal.signal(signal.SIGTERM, _terminate)

    from pipelines.errors import StageFailed, UserError

    try:
        return _run(name, options)
    except (UserError, StageFailed) as error:
        # Ray wraps what a task raised into an error of the same type, whose text is a traceback.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


def _run(name: str, options: argparse.Namespace) -> int:
    if name.startswith("bench"):
        return _bench(name, options)
    if name == "inspect":
        return _inspect(options)
    if name == "report":
        return _report(options)
    if name == "export":
        return _export(options)
    from pipelines.config import to_yaml

    config = _load(name, options)
    if name == "config" or options.print_config:
        print(to_yaml(config), end="")
        return 0

    from pipelines.session import set_environment, setup_logging

    setup_logging()
    set_environment()
    stage = importlib.import_module(f"pipelines.{name}")
    if options.dry_run:
        print(*stage.check(config), sep="\n")
    elif name == "sample":
        stage.run(config, options.prompt, num_images=options.num_images, output=options.output)
    else:
        stage.run(config)
    return 0


def _bench(name: str, options: argparse.Namespace) -> int:
    from pipelines.session import set_environment, setup_logging

    setup_logging()
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in vars(options).items()}
    output = values.pop("output")
    bench = importlib.import_module(f"pipelines.{name.replace(' ', '_')}")
    if name == "bench":
        settings = bench.settle(values.pop("presets"), **values)
    else:
        set_environment()
        settings = bench.Settings(**values)
    bench.run(settings, output)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    inspection = importlib.import_module("pipelines.inspection")
    sheet = options.sheet or inspection.default_sheet(options.dataset)
    code: int = inspection.run(
        inspection.Settings(
            dataset=options.dataset,
            sheet=None if options.no_sheet else sheet,
            num_images=options.num_images,
            check=options.check,
        )
    )
    return code


def _export(options: argparse.Namespace) -> int:
    from pipelines.session import setup_logging

    setup_logging()
    importlib.import_module("pipelines.export").run(options.run, options.output, options.num_images)
    return 0


def _report(options: argparse.Namespace) -> int:
    report = importlib.import_module("pipelines.report")
    print(f"report: {report.run(options.run, options.output)}")
    return 0


def _load(name: str, options: argparse.Namespace) -> "Config":
    """The configuration of a preset, or without one that of an earlier run."""
    from pipelines.config import UserError, from_yaml, load_config, preset_names

    overrides = [
        # A quoted string: a path such as 007 must not be read as a number.
        f"{key}={json.dumps(str(value), ensure_ascii=False)}"
        for key in ("dataset", "run", "seed", "sample.num_steps", "sample.guidance")
        if (value := getattr(options, key.rpartition(".")[2], None)) is not None
    ]
    overrides += options.overrides
    preset = options.preset or ("demo" if name == "demo" else None)
    if preset is not None:
        return load_config(preset, overrides, options.config)
    if options.run is not None:
        return from_yaml(_run_config(options.run), f"{options.run}/config.yaml", overrides)
    names = ", ".join(preset_names(options.config))
    raise UserError(f"give --preset NAME (one of {names}), or --run DIR of an earlier run")


def _run_config(run: str) -> str:
    import fsspec

    from pipelines.config import UserError

    path = f"{run.rstrip('/')}/config.yaml"
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise UserError(f"run={run!r}: no {path}; train first, or give --preset NAME") from error


def _top_parser() -> argparse.ArgumentParser:
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


def _stage_parser(name: str) -> argparse.ArgumentParser:
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
    parser.add_argument("--output", metavar="DIR", help="where to write (the run's samples/)")


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
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument(
        "--num-images", nargs="+", default=[2000], help="of each run without text (2000)", **number
    )
    parser.add_argument(
        "--text-images",
        dest="num_text_images",
        default=384,
        help="of a run with text encoding (384); 0 for none",
        **number,
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
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset (one is made up and prepared)"
    )
    parser.add_argument("--num-images", default=2048, help="to make up (2048)", **number)
    parser.add_argument("--batch-size", default=32, help="pictures (32)", **number)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", default=cores, help="that decode (one a core)", **number)
    parser.add_argument("--repeats", default=5, help="rounds (5)", **number)


def _add_bench_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_output(parser)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting to override")
    parser.add_argument("--preset", default="demo", help="preset of the configuration (demo)")
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset (the preset's, prepared)"
    )
    parser.add_argument(
        "--workers", dest="num_workers", nargs="+", default=[1], help="of each run (1)", **number
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", default=cores, help="of all workers together (one a core)", **number
    )
    parser.add_argument("--turns", default=10, help="of 8 seconds, of both (10)", **number)


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
}
"""Of what reads no configuration."""


def _terminate(signum: int, frame: object) -> NoReturn:
    """``ray job stop`` sends SIGTERM and kills after three seconds; leaving by an exception closes what is open."""
    raise SystemExit(128 + signum)
