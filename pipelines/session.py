"""How a stage meets Ray, and how it says what it is doing.

`connect` joins the cluster that ``RAY_ADDRESS`` names (a submitted job has it set), or starts a local Ray for the time of the
stage. Before any work it makes sure that what the stage asks for can ever be given, because Ray itself would wait in silence; on
a cluster that may grow it says that it waits:

    workers fit   sum over nodes of floor(node's resources / worker's resources) >= workers
    CPUs remain   cpus of the cluster - workers * cpus of a worker >= what tasks need, those of Ray Data at least 1

and that the stage's paths mean the same directory wherever they are used. `Progress` and `event` give one line an event,
``key=value``, which people and `demo` read. Called by the stages; `setup_logging` also inside Ray's workers.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.config import Config, UserError
from pipelines.sections import RayConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    # The 2.60 reader of Parquet spends two to three seconds on every epoch of a small dataset.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # `Progress` reports; Ray's own bars would write over it.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Workers stay in the directory they started in. Paths are made absolute all the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Otherwise what a worker prints shows up twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # A node that has yet to boot takes longer than the default minute. After this time Ray looks anew at what nodes there are:
    # one that was lost a moment ago may have been counted.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # Serve's controller looks ten times a second, which takes a CPU of a small machine 5 % of its time.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Ray is told unless the user's environment says otherwise."""

NODE_GROUP = "ray.io/node-group"
"""Label of nodes that were started as one of a group, by the cluster launcher or KubeRay."""

MAX_TEMPORARY_CHARACTERS = 25
"""The dashboard's sockets lie up to 82 characters below this directory, and Linux allows a socket's path 107."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a stage asks of the cluster."""

    stage: str
    "Name of the stage, for messages."
    workers: int = 0
    "Processes that hold their resources for the whole stage."
    cpus_per_worker: float = 1.0
    "CPUs reserved for each."
    gpus_per_worker: float = 0.0
    "GPUs reserved for each."
    cpus_for_tasks: float = 1.0
    "CPUs that must be left beside them."
    paths: tuple[str, ...] = ()
    "Paths, as configured, that workers read or write."


@contextlib.contextmanager
def connect(config: Config, needs: Needs, *, dashboard: bool = False) -> Iterator[Any]:
    """Ray for the time of a stage.

    Args:
        config: only its ``ray`` section is read, and only where a local Ray is started.
        needs: checked before the stage gets to work.
        dashboard: start a local Ray with its dashboard, through which jobs are submitted.

    Yields:
        What ``ray.init`` returned; ``dashboard_url`` is the address for jobs.

    Raises:
        UserError: if the cluster can never give what is needed.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        _check_needs(config, needs)
        yield sys.modules["ray"].get_runtime_context()
        return
    set_environment()
    joins = "RAY_ADDRESS" in os.environ
    on_terminate = signal.getsignal(signal.SIGTERM)
    with _joined() if joins else _started(config.ray, dashboard) as context:
        if threading.current_thread() is threading.main_thread():
            # Ray has put its own in place, which prints a trace and ends with 15.
            signal.signal(signal.SIGTERM, on_terminate)
        _check_needs(config, needs)
        yield context


def set_environment() -> None:
    """Settles what Ray reads from the environment, without overruling the user.

    Ray 2.60 asks for a token where ``RAY_AUTH_MODE`` is unset, writes one to the home directory, and from then on tools
    disagree about whether it is needed. A local Ray gets a token of its own instead, which lives in this process and its
    children only: its ports are of no use to anybody else on the network. On joining, the rule of ``ray start`` is applied.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_MODE", joining_auth_mode())
    _refresh_imported_ray()


def joining_auth_mode() -> str:
    """``RAY_AUTH_MODE`` of whoever joins or asks a cluster, where the user has not set it: ``token`` if there is one."""
    has_token = (
        "RAY_AUTH_TOKEN" in os.environ
        or "RAY_AUTH_TOKEN_PATH" in os.environ
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    return "token" if has_token else "disabled"


def _refresh_imported_ray() -> None:
    """Ray reads two of the settings when it is imported, which may have been earlier."""
    if "ray" in sys.modules:
        from ray._raylet import Config  # what Ray itself does after it changes RAY_AUTH_MODE

        Config.initialize("")
    if "ray.data" in sys.modules:
        from ray.data import DataContext

        context = DataContext.get_current()
        context.use_datasource_v2 = os.environ["RAY_DATA_USE_DATASOURCE_V2"] == "1"
        context.enable_progress_bars = os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "0"


def keep_actors() -> None:
    """Has Ray Data keep actors that have nothing to do for a moment, for the next would load its network anew.

    Those for which there is no room beside other work, since a node was lost, it still gives up.
    """
    from ray.data import DataContext

    # Of use, from 0 on; the default is 0.5, and at 0 those are ended that wait.
    DataContext.get_current().autoscaling_config.actor_pool_util_downscaling_threshold = -1.0


@contextlib.contextmanager
def _joined() -> Iterator[Any]:
    import ray

    # No runtime_env: a job has one already, and Ray refuses to merge two.
    context = ray.init(log_to_driver=True)
    event(logger, "ray", joined=os.environ["RAY_ADDRESS"])
    try:
        yield context
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _started(config: RayConfig, dashboard: bool) -> Iterator[Any]:
    import ray

    with _temporary_directory() as folder:
        with _any_agent_port():
            # address="local": otherwise Ray may join whatever was left running on this machine.
            context = ray.init(
                address="local",
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_bytes,
                include_dashboard=dashboard,
                _temp_dir=folder,
            )
        # As `ray start` does: without it a job is told the address of any Ray that is found on the machine.
        Path(folder, "ray_current_cluster").write_text(context.address_info["gcs_address"])
        event(logger, "ray", started="local", cpus=ray.cluster_resources().get("CPU", 0))
        try:
            yield context
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _any_agent_port() -> Iterator[None]:
    """Has the agent, through which jobs run, take a free port.

    `ray.init` has no argument for it and takes the default of ``ray start``, which another Ray on this machine may hold.
    """
    from ray._private import parameter

    original = parameter.RayParams
    parameter.RayParams = functools.partial(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = original


@contextlib.contextmanager
def _temporary_directory() -> Iterator[str]:
    """A short-lived directory with a short name; kept, and named, when the stage fails, for Ray's logs are in it."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="ray-", dir=parent if len(parent) <= MAX_TEMPORARY_CHARACTERS else "/tmp"
    )
    failed = False
    try:
        yield folder
    except UserError:
        raise
    except Exception:
        failed = True
        event(logger, "failed", ray_logs=f"{folder}/session_latest/logs")
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def resources() -> list[Mapping[str, float]]:
    """Resources of each live node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def may_grow() -> bool:
    """Whether the cluster launcher or KubeRay runs the nodes, and its autoscaler may add to them.

    How many it may add, if any, is not to be learnt from Ray 2.60.
    """
    import ray

    return any(NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"])


def _check_needs(config: Config, needs: Needs) -> None:
    nodes, grows = resources(), may_grow()
    check_paths(needs.paths, several_nodes=grows or len(nodes) > 1, shared=config.ray.shared_paths)
    try:
        check_resources(needs, nodes)
    except UserError as error:
        if not grows:
            raise
        event(logger, "waiting", until="the autoscaler adds nodes", reason=error)


def check_resources(needs: Needs, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses what the nodes can never give.

    Args:
        needs: what the stage asks for.
        nodes: resources of each node, as Ray names them: ``CPU``, ``GPU``.

    Raises:
        UserError: saying what is asked, what there is, and what to change.
    """
    asked = {"CPU": needs.cpus_per_worker, "GPU": needs.gpus_per_worker}
    asked = {name: amount for name, amount in asked.items() if amount > 0}
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    places = sum(
        min(int(node.get(name, 0) // amount) for name, amount in asked.items()) for node in nodes
    )
    left = total["CPU"] - needs.workers * needs.cpus_per_worker
    if places >= needs.workers and left >= needs.cpus_for_tasks:
        return
    worker = " and ".join(f"{amount:g} {name}" for name, amount in asked.items())
    tasks = f", and {needs.cpus_for_tasks:g} CPU for tasks," if needs.cpus_for_tasks else ""
    raise UserError(
        f"{needs.stage}: {needs.workers} workers of {worker} each{tasks} do not "
        f"fit on {len(nodes)} node(s) with {total['CPU']:g} CPU and {total['GPU']:g} GPU; ask for "
        "fewer or smaller workers, or for a local Ray set ray.num_cpus higher"
    )


def check_paths(paths: Sequence[str], *, several_nodes: bool, shared: bool) -> None:
    """Refuses paths that would mean another directory on another node.

    Raises:
        UserError: naming the path.
    """
    if shared or not several_nodes:
        return
    for path in paths:
        if "://" not in path and not path.startswith("package:"):
            raise UserError(
                f"{path!r} is a local path, and the cluster has or may get several nodes; give s3://, or "
                "set ray.shared_paths=true if every node mounts the same directory there"
            )


def in_job() -> bool:
    """Whether this process belongs to a submitted job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def setup_logging() -> None:
    """Events go to standard error, one line each. May be called again; Ray's workers need their own call."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("httpx", "py4j", "s3fs", "botocore", "aiobotocore", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)


def event(to: logging.Logger, name: str, **fields: object) -> None:
    """Logs ``name key=value ...``; numbers with 4 digits, text with blanks quoted."""
    to.info("%s", _line(name, fields))


def warning(to: logging.Logger, name: str, **fields: object) -> None:
    """The same, for what needs a person's attention."""
    to.warning("%s", _line(name, fields))


def _line(name: str, fields: Mapping[str, object]) -> str:
    return " ".join([name, *(f"{key}={_text(value)}" for key, value in fields.items())])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "=\n') else text


class Progress:
    """How far a stage is: a bar on a terminal, elsewhere one line at most every `LINE_SECONDS`.

    The line is ``progress stage=train done=1024 total=40000 unit=images seconds_left=93 loss=0.12``.

    Args:
        stage: what is going on.
        total: units of work in all.
        unit: what is counted, in the plural.
        done: units finished by an earlier run; they do not count for the speed.
    """

    LINE_SECONDS = 5.0

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._first = done
        self._began = time.monotonic()
        self._said, self._said_done = -float("inf"), -1
        self._fields: dict[str, object] = {}
        self._bar = _bar(stage, total, unit, done) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        self._say(0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._said_done != self.done:
            self._say(0.0)
        if self._bar is not None:
            self._bar.close()

    def update(self, num: int, **fields: object) -> None:
        """Counts ``num`` more units; ``fields`` (the loss, say) are shown until they are given anew."""
        self.done += num
        self._fields |= fields
        if self._bar is not None:
            self._bar.set_postfix({key: _text(value) for key, value in fields.items()}, False)
            self._bar.update(num)
        else:
            self._say(self.LINE_SECONDS)

    def seconds_left(self) -> float | None:
        """At the speed so far; None while there is none."""
        finished = self.done - self._first
        return self._elapsed() / finished * max(self.total - self.done, 0) if finished > 0 else None

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, pause: float) -> None:
        now = time.monotonic()
        if self._bar is not None or now - self._said < pause:
            return
        self._said, self._said_done = now, self.done
        left = self.seconds_left()
        event(
            logger,
            "progress",
            stage=self.stage,
            done=self.done,
            total=self.total,
            unit=self.unit,
            seconds_left="unknown" if left is None else round(left),
            **self._fields,
        )


def _bar(stage: str, total: int, unit: str, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=stage, total=total, unit=unit, initial=done, dynamic_ncols=True)
