"""The command line: ``layered STAGE ...`` and ``python -m pipelines.STAGE ...`` are the same thing.

A stage is a module with two functions: ``check(config)`` raises `UserError` where an input is missing and returns lines that
say what the stage would do; ``run(config)`` does it. It is imported only when its turn comes, so that help is quick and a
mistake in the configuration is told before Ray starts.

In a job of Ray, which runs in a copy of its source that is deleted later, relative paths are of the home directory instead, as
those of another machine's files are for scp.

Exit codes: 0 done, 1 failed, 2 a mistake of the user's (one line, no traceback), 130 interrupted, 143 terminated.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.commands import CONFIGURED, FOLDER_OPTIONS, parse, top_parser
from pipelines.descriptions import BENCHES

if TYPE_CHECKING:
    from pipelines.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: stage and its arguments; those of the process where absent.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = top_parser().parse_args(arguments[:1]).stage
    if name == "bench" and arguments[1:2] and arguments[1] in BENCHES:
        name = f"bench {arguments.pop(1)}"
    options = parse(name, arguments[1:])
    signal.signal(signal.SIGTERM, _terminate)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        _leave_the_copy(options)

    from pipelines.errors import StageFailed, UserError

    try:
        return _run(name, options)
    except (UserError, StageFailed) as error:
        # Ray wraps what a task raised into an error of the same type, whose text is a traceback.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except PermissionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        from pipelines.storage import refusal

        if (cause := refusal(error)) is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1


def _leave_the_copy(options: argparse.Namespace) -> None:
    """Goes where files stay; a configuration file, which may have come with the source, is found before."""
    if getattr(options, "config", None):
        options.config = os.path.abspath(options.config)
    os.chdir(Path.home())


def _run(name: str, options: argparse.Namespace) -> int:
    if name.startswith("bench"):
        return _bench(name, options)
    if name == "inspect":
        return _inspect(options)
    if name == "report":
        return _report(options)
    if name == "export":
        return _export(options)
    if name == "status":
        return _status(options)
    if name == "submit":
        return _submit(options)
    if name == "ablate":
        return _ablate(options)
    of_folders = {key: value for key, value in vars(options).items() if key in FOLDER_OPTIONS}
    if name == "evaluate" and of_folders:
        return _folders(options, of_folders)
    if name == "sample" and (options.server is not None or options.size is not None):
        return _remote(options)
    from pipelines.config import to_yaml

    config = load(name, options)
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
    importlib.import_module("pipelines.export").run(
        options.run,
        options.output,
        options.num_images,
        ema_width=options.ema_width,
        with_text_encoder=options.with_text_encoder,
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    report = importlib.import_module("pipelines.report")
    print(f"report: {report.run(options.run, options.output)}")
    return 0


def _status(options: argparse.Namespace) -> int:
    status = importlib.import_module("pipelines.status")
    print(status.run(options.path, as_json=options.json))
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from pipelines.session import set_environment, setup_logging

    setup_logging()
    set_environment()
    ablate = importlib.import_module("pipelines.ablate")
    code: int = ablate.run(ablate.settle(vars(options)))
    return code


def _submit(options: argparse.Namespace) -> int:
    from pipelines.session import setup_logging

    setup_logging()
    submit = importlib.import_module("pipelines.submit")
    code: int = submit.run(submit.settle(vars(options)))
    return code


def _folders(options: argparse.Namespace, given: dict[str, Any]) -> int:
    from pipelines.errors import UserError
    from pipelines.session import setup_logging

    if not {"generated", "reference"} <= set(given):
        raise UserError(
            f"--{_dashed(next(iter(given)))} is of a folder of pictures, which --generated and --reference name "
            "together; of a run say evaluate.KEY=VALUE"
        )
    others = _configured(options)
    if others:
        raise UserError(
            f"--generated scores a folder of pictures, without a configuration: leave out {', '.join(others)}"
        )
    setup_logging()
    folders = importlib.import_module("pipelines.folders")
    folders.run(folders.Settings(**given))
    return 0


def _remote(options: argparse.Namespace) -> int:
    from pipelines.errors import UserError
    from pipelines.session import setup_logging

    if options.server is None:
        raise UserError(
            "--size is of pictures that a server draws, which --server URL names; a run's are drawn at every resolution"
        )
    others = [option for option in _configured(options) if option != "--dry-run"]
    if others:
        raise UserError(
            f"--server draws with the server's model, without a configuration: leave out {', '.join(others)} "
            "(--num-steps, --guidance and --size say what to draw)"
        )
    setup_logging()
    sample = importlib.import_module("pipelines.sample")
    remote = sample.Remote(**{f.name: getattr(options, f.name) for f in fields(sample.Remote)})
    if options.dry_run:
        print(*sample.check_remote(remote), sep="\n")
    else:
        sample.run_remote(remote)
    return 0


def _configured(options: argparse.Namespace) -> list[str]:
    """What was given that only a configuration understands."""
    given = [f"--{_dashed(key)}" for key in CONFIGURED if getattr(options, key)]
    return [*options.overrides, *given]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def load(name: str, options: argparse.Namespace) -> "Config":
    """The configuration of a preset, or without one that of an earlier run.

    Args:
        name: of the stage.
        options: what its parser made of its arguments.

    Raises:
        UserError: whatever is wrong with it.
    """
    from pipelines.config import UserError, load_config, load_run_config, preset_names

    overrides = [
        # A quoted string: a path such as 007 must not be read as a number.
        f"{key}={json.dumps(str(value), ensure_ascii=False)}"
        for key in ("dataset", "run", "seed", "sample.num_steps", "sample.guidance")
        if (value := getattr(options, key.rpartition(".")[2], None)) is not None
    ]
    overrides += options.overrides
    if name == "sample" and (loose := [word for word in options.overrides if "=" not in word]):
        raise UserError(
            f"{loose[0]!r}: put the whole prompt in quotes; settings look like section.key=value"
        )
    preset = options.preset or ("demo" if name == "demo" else None)
    if preset is not None:
        return load_config(preset, overrides, options.config)
    if options.run is not None:
        if options.config is not None:
            raise UserError(
                f"--config {options.config} is read with --preset NAME; without that, run={options.run!r} has a configuration"
            )
        return load_run_config(options.run, overrides)
    names = ", ".join(preset_names(options.config))
    raise UserError(f"give --preset NAME (one of {names}), or --run DIR of an earlier run")


def _terminate(signum: int, frame: object) -> NoReturn:
    """``ray job stop`` sends SIGTERM and kills after three seconds; leaving by an exception closes what is open."""
    raise SystemExit(128 + signum)
