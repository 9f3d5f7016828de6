"""``layered submit``: one stage, or several one after the other, as a job of a cluster.

Everything that can be wrong is found before anything is sent: the arguments by the stage's own parser, the configuration by
`load_config`. What is sent is what the printed ``ray job submit`` line says, in
which values of environment variables do not appear. A chain is one job, so it is followed, stopped and told of as one:

    bash -c 'python -m pipelines.prepare ... && python -m pipelines.train ...'

The source travels as the job's working directory, without what .gitignore and .rayignore name. Where the package is installed
without its source, nothing travels and the cluster must have it. Run by `cli`.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines import cli, jobs, paths
from pipelines.commands import (
    CHAINABLE,
    DISTRIBUTION,
    FOLDER_OPTIONS,
    SUBMITTABLE,
    stage_parser,
)
from pipelines.errors import UserError
from pipelines.session import event, joining_auth_mode

logger = logging.getLogger(__name__)

CONSTRAINTS = "constraints.txt"
INTERRUPTED = 130

Paths = dict[str, str | None]
"""By the key or option that names them."""

_SECRET = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|(^|_)(API|ACCESS|PRIVATE)?(KEY|TOKENS?|CREDENTIALS?|PASS|PAT)$"
)
"""Names of variables whose values nobody should see, which everybody does who opens the dashboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is asked for."""

    stage: str | None
    "Name of a stage, or of several with commas between them."
    rest: list[str]
    "The stage's own arguments."
    address: str | None
    wait: bool
    stop: str | None
    "Id of a job."
    follow: str | None
    "Id of a job."
    id: str | None
    "For the new job; Ray makes one up for None."
    pip: bool
    env: list[str]
    "``KEY`` or ``KEY=VALUE``."
    dry_run: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is sent."""

    entrypoint: list[str]
    working_dir: str | None
    pip: list[str]
    env: dict[str, str]
    metadata: dict[str, str]
    id: str | None

    @property
    def runtime_env(self) -> dict[str, Any]:
        """For Ray."""
        parts = {"working_dir": self.working_dir, "pip": self.pip, "env_vars": self.env}
        return {key: value for key, value in parts.items() if value}

    def line(self, settings: Mapping[str, str], *, wait: bool) -> str:
        """The same as a line for a shell, which has the variables' values.

        Args:
            settings: environment of the line alone.
            wait: whether it waits for the job's end.
        """
        words = [*(f"{key}={shlex.quote(value)}" for key, value in settings.items())]
        words += ["ray", "job", "submit"]
        if self.working_dir is not None:
            words += ["--working-dir", shlex.quote(self.working_dir)]
        rest = {key: value for key, value in self.runtime_env.items() if key != "working_dir"}
        if rest:
            hidden = {key: f"<{key}>" for key in self.env}
            text = shlex.quote(json.dumps(rest | ({"env_vars": hidden} if hidden else {})))
            for key in self.env:
                text = text.replace(f'"<{key}>"', f'"\'"${{{key}:?}}"\'"')
            words += ["--runtime-env-json", text]
        words += ["--metadata-json", shlex.quote(json.dumps(self.metadata))]
        if self.id is not None:
            words += ["--submission-id", shlex.quote(self.id)]
        words += [] if wait else ["--no-wait"]
        return " ".join([*words, "--", shlex.join(self.entrypoint)])


def run(options: Options) -> int:
    """Submits, follows or stops a job.

    Returns:
        The exit code: with ``--wait`` and ``--follow`` the job's own.

    Raises:
        UserError: something is wrong with the arguments, or the cluster cannot be reached.
    """
    if options.stop is not None or options.follow is not None:
        return _existing(options)
    if options.stage is None:
        raise UserError(f"give a stage: {', '.join(SUBMITTABLE)}, or a chain such as prepare,train")
    job = describe(options)
    address, source = jobs.find_address(options.address)
    if source == "--address" and jobs.has_password(address):
        raise UserError(
            "--address with a password is seen by whoever lists processes; set RAY_API_SERVER_ADDRESS"
        )
    settings = {} if source != "--address" else {"RAY_API_SERVER_ADDRESS": address}
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = joining_auth_mode()
        if os.environ["RAY_AUTH_MODE"] == "token":
            settings["RAY_AUTH_MODE"] = "token"
    sys.stdout.write(job.line(settings, wait=options.wait) + "\n")
    sys.stdout.flush()
    for key in job.env:
        if os.environ.get(key) != job.env[key]:
            event(logger, "note", line=f"needs {key} in the shell's environment")
    if job.working_dir is None:
        event(logger, "note", source="is installed, not sent: the cluster's nodes must have it too")
    if options.dry_run:
        return 0
    client = jobs.connect(address)
    number = jobs.submit(
        client,
        shlex.join(job.entrypoint),
        metadata=job.metadata,
        runtime_env=job.runtime_env,
        submission_id=job.id,
    )
    event(logger, "submitted", job=number, **job.metadata)
    if options.wait:
        return _follow(client, number, options)
    event(logger, "next", follow=_command("follow", number, options))
    event(logger, "next", stop=_command("stop", number, options))
    return 0


def _existing(options: Options) -> int:
    """Follows or stops a job that was submitted earlier."""
    given = [f"--{name}" for name in ("stop", "follow") if getattr(options, name) is not None]
    if options.stage is not None or options.rest or len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} is of one job that was submitted earlier: give nothing but --address with it"
        )
    os.environ.setdefault("RAY_AUTH_MODE", joining_auth_mode())
    address, _ = jobs.find_address(options.address)
    client = jobs.connect(address)
    if options.follow is not None:
        return _follow(client, options.follow, options)
    details = jobs.stop(client, options.stop or "")
    event(logger, "job", id=options.stop, status=details.status)
    return 0


def _follow(client: Any, job: str, options: Options) -> int:
    """Shows the log until the job has ended; an interruption leaves the job alone."""
    try:
        for text in jobs.follow(client, job):
            sys.stdout.write(text)
            sys.stdout.flush()
        details = jobs.info(client, job)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\nnot followed any more, and the job goes on\n  {_command('follow', job, options)}\n"
            f"  {_command('stop', job, options)}\n"
        )
        return INTERRUPTED
    code = jobs.exit_code(details)
    told = {"message": details.message} if details.driver_exit_code is None else {}
    event(logger, "job", id=job, status=details.status, exit_code=code, **told)
    return code


def _command(what: str, job: str, options: Options) -> str:
    address = [] if options.address is None else ["--address", options.address]
    return shlex.join(["layered", "submit", f"--{what}", job, *address])


def describe(options: Options) -> Job:
    """What would be sent, after every check that can be made here.

    Raises:
        UserError: a mistake in the arguments.
    """
    names = str(options.stage).split(",")
    if unknown := [name for name in names if name not in SUBMITTABLE]:
        raise UserError(
            f"{unknown[0]!r} is no stage that runs as a job; those are {', '.join(SUBMITTABLE)}"
        )
    if len(names) > 1 and not set(names) <= set(CHAINABLE):
        raise UserError(
            f"{options.stage}: a chain is made of {', '.join(CHAINABLE)}, which take the same arguments"
        )
    source = source_directory()
    arguments = _with_config_inside(options.rest, source)
    facts: dict[str, str] = {}
    relative: dict[str, str] = {}
    for name in names:
        about, named = _checked(name, options.rest)
        facts |= about
        relative |= {key: path for key, path in named.items() if path and _is_relative(path)}
    if relative:
        event(
            logger, "note", relative_to="the home directory of Ray's user on the head", **relative
        )
    commands = [["python", "-m", f"pipelines.{name}", *arguments] for name in names]
    chained = ["bash", "-c", " && ".join(map(shlex.join, commands))]
    return Job(
        entrypoint=commands[0] if len(commands) == 1 else chained,
        working_dir=source,
        pip=_packages(source) if options.pip else [],
        env=_variables(options.env),
        metadata={"stage": str(options.stage), **facts, **_version(source)},
        id=options.id,
    )


def source_directory() -> str | None:
    """The checkout that this runs from; None where the package is installed without it."""
    root = Path(__file__).resolve().parents[1]
    return str(root) if (root / "ray_config.yaml").is_file() else None


def _checked(name: str, arguments: Sequence[str]) -> tuple[dict[str, str], Paths]:
    """Refuses what the stage itself would refuse; says what it is about, and what it reads and writes."""
    options = stage_parser(name).parse_intermixed_args(list(arguments))
    if getattr(options, "print_config", False) or getattr(options, "dry_run", False):
        raise UserError("--print-config and --dry-run of a stage need no job: `layered config`")
    if name == "export":
        return {"run": options.run}, {"RUN": options.run, "--output": options.output}
    folders = {key: value for key, value in vars(options).items() if key in FOLDER_OPTIONS}
    if name == "evaluate" and folders:
        return _checked_folders(folders)
    if name == "sample" and options.server is not None:
        raise UserError("--server draws without a cluster: `layered sample` alone does that")
    if options.preset is None and options.run is not None and _is_out_of_sight(options.run):
        event(logger, "note", run=options.run, configuration="is on the cluster, and checked there")
        return {"run": options.run}, {"run": options.run}
    config = cli.load(name, options)
    named: Paths = {**paths.used(name, config)}
    if name == "sample":
        named["--output"] = options.output
    return {"preset": config.preset, "run": config.run, "dataset": config.dataset}, named


def _is_out_of_sight(run: str) -> bool:
    """Whether a run may be there for the cluster and is not for this machine."""
    return _is_relative(run) or (os.path.isabs(run) and not os.path.exists(run))


def _checked_folders(folders: Mapping[str, Any]) -> tuple[dict[str, str], Paths]:
    """Of an evaluation of two folders."""
    given = {"output": "metrics.json", **folders}
    named = {
        f"--{key.replace('_', '-')}": given.get(key)
        for key in ("generated", "reference", "output", "features", "save_statistics")
    }
    return {key: str(given.get(key)) for key in ("generated", "reference")}, named


def _is_relative(path: str) -> bool:
    return not ("://" in path or path.startswith("package:") or os.path.isabs(path))


def _with_config_inside(arguments: Sequence[str], source: str | None) -> list[str]:
    """The arguments with a ``--config`` of the source named as it is in the job's copy of it."""
    found = list(arguments)
    for number, word in enumerate(found):
        option, equals, path = word.partition("=")
        if option != "--config":
            continue
        at = number if equals else number + 1
        path = path if equals else found[at] if at < len(found) else ""
        inside = source is not None and Path(path).resolve().is_relative_to(source)
        if inside:
            path = str(Path(path).resolve().relative_to(str(source)))
        elif _is_relative(path):
            raise UserError(
                f"--config={path!r} is no file of the source, which is all that travels; give an absolute path that the "
                "cluster has"
            )
        found[at] = f"{option}={path}" if equals else path
    return found


def _variables(given: Sequence[str]) -> dict[str, str]:
    """Environment variables for the job.

    Raises:
        UserError: one is not set here, or holds what the dashboard should not show.
    """
    found: dict[str, str] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UserError(f"--env {key!r} is no name of an environment variable")
        if _SECRET.search(key.upper()):
            raise UserError(
                f"--env {key}: a job's environment is shown in Ray's dashboard, and this looks like a secret; give the "
                "nodes a role, or mount a secret there"
            )
        if not equals and key not in os.environ:
            raise UserError(f"--env {key}: it is not set here")
        found[key] = value if equals else os.environ[key]
        if jobs.has_password(found[key]):
            raise UserError(
                f"--env {key}: its value is a URL with a password, and Ray's dashboard shows it"
            )
    return found


def _packages(source: str | None) -> list[str]:
    """What the code needs beyond Ray, for pip on the nodes, in the versions of constraints.txt."""
    if source is None:
        raise UserError(
            f"--pip takes versions from {CONSTRAINTS}, which a checkout has and an installed package has not"
        )
    pinned = Path(source, CONSTRAINTS).read_bytes()
    project = tomllib.loads(Path(source, "pyproject.toml").read_text(encoding="utf-8"))
    needed: list[str] = project["project"]["dependencies"]
    # Ray keeps an environment under the hash of these lines, so they must change with the file.
    digest = hashlib.sha256(pinned).hexdigest()[:12]
    return [
        f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS} # {digest}",
        *(name for name in needed if not re.match(r"ray\b", name)),
    ]


def _version(source: str | None) -> dict[str, str]:
    """Of the package, and of the source where git knows it."""
    found = {}
    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that nobody installed
        found["version"] = metadata.version(DISTRIBUTION)
    if source is not None and Path(source, ".git").exists():
        command = ["git", "-C", source, "describe", "--always", "--dirty", "--abbrev=40"]
        command += ["--exclude", "*"]
        # There may be no git here, or one that does not trust the directory.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            found["commit"] = done.stdout.strip()
    return found


def settle(values: Mapping[str, Any]) -> Options:
    """Options from what was parsed."""
    return Options(**{field.name: values[field.name] for field in fields(Options)})


if __name__ == "__main__":
    raise SystemExit(cli.main(["submit", *sys.argv[1:]]))
