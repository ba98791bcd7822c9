"""The tab key."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

import raymi.store
from raymi.cli.main import raymi as cli
from tests.fakes import add_model
from tests.rows import take


def completed(arguments: Sequence[str], incomplete: str) -> list[str]:
    shell = ShellComplete(cli, {}, "raymi", "_RAYMI_COMPLETE")
    return [item.value for item in shell.get_completions(list(arguments), incomplete)]


@pytest.fixture
def _filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/one", "org/two", "other/three"):
        add_model(Path("cache"), name)
    for name in ("heads-1a2b3c4d", "heads-5e6f7a8b", "demo-00000000"):
        take(raymi.store.open("raymi-store"), name).close("done")
    take(raymi.store.open("elsewhere"), "far-00000000").close("done")


def test_verbs() -> None:
    assert {"report", "run", "runs"} <= set(completed([], "r"))


@pytest.mark.usefixtures("_filled")
@pytest.mark.parametrize(
    "arguments", [["models"], ["knockout"], ["run", "job.yaml", "--models"], ["validate", "j", "--models"]]
)
def test_models(arguments: list[str]) -> None:
    verb, *more = arguments
    assert completed([verb, "--cache-dir", "cache", *more], "org/") == ["org/one", "org/two"]


@pytest.mark.usefixtures("_filled")
@pytest.mark.parametrize("verb", ["report", "show"])
def test_runs(verb: str) -> None:
    assert completed([verb], "heads") == ["heads-1a2b3c4d", "heads-5e6f7a8b"]
    assert completed([verb, "--store", "elsewhere"], "") == ["far-00000000"]


@pytest.mark.usefixtures("_filled")
def test_nothing_is_said_of_what_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken").write_text("")
    assert completed(["models", "--cache-dir", "broken"], "") == []
    assert completed(["report", "--store", "none"], "") == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_there_is_a_script_for_shells(shell: str) -> None:
    found = get_completion_class(shell)
    assert found
    assert "_RAYMI_COMPLETE" in found(cli, {}, "raymi", "_RAYMI_COMPLETE").source()
