"""Keys and limits of clients."""

import dataclasses

import pytest

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.serving.clients import KEYS_VARIABLE, Clients, TooMany, load_keys

KEY = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.fixture
def settings():
    def make(**changes):
        return dataclasses.replace(load_config("demo").serve, **changes)

    return make


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_keys_come_from_a_file_and_the_environment(settings, tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n\nanna : {KEY}1\nben:{KEY}:2\n")
    monkeypatch.setenv(KEYS_VARIABLE, f"carl: {KEY}3,dora: {KEY}4")
    keys = load_keys(settings(keys_file=str(path)))
    assert keys.owner(f"{KEY}1") == "anna"
    assert keys.owner(f"{KEY}:2") == "ben"
    assert keys.owner(f"{KEY}3") == "carl"
    assert keys.owner(f"{KEY}4") == "dora"
    for wrong in ("", KEY, f"{KEY}1 ", f"anna: {KEY}1", "ключ", "\udcff"):
        assert keys.owner(wrong) is None


def test_keys_are_not_kept_as_they_are(settings, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, f"anna: {KEY}")
    assert KEY not in repr(load_keys(settings()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (KEY, "line 1: must be `name: key`"),
        ("anna: short", "line 1: must be `name: key`, the key of at least 16"),
        (f"anna: {KEY} {KEY}", "line 1"),
        (f"a: {KEY}\na: {KEY}2", "line 2: 'a' has a key already"),
    ],
)
def test_a_file_that_is_none_of_keys_is_named_without_a_key(settings, tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        load_keys(settings(keys_file=str(path)))
    assert str(path) in str(refused.value)
    assert KEY not in str(refused.value)


def test_missing_keys_are_told(settings, tmp_path):
    with pytest.raises(UserError, match=r"require_key=true needs keys: .*serve\.keys_file"):
        load_keys(settings(require_key=True))
    with pytest.raises(UserError, match="No such file"):
        load_keys(settings(keys_file=str(tmp_path / "nothing")))
    assert load_keys(settings()).hashes == {}


def test_a_client_may_make_so_many_requests_in_any_minute(settings):
    clock = Clock()
    clients = Clients(settings(requests_per_minute=3), clock)
    for clock.now in (0.0, 10.0, 20.0):
        with clients.admitted("anna"):
            pass
    with pytest.raises(TooMany, match="3 requests a minute") as refused, clients.admitted("anna"):
        pass
    assert refused.value.retry_after_seconds == pytest.approx(40.0)
    with clients.admitted("ben"):
        pass
    clock.now = 60.0
    with clients.admitted("anna"):
        pass
    with pytest.raises(TooMany) as refused, clients.admitted("anna"):
        pass
    assert refused.value.retry_after_seconds == pytest.approx(10.0)


def test_a_client_has_so_many_requests_at_once(settings):
    clients = Clients(settings(max_concurrent=2))
    with (
        clients.admitted("anna"),
        clients.admitted("anna"),
        clients.admitted("ben"),
        pytest.raises(TooMany, match="2 requests of yours"),
        clients.admitted("anna"),
    ):
        pass
    with clients.admitted("anna"), clients.admitted("anna"):
        pass


def test_who_does_not_come_is_forgotten(settings):
    clock = Clock()
    clients = Clients(settings(), clock)
    for number in range(100):
        clock.now = float(number)
        with clients.admitted(f"address {number}"):
            pass
        with clients.admitted("regular"):
            pass
    assert len(clients._times) <= 62
    assert not clients._busy
