"""Paths: local, ``s3://`` (or any other fsspec URL), and ``package:name/path`` inside an installed package.

The one place that knows the difference. A file appears whole or not at all: local files are written beside their place
and renamed, and an object store puts an object in one piece. What S3 fails to do for a passing reason (5xx, a lost or refused
connection) is tried again, `S3_ATTEMPTS` times over about two minutes; its endpoint and credentials come from the usual AWS
variables.
Called by every stage; imports nothing heavy, for it is loaded in each of Ray's workers.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import errno
import importlib.util
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError

logger = logging.getLogger(__name__)

READS_AHEAD = 16
"""Files fetched at once from an object store; a reader waits for the network, not for its CPU."""

S3_ATTEMPTS = 16
"""Of one request. s3fs waits between them, from 0.1 to 15 seconds, 118 in all."""

_told = threading.Event()  # that this process waits for an object store
_TEMPORARY = ".tmp"
_NOT_FOUND = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def is_remote(path: str) -> bool:
    """Whether the path is a URL of an object store, not of this machine's file system."""
    return "://" in path and not path.startswith("file://")


def absolute(path: str) -> str:
    """A path that means the same in a process with another working directory.

    Raises:
        UserError: ``package:`` names a package that is not installed.
    """
    if is_remote(path):
        return path.rstrip("/")
    if path.startswith("package:"):
        package, _, inside = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)  # finds it without importing it
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{path!r}: package {package!r} is not installed")
        return str(Path(next(iter(spec.submodule_search_locations))).resolve() / inside)
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def join(path: str, *parts: str) -> str:
    """A path below another."""
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Whether there is a file, or a directory with something in it."""
    if is_remote(path):
        filesystem, name = _remote(path)
        return bool(filesystem.exists(name))
    return os.path.exists(path)


def is_directory(path: str) -> bool:
    """Whether there is a directory; on an object store, a prefix of some object."""
    if is_remote(path):
        filesystem, name = _remote(path)
        return bool(filesystem.isdir(name))
    return os.path.isdir(path)


def is_empty(directory: str) -> bool:
    """Whether nothing is there, or a directory with nothing in it."""
    if is_remote(directory):
        filesystem, name = _remote(directory)
        return not filesystem.find(name, maxdepth=1, withdirs=True)
    return not (os.path.isdir(directory) and os.listdir(directory))


def list_directory(directory: str) -> list[str]:
    """Names of what is in a directory, in order; none if there is no such directory."""
    if is_remote(directory):
        filesystem, name = _remote(directory)
        if not filesystem.isdir(name):
            return []
        return sorted(
            str(path).rstrip("/").rpartition("/")[2] for path in filesystem.ls(name, detail=False)
        )
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def walk(directory: str) -> list[str]:
    """Paths of all files below a directory, relative to it, in order of their names."""
    if is_remote(directory):
        filesystem, name = _remote(directory)
        root = name.rstrip("/") + "/"
        return sorted(str(path).removeprefix(root) for path in filesystem.find(name))
    found = [
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, _, names in os.walk(directory, followlinks=True)
        for name in names
    ]
    return sorted(found)


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        # Without this s3fs first asks for the size, to read large objects in parts: two requests a picture.
        whole = {"max_concurrency": 1} if _is_s3(path) else {}
        return bytes(filesystem.cat_file(name, **whole))
    return Path(path).read_bytes()


def read_end(path: str, size: int) -> bytes:
    """The last bytes of a file, or all of a smaller one.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        return bytes(filesystem.cat_file(name, start=-size))
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - size))
        return file.read()


def read_each(paths: Sequence[str]) -> Iterator[bytes | OSError]:
    """The contents of many files, in order; from an object store some are fetched ahead of the one that is asked for.

    Yields:
        The content, or the error where the fault is the file's own: it is not there, or locally cannot be opened.

    Raises:
        OSError: any other fault, such as a lost connection or refused credentials.
    """
    if not any(map(is_remote, paths)):
        yield from map(_read_or_error, paths)
        return
    with concurrent.futures.ThreadPoolExecutor(READS_AHEAD) as pool:
        ahead: collections.deque[concurrent.futures.Future[bytes | OSError]] = collections.deque()
        for path in paths:
            ahead.append(pool.submit(_read_or_error, path))
            if len(ahead) > READS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read_or_error(path: str) -> bytes | OSError:
    try:
        return read_bytes(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        # In the words of this machine's file system, whatever an object store says.
        return type(error)(error.errno, os.strerror(error.errno)) if error.errno else _NOT_FOUND
    except (NotADirectoryError, PermissionError) as error:
        if is_remote(path):  # refused because of its key or token, as everything else will be
            raise
        return error


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        return int(filesystem.size(name))
    return os.path.getsize(path)


def modified(path: str) -> datetime.datetime:
    """When a file was last written, in UTC.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        found: datetime.datetime = filesystem.modified(name)
        return found.astimezone(datetime.UTC)
    return datetime.datetime.fromtimestamp(os.path.getmtime(path), datetime.UTC)


def open_input(path: str) -> Any:
    """A seekable binary file object for reading; close it."""
    if is_remote(path):
        filesystem, name = _remote(path)
        # What is asked for and no more: by default s3fs fetches 50 MB with every read.
        return filesystem.open(name, "rb", cache_type="none")
    return open(path, "rb")


def write_atomically(path: str, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, also if the process is killed; makes its directory.

    Of several writers at one time the last one wins. What a killed one leaves behind `sweep` removes.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        filesystem.pipe_file(name, bytes(content))
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: after a crash a worker of the earlier run may still be at it.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def sweep(directory: str) -> None:
    """Removes what killed processes left of files that they were writing in a directory; object stores have no such thing."""
    if not is_remote(directory) and os.path.isdir(directory):
        for leftover in Path(directory).glob(f".*{_TEMPORARY}"):
            leftover.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Deletes a file if it is there."""
    if is_remote(path):
        filesystem, name = _remote(path)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(name)
        return
    Path(path).unlink(missing_ok=True)


def remove_directory(directory: str) -> None:
    """Deletes a directory with all that is in it, if it is there."""
    if is_remote(directory):
        filesystem, name = _remote(directory)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(name, recursive=True)
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def require_writable(directory: str, key: str) -> None:
    """Makes a directory and tries to write in it, so that a stage fails before its work and not after.

    Args:
        directory: absolute path.
        key: the configuration's key that gave it, for the message.

    Raises:
        UserError: nothing can be written there.
    """
    probe = join(directory, ".writable")
    try:
        write_atomically(probe, b"")
        remove(probe)
    except Exception as error:  # object stores have exceptions of their own
        raise UserError(f"{key}={directory!r}: cannot be written: {error}") from error


def _is_s3(path: str) -> bool:
    return path.startswith(("s3://", "s3a://"))


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    if not _is_s3(path):
        try:
            filesystem, name = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:  # its package is not here, or nobody knows it
            raise UserError(f"{path!r}: {error}") from error
        return filesystem, name
    import s3fs.core

    s3fs.core.set_custom_error_handler(_passes)
    # botocore waits for random times between its own attempts, which keeps many readers from coming all at once, but a minute
    # of it may be over in seconds. A listing is asked for anew: other processes write in the same place.
    retries = {"max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "2"))}
    filesystem, name = fsspec.core.url_to_fs(
        path, use_listings_cache=False, config_kwargs={"retries": retries}
    )
    filesystem.retries = S3_ATTEMPTS
    return filesystem, name


def refusal(error: Exception) -> str | None:
    """Why an object store, or what stands before it, did not do what it was asked; None for errors of another kind."""
    if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
        return None
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return f"object store{f' {endpoint}' if endpoint else ''}: {error}"


def _passes(error: Exception) -> bool:
    """Whether a request that failed may succeed later; s3fs knows of lost connections, but not of these."""
    from botocore.exceptions import ClientError, ConnectionError

    if isinstance(error, ClientError):
        passes = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    else:
        passes = isinstance(error, ConnectionError)  # refused
    # Whoever waits should know for what; a line for each of many objects would tell no more.
    if passes and not _told.is_set():
        _told.set()
        logger.warning("%s; it is asked again for about two minutes a request", refusal(error))
    return passes


def _sync_directory(directory: Path) -> None:
    """Makes a new name in a directory outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
