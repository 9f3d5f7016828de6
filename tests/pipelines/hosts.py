"""Hosts on one machine: name, network, processes and temporary files of their own, joined by a bridge. Needs root.

A host that is cut off is gone as a machine that loses its power is: nobody is told, and no connection is closed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.pipelines.nodes import ROOT, descendants, kill

NETWORK = "10.213.77"
OURS = f"{NETWORK}.254"
"""Address of this machine, from which the cluster is used."""

NAMESPACES = ("--net", "--mount", "--pid", "--uts")

SETTLE = """
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
case $3 in /tmp/*) mkdir -p /mnt/${3#/tmp/}; mount --bind $3 /mnt/${3#/tmp/};; esac
mount --move /mnt /tmp
hostname $1
printf '127.0.0.1 localhost\\n%s %s\\n' $2 $1 > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
exec sleep infinity
"""
"""What a host of this name and address does first. The source, in the third argument, stays where it is seen."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of them."""

    address: str
    link: str
    "The bridge's end of its cable."
    first: int
    "Id of its first process, with which all others end."

    @property
    def inside(self) -> tuple[str, ...]:
        """What runs a command on it."""
        return ("nsenter", f"--target={self.first}", *NAMESPACES, "--wdns=/tmp")

    def cut_off(self) -> None:
        _run("ip", "link", "set", self.link, "down")


def why_not() -> str | None:
    """Why this machine can have no hosts; None if it can."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return "needs Linux with iproute2 and util-linux"
    tried = ["unshare", *NAMESPACES, "--fork", "true"]
    if subprocess.run(tried, capture_output=True).returncode:
        return "needs root, and leave to make namespaces"
    return None


@dataclass
class Hosts:
    """A bridge, and the hosts that hang on it; ended with all that runs there."""

    bridge: str = field(default_factory=lambda: f"lb{os.getpid()}")
    count: int = 0
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> "Hosts":
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        self.stack.callback(_run, "ip", "link", "delete", self.bridge)
        _run("ip", "address", "add", f"{OURS}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self) -> Host:
        """One more, with the next address."""
        self.count += 1
        return self.stack.enter_context(self._host(self.count))

    @contextlib.contextmanager
    def _host(self, number: int) -> Iterator[Host]:
        name, address = f"host{number}", f"{NETWORK}.{number}"
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen([*command, "sh", "-c", SETTLE, "sh", name, address, str(ROOT)])
        try:
            link = f"{self.bridge}-{number}"
            first = _first_process(holder.pid)
            wire = ("type", "veth", "peer", "name", "eth0", "netns", str(first))
            _run("ip", "link", "add", link, *wire)
            _run("ip", "link", "set", link, "master", self.bridge, "up")
            host = Host(address=address, link=link, first=first)
            for line in (
                "link set lo up",
                "link set eth0 up",
                f"address add {address}/24 dev eth0",
                f"route add default via {OURS}",
            ):
                _run(*host.inside, "ip", *line.split())
            yield host
        finally:
            kill(*descendants(holder.pid), holder.pid)
            holder.wait()


def _first_process(holder: int) -> int:
    """Its id as seen from here, once the host has its directories."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        sleeping = [pid for pid, line in descendants(holder).items() if line.startswith("sleep ")]
        if sleeping:
            return sleeping[0]
        time.sleep(0.01)
    raise TimeoutError("the host's first process has not begun")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
