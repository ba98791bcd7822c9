"""`raymi validate`: a job is checked on the models that there are, none of which is loaded."""

from pathlib import Path

import pytest

from tests.cli.inline import Said, Shell
from tests.fakes import add_model

JOB = """
models: {models}
prompts: [{{id: paris, text: The capital of France is}}, {{id: rome, text: {text}}}]
experiments: [{{kind: knockout, layers: {layers}, heads: {{each: all}}, queries: last, keys: first}}]
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    shell = Shell(tmp_path, monkeypatch, capfd)
    monkeypatch.setattr("raymi.model.loading.load", None)  # none is loaded
    monkeypatch.setattr("raymi.cluster.rehearsal.measure", None)  # nor is it asked how fast this machine is
    add_model(Path("cache"), "org/one")
    return shell


def validate(
    shell: Shell, *arguments: str, models: str = "org/*", text: str = "The capital is", layers: str = "middle"
) -> Said:
    Path("job.yaml").write_text(JOB.format(models=models, text=text, layers=layers))
    return shell("validate", "job.yaml", "--cache-dir", "cache", *arguments)


def test_a_job_that_is_right(shell: Shell) -> None:
    said = validate(shell)
    assert said.code == 0, said.err
    assert "job.yaml is a valid job: 2 prompts, 1 experiment; its run is called job-" in said.out
    assert ["org/one", "2", "8"] in [line.split() for line in said.out.splitlines()]
    assert validate(shell, "--set", "experiments.0.layers=all").code == 0
    assert not Path("store").exists()
    assert not Path("raymi-store").exists()


def test_a_job_that_is_wrong(shell: Shell) -> None:
    said = validate(shell, layers="midle")
    assert said.code == 2
    assert "job.yaml:4: experiments.0.layers: found 'midle'" in said.err
    assert said.out == ""


def test_what_a_model_cannot_measure(shell: Shell) -> None:
    add_model(Path("cache"), "org/bare", tokenizer=False)
    said = validate(shell, models="[org/one, org/bare]")
    assert said.code == 1
    assert "cannot run: org/bare: no tokenizer" in said.err
    assert "org/one" in said.out
    said = validate(shell, layers="5")
    assert said.code == 1
    assert "org/one: experiment 'knockout': layers: 5 is out of range" in said.err


@pytest.mark.parametrize(("models", "code"), [("none/*", 0), ("none/there", 1)])
def test_without_a_model_the_job_is_checked_all_the_same(shell: Shell, models: str, code: int) -> None:
    said = validate(shell, models=models)
    assert said.code == code
    assert "is a valid job" in said.out
    assert "not checked on any model: no model" in said.err
