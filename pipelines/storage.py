"""Paths: local, ``s3://`` (or any other fsspec URL), and ``package:name/path`` inside an installed package.

The one place that knows the difference. A file appears whole or not at all: local files are written beside their place
and renamed, and an object store puts an object in one piece. Called by every stage; imports nothing heavy, for it is
loaded in each of Ray's workers.
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn


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
            _fail(f"{path!r}: package {package!r} is not installed")
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


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        return bytes(filesystem.cat_file(name))
    return Path(path).read_bytes()


def open_input(path: str) -> Any:
    """A seekable binary file object for reading; close it."""
    if is_remote(path):
        filesystem, name = _remote(path)
        return filesystem.open(name, "rb")
    return open(path, "rb")


def write_atomically(path: str, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, also if the process is killed; makes its directory.

    One process at a time may write to a path.

    Raises:
        OSError: as `open` does.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        filesystem.pipe_file(name, bytes(content))
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed process left behind is overwritten by the next.
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: str) -> None:
    """Deletes a file if it is there."""
    if is_remote(path):
        filesystem, name = _remote(path)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(name)
        return
    Path(path).unlink(missing_ok=True)


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
        _fail(f"{key}={directory!r}: cannot be written: {error}", error)


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    filesystem, name = fsspec.core.url_to_fs(path)
    return filesystem, name


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    from pipelines.config import UserError  # imports torch, which workers that decode do without

    raise UserError(message) from cause
