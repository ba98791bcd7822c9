import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymi.errors import UserError
from raymi.store.objects import LocalObjects, Objects, RemoteObjects, connect


@pytest.fixture(params=["folder", "bucket"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """Both kinds of place; obstore's own folder store stands in for a bucket."""
    return LocalObjects(tmp_path) if request.param == "folder" else RemoteObjects(f"file://{tmp_path}")


def test_put_get_head_and_delete(objects: Objects) -> None:
    assert objects.get("a/b") is None
    assert objects.head("a/b") is None
    objects.put("a/b", b"old")
    objects.put("a/b", b"newer")
    assert objects.get("a/b") == b"newer"
    entry = objects.head("a/b")
    assert entry is not None
    assert (entry.key, entry.size) == ("a/b", 5)
    objects.delete(["a/b", "a/never"])
    assert objects.get("a/b") is None


def test_entries_are_those_below_a_folder_in_order(objects: Objects) -> None:
    for key in ("t/run=x/2", "t/run=x/1", "t/run=xy/3", "u/4"):
        objects.put(key, b"")
    assert [entry.key for entry in objects.entries("t/run=x")] == ["t/run=x/1", "t/run=x/2"]
    assert objects.entries("nothing") == []


def test_of_many_creators_at_once_exactly_one_wins(objects: Objects) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: objects.create("epochs/e0001", str(number).encode()), range(64)))
    assert sum(won) == 1
    assert objects.get("epochs/e0001") == str(won.index(True)).encode()
    assert [entry.key for entry in objects.entries("epochs")] == ["epochs/e0001"]


@pytest.mark.parametrize(
    ("death", "by"),
    [
        (
            "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))",
            "SIGXFSZ",
        ),
        ("os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
    ids=["half-way through the bytes", "before the rename"],
)
def test_a_writer_killed_inside_a_write_leaves_nothing_that_counts(tmp_path: Path, death: str, by: str) -> None:
    script = f"""
import os, pathlib, resource, signal, sys
from raymi.store.objects import LocalObjects
{death}
LocalObjects(pathlib.Path(sys.argv[1])).put("t/run=x/model=m/e0001-000001-00000000.parquet", b"x" * 10_000)
"""
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert process.returncode == -signal.Signals[by]
    objects = LocalObjects(tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1, "the unfinished file"
    assert list(tmp_path.glob("**/*.parquet")) == []
    assert objects.entries("t") == []
    objects.sweep("t")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("uri", ["foo://bucket/x", "s3:///"])
def test_a_uri_of_no_known_kind_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="refuses"):
        connect(uri)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        connect(str(tmp_path / "notes.txt"))


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    objects = connect(str(tmp_path))
    with pytest.raises(UserError, match=f"cannot write to the store {tmp_path}"):
        objects.put("runs/x/manifest.json", b"")
    assert objects.get("runs/x/manifest.json") is None
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize(("error", "said"), [(PermissionError, "Permission denied"), (OSError, "No space left")])
def test_what_the_file_system_refuses_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError], said: str
) -> None:
    number = 13 if error is PermissionError else 28
    objects = LocalObjects(tmp_path)

    def refuse(*_: object) -> None:
        raise error(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=said):
        objects.put("a", b"x")
    assert list(tmp_path.iterdir()) == []
