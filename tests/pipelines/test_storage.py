import datetime
import os
import threading
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.config import UserError


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    """A directory here, and one in an object store (kept in memory)."""
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read(folder):
    path = storage.join(folder, "a", "b.bin")
    assert not storage.exists(path)
    storage.write_atomically(path, b"one")
    storage.write_atomically(path, memoryview(b"two"))
    assert storage.read_bytes(path) == b"two"
    with storage.open_input(path) as file:
        assert file.read() == b"two"
    assert storage.is_directory(storage.join(folder, "a"))
    assert not storage.is_directory(path)
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)


def test_empty_means_nothing_is_there(folder):
    assert storage.is_empty(storage.join(folder, "new"))
    storage.write_atomically(storage.join(folder, "new", "file"), b"")
    assert not storage.is_empty(storage.join(folder, "new"))


def test_a_file_was_modified_just_now(folder):
    path = storage.join(folder, "file")
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    storage.write_atomically(path, b"")
    assert before <= storage.modified(path) <= datetime.datetime.now(datetime.UTC)


def test_missing_file_is_not_found(folder):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"))


def test_interrupted_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomically(str(path), b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_absolute_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert storage.absolute("~/a") == str(Path.home() / "a")


def test_package_paths_lie_in_the_package():
    path = Path(storage.absolute("package:pipelines/emoji/objects.txt"))
    assert path == Path(storage.__file__).parent / "emoji" / "objects.txt"
    with pytest.raises(UserError, match="package 'no_such_package' is not installed"):
        storage.absolute("package:no_such_package/data")


def test_directory_that_cannot_be_written_is_told(tmp_path):
    # A file where a directory should be stops even root.
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"dataset='.*file/dataset': cannot be written"):
        storage.require_writable(str(tmp_path / "file" / "dataset"), "dataset")
    storage.require_writable(str(tmp_path / "new" / "dataset"), "dataset")
    assert list((tmp_path / "new" / "dataset").iterdir()) == []


def test_whoever_waits_for_an_object_store_is_told_once(monkeypatch, caplog):
    from botocore.exceptions import EndpointConnectionError

    monkeypatch.setattr(storage, "_told", threading.Event())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store")
    for name in ("a", "b"):
        assert storage._passes(EndpointConnectionError(endpoint_url=f"http://store/{name}"))
    (told,) = caplog.messages
    assert told.startswith("object store http://store: Could not connect to the endpoint URL")
    assert not storage._passes(ValueError("another kind"))
