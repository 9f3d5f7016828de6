"""Nodes of Ray that a test starts as a user does, by `ray start`, and the shell of whoever speaks to them from outside."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.conftest import QUICK_RAY

Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def shell(**variables: str) -> dict[str, str]:
    """Environment of a shell: none of what the tests' own Ray has left, and programs of this Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "PATH": programs, "PYTHONPATH": str(ROOT)}
    return kept | QUICK_RAY | ours | variables


def ask(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> Answer:
    """Runs a command that ends within so many seconds, or tells what it has said."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError("\n".join(process.communicate())) from None
    return process.returncode, out, err


@contextlib.contextmanager
def node(
    arguments: Sequence[str], environment: Mapping[str, str], *, inside: Sequence[str] = ()
) -> Iterator[subprocess.Popen]:
    """One node, which is up; ended with all that it has started.

    Args:
        arguments: of `ray start`.
        environment: its own.
        inside: command that runs another, somewhere else.
    """
    # Not pytest's: Ray's sockets allow a short path only.
    folder = Path(tempfile.mkdtemp(prefix="n-", dir="/tmp"))
    command = [
        *(*inside, "ray", "start", "--block", *arguments),
        f"--object-store-memory={150 * 2**20}",
        *([f"--temp-dir={folder / 't'}"] if "--head" in arguments else []),
    ]
    log = folder / "log"
    with log.open("wb") as out:
        # Jobs get their source from the job, not from here.
        alone = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(command, env=alone, cwd=folder, stdout=out, stderr=out)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        kill(*descendants(process.pid), process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def descendants(pid: int) -> dict[int, str]:
    """What a process started, and what that started: process ids and command lines."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parents[int(folder.name)], lines[int(folder.name)] = parent, line
    found: dict[int, str] = {}
    queue = [pid]
    while queue:
        children = [child for child, parent in parents.items() if parent == queue[0]]
        found |= {child: lines[child] for child in children}
        queue = [*queue[1:], *children]
    return found


def kill(*pids: int) -> None:
    """Ends processes that may be gone already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
