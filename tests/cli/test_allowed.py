"""Options that would do nothing are refused, and refusals name the option that would allow them."""

from pathlib import Path

import pytest

from tests.cli.inline import Shell
from tests.fakes import LLAMA, add_model

JOB = "models: org/*\nprompts: [{text: The capital is}]\nexperiments: [{kind: knockout, layers: 0}]\n"
CODE = {"auto_map": {"AutoConfig": "config.Config", "AutoModelForCausalLM": "model.Model"}, "model_type": "its-own"}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    shell = Shell(tmp_path, monkeypatch, capfd)
    add_model(Path("cache"), "org/one")
    add_model(Path("cache"), "org/own", LLAMA | CODE)
    Path("job.yaml").write_text(JOB)
    return shell


@pytest.mark.parametrize("option", ["--trust-remote-code", "--allow-pickle", "--allow-unused"])
@pytest.mark.parametrize("verb", [["run", "job.yaml", "--inline"], ["validate", "job.yaml"], ["knockout", "org/*"]])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/onne", "org/onne: there is no such model in the cache\n(did you mean 'org/one'?)"),
        ("other/one@main", "other/one: this model is not among those that are asked for (org/*)"),
    ],
)
def test_a_model_that_is_not_there(shell: Shell, option: str, verb: list[str], model: str, says: str) -> None:
    said = shell(*verb, "--cache-dir", "cache", option, model)
    assert said.code == 2
    assert f"Error: {option} {says}" in said.err
    assert not Path("raymi-store").exists()


def test_refusals_name_the_option_that_allows(shell: Shell) -> None:
    assert "needs remote code (--trust-remote-code org/own allows it)" in " ".join(
        shell("models", "--cache-dir", "cache").out.split()
    )
    said = shell("run", "job.yaml", "--cache-dir", "cache", "--models", "org/own")
    assert said.code == 2
    assert "org/own: needs remote code (--trust-remote-code org/own allows it)" in said.err


@pytest.mark.parametrize(
    ("one", "other"),
    [(["--inline"], ["--address", "auto"]), (["-q"], ["-v"]), (["--limit", "1"], ["--sample", "1"])],
)
def test_options_that_exclude_each_other(shell: Shell, one: list[str], other: list[str]) -> None:
    said = shell("run", "job.yaml", "--cache-dir", "cache", *one, *other)
    assert said.code == 2
    assert "allowed: one of the two" in said.err
    assert not Path("raymi-store").exists()


def test_quiet_and_verbose(shell: Shell) -> None:
    few = shell.run("--models", "org/one", "-q", "--set", "verify=0")
    assert (few.code, few.out, few.err) == (0, "", "")
    many = shell.run("--models", "org/one", "-v", "--new", "--set", "verify=0")
    assert "org/one: start replica 0" in many.err
    assert "org/one: loaded replica 0" in many.err
    usual = shell.run("--models", "org/one", "--new", "--set", "verify=0")
    assert "start replica" not in usual.err
    assert "org/one: 1 of 1 measured, done" in usual.err
