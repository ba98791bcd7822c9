"""A command that is refused has written nothing: a finished run stays finished."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import raymi.store
from raymi.errors import UserError
from tests.cli.inline import Shell, one_thread
from tests.fakes import LLAMA, add_model

PARIS = {"id": "paris", "text": "The capital of France is", "answer": " Paris"}
ROME = {"id": "rome", "text": "The capital of Italy is", "answer": " Rome"}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """With a run that is done."""
    shell = Shell(tmp_path, monkeypatch, capfd)
    add_model(Path("cache"), "org/one")
    write(PARIS)
    with one_thread():
        assert shell.run().code == 0
    return shell


def write(*prompts: dict[str, str], **fields: Any) -> None:
    knockout = {"kind": "knockout", "layers": {"each": "all"}, "keys": "first"}
    job = {"name": "done", "models": "org/*", "prompts": prompts, "experiments": [knockout], "verify": 1}
    Path("job.yaml").write_text(json.dumps(job | fields))


def files() -> dict[str, bytes]:
    """All but the signs of life of whoever drives a run."""
    found = (path for path in sorted(Path("store").rglob("*")) if path.is_file() and path.parent.name != "heartbeats")
    return {str(path): path.read_bytes() for path in found}


def test_another_text_under_a_known_id(shell: Shell) -> None:
    before = files()
    write(PARIS | {"text": "The capital of Peru is"}, ROME)
    said = shell.run()
    assert said.code == 2
    assert "'paris' is not what it was" in said.err
    assert files() == before
    assert "done" in shell("runs", "--store", "store").out


def test_a_model_that_is_not_there(shell: Shell) -> None:
    before = files()
    assert shell.run("--models", "org/none").code == 2
    assert files() == before


def test_a_ray_that_does_not_start(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 100)
    write(PARIS, ROME)
    said = shell("run", "job.yaml", "--store", "store", "--cache-dir", "cache")
    assert said.code == 2
    assert "too long for Ray's sockets" in said.err
    assert files() == before


def test_a_run_that_another_process_drives(shell: Shell) -> None:
    store = raymi.store.open("store")
    [manifest] = store.runs()
    write(PARIS, ROME)
    with store.take(manifest.run, written="", resolved=manifest.jobs[0].resolved):
        before = files()
        said = shell.run()
        assert files() == before
    assert said.code == 2
    assert "is being driven by" in said.err


def test_what_another_command_has_measured_meanwhile_is_not_measured_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the store and the taking of the run."""
    from raymi.store.reader import Store

    take = Store.take

    def late(self: Store, run: str, **more: Any) -> Any:
        monkeypatch.setattr(Store, "take", take)
        assert shell.run().code == 0
        return take(self, run, **more)

    write(PARIS, ROME)
    monkeypatch.setattr(Store, "take", late)
    with one_thread():
        said = shell.run()
    assert said.code == 0
    assert "nothing to do" in said.out
    rows = raymi.store.open("store").scan("ablations").collect()
    assert rows.height == rows.unique("ablation_id").height == 4


def test_more_tokens_than_there_are_is_all_there_are(shell: Shell) -> None:
    with one_thread():
        assert shell.run("--set", f"top_k={10**9}", "--set", "verify=100000", "--store", "other").code == 0
    rows = raymi.store.open("other").scan("ablations").collect()
    assert rows["changed"].list.len().unique().to_list() == [LLAMA["vocab_size"]]
    [manifest] = raymi.store.open("other").runs()
    assert manifest.jobs[-1].resolved["top_k"] == 10**9
    verified = raymi.store.open("other").scan("verifications").select(pl.len()).collect().item()
    assert verified == rows.height == 2


def test_a_store_that_cannot_be_written(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from raymi.store.objects import LocalObjects

    def refuse(self: LocalObjects, key: str, data: bytes) -> bool:
        raise UserError("cannot write")

    before = files()
    write(PARIS, ROME)
    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "put", refuse)
        assert shell.run().code == 2
    assert files() == before
