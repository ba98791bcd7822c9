"""What Ray is told before it starts."""

import os
import tempfile

import pytest

from raymi.cluster import session
from raymi.errors import UserError


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An environment in which the user has said nothing; what is set in the test goes with it."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(session, "_TOKEN_FILE", tmp_path / "auth_token")
    return os.environ


def test_a_ray_of_our_own_gets_a_token_that_lives_in_memory(environment):
    session._environment(joins=False)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    first = environment.pop("RAY_AUTH_TOKEN")
    environment.pop("RAY_AUTH_MODE")
    session._environment(joins=False)
    assert environment["RAY_AUTH_TOKEN"] != first


@pytest.mark.parametrize("said", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "mine"}])
def test_what_the_user_has_said_stays(environment, said):
    environment.update(said)
    session._environment(joins=False)
    assert said.items() <= environment.items()
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & environment.keys() == said.keys()


@pytest.mark.parametrize(("known", "mode"), [(False, None), (True, "token")])
def test_a_cluster_that_is_joined_gets_the_token_that_there_is(environment, known, mode):
    if known:
        session._TOKEN_FILE.write_text("t" * 32)
    session._environment(joins=True)
    assert environment.get("RAY_AUTH_MODE") == mode
    assert "RAY_AUTH_TOKEN" not in environment


def test_sockets_get_a_path_that_is_short_enough(environment, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    assert session._temp_dir() is None
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch/users/somebody/jobs/1234567890/tmp")
    assert session._temp_dir() == "/tmp/ray"
    environment["RAY_TMPDIR"] = "/scratch/users/somebody/jobs/1234567890/tmp"
    with pytest.raises(UserError, match="too long"):
        session._temp_dir()
    environment["RAY_TMPDIR"] = "/scratch/me"
    assert session._temp_dir() is None


def test_cores_are_those_of_this_process():
    assert session.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:9", "refused"), ("nowhere", "host:port"), ("head:x", "host:port"), ("local", "auto")],
)
def test_an_address_that_nobody_listens_at_is_said_at_once(address, says):
    with pytest.raises(UserError, match=says), session.session(address):
        pass


@pytest.mark.parametrize("address", ["ray://head:10001", "ray://127.0.0.1:10001"])
def test_a_client_address_is_refused(address):
    with pytest.raises(UserError, match="ray job submit"), session.session(address):
        pass
