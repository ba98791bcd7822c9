"""What people get wrong: `wrong_inputs.tsv` has a line for each mistake, with the exit code and what is said of it.

A line is a kind (`KINDS`), what is wrong as JSON, the exit code, and a part of the message. `python -m
tests.cli.test_wrong_inputs` prints the table as raymi answers now, to look at.
"""

import io
import json
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fakes import add_model, add_saes

TABLE = Path(__file__).with_name("wrong_inputs.tsv")
KNOCKOUT = {"kind": "knockout", "layers": "all", "queries": "last", "keys": "first"}
SAE = {"kind": "sae", "measure": "quality", "saes": "org/sae"}
JOB: dict[str, Any] = {
    "name": "job",
    "models": ["org/good"],
    "prompts": [{"id": "fr", "text": "The capital of France is"}],
    "experiments": [KNOCKOUT],
}
KINDS = ("job", "experiment", "sae", "yaml", "set", "csv", "jsonl", "args")
"""Fields of a job, of a knockout, of an experiment with SAEs; a job file; --set; a file of prompts; arguments."""


class Line(NamedTuple):
    kind: str
    wrong: str
    code: int
    message: str


def table() -> list[Line]:
    lines = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return [Line(kind, wrong, int(code), json.loads(message)) for kind, wrong, code, message in lines]


def arguments(kind: str, wrong: Any) -> list[str]:
    """Writes what is wrong into the current folder; what to type then."""
    run = ["run", "job.yaml", "--dry-run", "--inline", "--store", "store", "--cache-dir", "cache"]
    job = JOB
    match kind:
        case "job":
            job = JOB | wrong
        case "experiment":
            job = JOB | {"experiments": [KNOCKOUT | wrong]}
        case "sae":
            job = JOB | {"experiments": [SAE | wrong]}
        case "set":
            run += ["--set", wrong]
        case "csv" | "jsonl":
            Path(f"p.{kind}").write_text(wrong, encoding="utf-8")
            job = JOB | {"prompts": [{"file": f"p.{kind}"}]}
        case "args":
            words = shlex.split(wrong)
            cached = words[0] in ("models", "knockout", "run") or (words[0] == "sae" and words[1] != "fetch")
            run = [*words, *(["--cache-dir", "cache"] if cached else [])]
        case _:
            pass
    text = wrong if kind == "yaml" else json.dumps(job, allow_nan=False) if kind != "job" else json.dumps(job)
    Path("job.yaml").write_text(text.replace("Infinity", ".inf"), encoding="utf-8")
    return run


def answer(folder: Path, kind: str, wrong: Any) -> tuple[int, str]:
    """The exit code, and what is said on standard error, without where the folder is."""
    from raymi.cli.main import main

    said = io.StringIO()
    before = sys.argv, sys.stdout, sys.stderr
    with chdir(folder), redirect_stderr(said), redirect_stdout(io.StringIO()):
        sys.argv = ["raymi", *arguments(kind, wrong)]
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    sys.argv, sys.stdout, sys.stderr = before
    return code, said.getvalue().replace(f"{folder}/", "")


def make(folder: Path) -> Path:
    cache = folder / "cache"
    add_model(cache, "org/good")
    add_saes(cache, "org/sae", {"a": "blocks.1.hook_resid_post"}, model="good")
    (folder / "texts.txt").write_text("The capital of France is Paris. " * 20)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("line", table() if TABLE.exists() else [], ids=lambda line: f"{line.kind} {line.wrong[:60]}")
def test_a_mistake_is_said(folder: Path, line: Line) -> None:
    code, said = answer(folder, line.kind, json.loads(line.wrong))
    assert code == line.code
    assert line.message in said
    assert "Traceback" not in said
    assert len(said) < 3_000


def test_the_table_is_long_and_says_nothing_twice() -> None:
    lines = table()
    assert len(lines) >= 150
    assert len({(line.kind, line.wrong) for line in lines}) == len(lines)
    assert {line.kind for line in lines} == set(KINDS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        place = make(Path(name))
        for row in (Path(sys.argv[1]) if sys.argv[1:] else TABLE).read_text(encoding="utf-8").splitlines():
            kind, wrong = row.split("\t")[:2]
            code, said = answer(place, kind, json.loads(wrong))
            first = said.removeprefix("Error: ").strip().split("\n")
            print(kind, wrong, code, json.dumps(" | ".join(first)), sep="\t", flush=True)
