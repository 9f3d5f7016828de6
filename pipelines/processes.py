"""Processes that a benchmark started: who they are, how much memory they hold, and how to have them stand still. Needs Linux.

Called by `bench_train`, `bench_serve` and `served`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all that it started, and what those started, by Linux's list of children."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def send(pids: Sequence[int], signal_number: int) -> None:
    """Sends a signal to processes, of which some may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


@contextlib.contextmanager
def standing_still(pids: Sequence[int]) -> Iterator[None]:
    """Stops processes, and lets them go on afterwards."""
    send(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pids, signal.SIGCONT)


def titled(pids: Sequence[int], title: str) -> list[int]:
    """Those of the processes whose command line holds a text."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def cpu_seconds(pid: int) -> float:
    """That a process has computed so far; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def resident_bytes(pid: int) -> int:
    """Memory that a process has in use, shared pages included; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
