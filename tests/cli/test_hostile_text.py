"""Every command on files whose names and contents try to command the terminal."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
from rich.console import Console

import raymi.store
from raymi.cli.main import main
from raymi.cluster.messages import Status
from raymi.cluster.progress import Bars, Lines
from raymi.store import schemas
from raymi.store.layout import slug
from tests.fakes import LLAMA, add_files, add_model, sae_files
from tests.rows import cell, failure, loaded, take

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\x85\x7f\x08"
"""A title, a cleared screen, a colour by C1, a turned text, two ends of a line, deletions."""
TOLD = "\\u001b]0;owned\\u0007"
QUOTED = "\\x1b]0;owned\\x07"
"""The same between the quotation marks of Python."""


class Said(NamedTuple):
    code: int
    out: str
    err: str


Raymi = Callable[..., Said]


@pytest.fixture
def raymi_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Raymi:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["raymi", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        said = Said(int(exit.value.code or 0), *capfd.readouterr())
        assert obeyed(said.out) == obeyed(said.err) == set()
        return said

    return call


def obeyed(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    add_model(cache, "org/good")
    add_model(cache, "org/type", LLAMA | {"model_type": EVIL})
    add_model(cache, f"org/x{EVIL}x")
    add_model(cache, "org/named", LLAMA | {"architectures": [EVIL]})
    add_model(cache, "org/quantised", LLAMA | {"quantization_config": {"quant_method": EVIL}})
    add_model(cache, "org/parts", tensors={EVIL: (2, 2)}, dtype=EVIL)
    sae = sae_files("blocks.1.hook_resid_post", model="good")
    evil = sae_files("blocks.1.hook_resid_post", model="good", architecture=EVIL)
    add_files(cache, "org/sae", sae)
    add_files(cache, "org/evil-sae", evil)
    add_files(cache, "org/site", sae_files(EVIL, model=EVIL, neuronpedia_id=EVIL))
    return cache


def test_models(raymi_: Raymi, cache: Path) -> None:
    said = raymi_("models", "--cache-dir", "cache")
    assert said.code == 0
    assert said.out.count(TOLD) >= 4
    told = json.loads(raymi_("models", "--cache-dir", "cache", "--json").out)
    assert {f"org/x{EVIL}x"} < {each["id"] for each in told}
    assert EVIL in {each["model_type"] for each in told}
    assert TOLD in raymi_("models", f"org/nosuch{EVIL}", "--cache-dir", "cache").err


def test_sae(raymi_: Raymi, cache: Path) -> None:
    said = raymi_("sae", "list", "--cache-dir", "cache")
    assert said.code == 0
    assert said.out.count(TOLD) >= 2
    told = json.loads(raymi_("sae", "list", "--cache-dir", "cache", "--json").out)
    assert EVIL in {each.get("site") for each in told}
    assert TOLD in raymi_("sae", "inspect", "org/site", "--cache-dir", "cache").out
    assert QUOTED in raymi_("sae", "inspect", "org/evil-sae", "--cache-dir", "cache").err
    assert TOLD in raymi_("sae", "fetch", f"org/{EVIL}:x", "--cache-dir", "cache").err
    fed = ("--prompt", "The capital of France is", "--inline", "--store", "store", "--cache-dir", "cache")
    assert TOLD in raymi_("sae", "run", "org/site", "--model", "org/good", *fed).err


def test_fetch(raymi_: Raymi) -> None:
    assert QUOTED in raymi_("fetch", f"org/{EVIL}", "--cache-dir", "cache").err


def test_knockout(raymi_: Raymi, cache: Path) -> None:
    said = raymi_("knockout", "org/*", "--prompt", f"The capital{EVIL}", "--cache-dir", "cache", "--output", "out.json")
    assert TOLD in said.err
    assert said.code == 1, "one model failed"
    assert json.loads(Path("out.json").read_text())[0]["prompt"] == f"The capital{EVIL}"
    assert QUOTED in raymi_("knockout", "org/good", "--edge", EVIL, "--cache-dir", "cache").err


JOB = {
    "models": ["org/good"],
    "prompts": [{"id": f"paris{EVIL}", "text": f"The capital of France is {EVIL}", "answer": " Paris"}],
    "experiments": [{"kind": "knockout", "name": f"heads{EVIL}", "layers": {"each": "all"}, "queries": "last",
                     "keys": "first"}],
    "verify": 1,
}  # fmt: skip
RUN = ("run", "job.yaml", "--inline", "--store", "store", "--cache-dir", "cache")


def test_run_and_what_it_leaves(raymi_: Raymi, cache: Path) -> None:
    Path("job.yaml").write_text(json.dumps(JOB))
    assert raymi_(*RUN, "--dry-run").code == 0
    said = raymi_(*RUN)
    assert said.code == 0, said.err
    assert TOLD in said.out
    assert raymi_("runs", "--store", "store").code == 0
    assert TOLD in raymi_("report", "--store", "store").out
    told = json.loads(raymi_("report", "--store", "store", "--json").out)
    assert told["models"][0]["experiment"] == f"heads{EVIL}"
    raymi_("report", "--store", "store", "--csv", "tables")
    assert pl.read_csv("tables/models.csv")["experiment"].to_list() == [f"heads{EVIL}"]
    assert f"heads{EVIL}".encode() in Path("tables/models.csv").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {EVIL: 1},
        {"dtype": EVIL},
        {"name": EVIL},
        {"models": [f"org/{EVIL}"]},
        {"models": [f"org/{EVIL}*"]},
        {"prompts": [{"file": f"{EVIL}.csv"}]},
        {"prompts": [{"text": "x", EVIL: 1}]},
        {"prompts": [{"text": "x", "id": EVIL}] * 2},
        {"experiments": [{"kind": EVIL}]},
        {"experiments": [JOB["experiments"][0], JOB["experiments"][0]]},
        {"experiments": [{**JOB["experiments"][0], "queries": {"text": "x" + EVIL}}]},
    ],
)
def test_mistakes_in_a_job(raymi_: Raymi, cache: Path, change: dict[str, object]) -> None:
    Path("job.yaml").write_text(json.dumps(JOB | change))
    said = raymi_(*RUN)
    assert said.code == 2
    assert QUOTED in said.err or TOLD in said.err


def test_a_job_and_an_option_by_names_that_are_hostile(raymi_: Raymi) -> None:
    assert TOLD in raymi_("run", f"{EVIL}.yaml").err
    Path(f"{EVIL}.yaml").write_text("a: [")
    assert TOLD in raymi_("run", f"{EVIL}.yaml").err
    assert QUOTED in raymi_("run", "x", f"--{EVIL}").err
    assert QUOTED in raymi_(EVIL).err
    Path("job.yaml").write_text(json.dumps(JOB))
    assert TOLD in raymi_(*RUN, "--set", f"{EVIL}=1").err
    assert TOLD in raymi_(*RUN, "--set", f"name=[{EVIL}").err
    assert TOLD in raymi_("runs", "--store", f"{EVIL}://x").err


def test_what_a_stranger_has_stored(raymi_: Raymi) -> None:
    store = raymi.store.open("store")
    with take(store) as run:
        model = f"org/{EVIL}"
        found = [cell("u", layer, model=model, experiment=EVIL, dtype=EVIL, engine=EVIL) for layer in range(3)]
        run.add("ablations", slug(model), schemas.rows("ablations", found))
        run.add("models", slug(model), loaded(model, device=EVIL))
        run.add("failures", "m", failure(f"org/failed{EVIL}", message=EVIL, kind=EVIL))
        run.close("failed")
    raymi_("runs", "--store", "store")
    assert raymi_("report", "--store", "store").out.count(TOLD) > 5
    assert QUOTED in raymi_("report", EVIL, "--store", "store").err
    told = json.loads(raymi_("report", "--store", "store", "--json").out)
    assert told["failures"][0]["message"] == EVIL


def status() -> Status:
    return Status("running", 10, 5, 0, 200, 100, 1, 90.0)


def test_progress(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a terminal, what is drawn holds rich's own controls, but nothing of what it was given."""
    from raymi import outlet

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    outlet.install()
    lines = Lines({})
    lines.say(EVIL)
    lines.update({EVIL: status()})
    said = capfd.readouterr().err
    assert said.count(TOLD) == 2
    assert obeyed(said) == set()

    console = Console(file=outlet.controls(), force_terminal=True, width=200)
    with Bars(console, {}) as bars:
        bars.say(EVIL)
        bars.update({EVIL: status()})
        print(EVIL, file=sys.stderr)
        print(EVIL)
    shown = capfd.readouterr()
    assert "\x1b[" in shown.err
    assert shown.err.count(TOLD) >= 4
    assert not any(part in shown.err + shown.out for part in ("\x1b]0;", "\x1b[2J\x9b", *EVIL[-5:]))
