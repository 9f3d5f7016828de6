"""Ray jobs from outside: finding the cluster, submitting, following the log, stopping, and the exit code.

A thin layer over `ray.job_submission.JobSubmissionClient`, which

* takes ``RAY_API_SERVER_ADDRESS`` and ``RAY_ADDRESS`` before the address that it is given; here what is given counts;
* waits without end for a host that does not answer; here a connection is tried first;
* leaves whoever follows a log alone with a lost connection; here it is taken up again where it broke.

Called by `demo` and `submit`.
"""

import asyncio
import contextlib
import os
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from typing import Any, TypeVar

from pipelines.errors import StageFailed, UserError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own tools look for the address of a job server, in this order."""

CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.5
AGENT_SECONDS = 60.0
LOST_SECONDS = 60.0
"""For which a job server may be away while a job is followed."""
QUIET_SECONDS = 30.0
"""Without a word of the log, after which it is asked whether the job still runs."""
STOP_SECONDS = 60.0
"""Ray kills a job three seconds after it was told to stop; the rest is for a busy head."""

TERMINATED = 143
"""Exit code of a job that was stopped, as that of a process that SIGTERM ended."""

T = TypeVar("T")


def find_address(given: str | None) -> tuple[str, str]:
    """The job server's URL, and what named it: ``--address`` or a variable.

    Raises:
        UserError: nothing names one, or what does is no URL.
    """
    named = {"--address": given} | {name: os.environ.get(name) for name in ADDRESS_VARIABLES}
    for source, address in named.items():
        if not address:
            continue
        try:
            url = urllib.parse.urlsplit(address)
            sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise UserError(
                f"{source}={without_password(address)!r} must be the URL of the cluster's dashboard, such as "
                "http://head:8265"
            )
        return address.rstrip("/"), source
    raise UserError(
        "no cluster is named: give --address http://head:8265, or set RAY_API_SERVER_ADDRESS"
    )


def has_password(text: str) -> bool:
    """Whether a text holds a URL with a password in it."""
    return without_password(text) != text


def without_password(text: str) -> str:
    """The text with the user and password of a URL left out."""
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://...@", text)


def connect(address: str) -> Any:
    """A `JobSubmissionClient`.

    Args:
        address: URL of the dashboard; counts whatever the environment names.

    Raises:
        UserError: nobody answers there, or not without a token, or not with this one.
    """
    shown = without_password(address)
    _try_connection(address, shown)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _named(address):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE")
        if str(error).startswith("Authentication failed"):
            what = "refuses the token; set RAY_AUTH_TOKEN to the one of this cluster"
        else:
            what = (
                f"asks for a token, and RAY_AUTH_MODE is {mode}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                "(`ray get-auth-token` on the head prints it)"
            )
        raise UserError(f"{shown} {what}") from error
    except Exception as error:  # whatever else answers there
        raise UserError(
            f"{shown} is no job server of Ray: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _try_connection(address: str, shown: str) -> None:
    url = urllib.parse.urlsplit(address)
    host = url.hostname or ""
    if urllib.request.getproxies().get(url.scheme) and not urllib.request.proxy_bypass(host):
        return  # only the proxy may know the way
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{shown}: nobody answers ({error}); is it the dashboard's address, and reachable from here?"
        ) from error


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """Has the environment name the address, which Ray takes before any other."""
    name = ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def submit(
    client: Any,
    entrypoint: str,
    *,
    metadata: Mapping[str, str],
    runtime_env: Mapping[str, Any] | None = None,
    submission_id: str | None = None,
) -> str:
    """Submits a job; a Ray that has just started may need a while before its agent takes any.

    Returns:
        The job's id.

    Raises:
        UserError: no job is taken, or not this one.
    """
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            job = client.submit_job(
                entrypoint=entrypoint,
                metadata=dict(metadata),
                runtime_env=dict(runtime_env or {}),
                submission_id=submission_id,
            )
            return str(job)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise UserError(f"the job was not taken: {_reason(error)}") from error
            if time.monotonic() > deadline:
                raise UserError(
                    "Ray takes no jobs, as when another Ray on that machine holds port 52365; stop that one first"
                ) from error
            time.sleep(POLL_SECONDS)


def follow(client: Any, job: str) -> Iterator[str]:
    """The log of a job from its beginning, as it comes, until the job has ended.

    Raises:
        UserError: there is no such job.
        StageFailed: the job server does not answer any more.
    """
    info(client, job)
    seen = 0
    while True:
        position = 0
        with contextlib.closing(_tail(client, job)) as tail:
            for text in tail:
                position += len(text)
                if position > seen:
                    yield text[seen - position :]
                    seen = position
        if info(client, job).status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    if rest := _asked(lambda: client.get_job_logs(job))[seen:]:
        yield rest


def _tail(client: Any, job: str) -> Generator[str, None, None]:
    """What a connection brings until it ends or breaks."""
    import aiohttp

    loop = asyncio.new_event_loop()  # with none of `asyncio.run`'s handlers: Ctrl-C leaves at once
    tail = client.tail_job_logs(job)
    try:
        while (text := loop.run_until_complete(_next(client, job, tail))) is not None:
            yield text
    except (OSError, RuntimeError, aiohttp.ClientError):
        return
    finally:
        _close(loop)


async def _next(client: Any, job: str, tail: Any) -> str | None:
    """What comes next; None at the end, also where a connection that broke unnoticed will never bring it."""
    coming = asyncio.ensure_future(anext(tail, None))
    ended = False
    while not coming.done():
        await asyncio.wait({coming}, timeout=QUIET_SECONDS)
        if not coming.done() and ended:
            coming.cancel()
            return None
        ended = not coming.done() and info(client, job).status.is_terminal()
    text: str | None = coming.result()
    return text


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what an interruption has left."""

    async def end(tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    closing: list[Coroutine[Any, Any, None]] = [
        end(asyncio.all_tasks(loop)),
        loop.shutdown_asyncgens(),
    ]
    for step in closing:
        loop.run_until_complete(step)
    loop.close()


def info(client: Any, job: str) -> Any:
    """Ray's `JobDetails`.

    Raises:
        UserError: there is no such job.
        StageFailed: the job server does not answer any more.
    """
    try:
        return _asked(lambda: client.get_job_info(job))
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        raise UserError(f"there is no job {job!r} at {_address(client)}") from error


def _asked(ask: Callable[[], T]) -> T:
    """The answer of a job server that may be away for a while."""
    import requests

    deadline = time.monotonic() + LOST_SECONDS
    while True:
        try:
            return ask()
        except requests.ConnectionError as error:
            if time.monotonic() > deadline:
                raise StageFailed(
                    f"the job server has not answered for {LOST_SECONDS:.0f} s, and the job may go on without it"
                ) from error
            time.sleep(POLL_SECONDS)


def exit_code(details: Any) -> int:
    """The job's own exit code; of one that was stopped `TERMINATED`, and 1 where it did not come to have one."""
    code: int | None = details.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code
    return {"SUCCEEDED": 0, "STOPPED": TERMINATED}.get(str(details.status), 1)


def stop(client: Any, job: str) -> Any:
    """Stops a job and waits until it has.

    Returns:
        Its `JobDetails`; of a job that had ended before, how it did.

    Raises:
        UserError: there is no such job.
        StageFailed: it has not stopped after a minute.
    """
    if info(client, job).status.is_terminal():
        return info(client, job)
    _asked(lambda: client.stop_job(job))
    deadline = time.monotonic() + STOP_SECONDS
    while not (details := info(client, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise StageFailed(f"{job} was told to stop and still is {details.status}")
        time.sleep(POLL_SECONDS)
    return details


def _address(client: Any) -> str:
    return without_password(client.get_address())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _reason(error: Exception) -> str:
    """The end of what a job server answers, which is a traceback."""
    lines = str(error).strip().replace("\\n", "\n").splitlines()
    return lines[-1].strip(' ."') if lines else type(error).__name__
