"""A kind that another package brings goes all the way without a line in raymi: `examples/raymi-scale`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

from raymi.experiments import kinds
from raymi.experiments.kind import Kind
from tests.fakes import LLAMA, add_model, llama_shapes

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "raymi-scale"
VICTIM = ROOT / "tests" / "cluster" / "victim.py"
JOB = """
name: louder
models: tiny/*
prompts:
  - {id: france, text: The capital of France is, answer: " Paris"}
  - {id: spain, text: The capital of Spain is, answer: " Paris"}
experiments:
  - {kind: scale, layers: all, heads: {each: all}, factors: [0.0, 2.0]}
unit_ablations: 4
verify: 3
"""
N_CELLS = 2 * 2 * 4 * 2  # prompts, layers, heads, factors

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, from its folder."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / EXAMPLE.name
    shutil.copytree(EXAMPLE, source)  # pip builds in the folder that it is given
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(folder), str(source)], check=True, timeout=120)
    return folder


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Command:
    add_model(tmp_path / "cache", "tiny/llama", LLAMA, tensors=llama_shapes(LLAMA))
    (tmp_path / "job.yaml").write_text(JOB)

    def run(*arguments: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), *([str(site)] if installed else [])]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": os.pathsep.join(paths), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=170,
        )

    return run


def raymi_run(store: str, *more: str) -> list[str]:
    return ["-m", "raymi", "run", "job.yaml", "--store", store, "--cache-dir", "cache", *more]


def test_the_example_is_short():
    lines = [line for file in EXAMPLE.rglob("*.py") for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 60


@pytest.mark.oracle
def test_a_job_of_a_kind_that_raymi_does_not_have(command: Command, tmp_path: Path):
    done = command(*raymi_run("store", "--inline"))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "store", command)
    assert found.height == found["ablation_id"].n_unique() == N_CELLS
    _check_against_hooks(found.to_dicts(), tmp_path / "cache")
    assert "nothing to do" in command(*raymi_run("store", "--inline")).stdout
    report = command("-m", "raymi", "report", "--store", "store")
    assert f"{N_CELLS} ablations" in report.stdout
    assert "logit diff by layer and head" in report.stdout
    # What is verified is verified: three cells, by full forwards.
    verified = json.loads(command("-m", "raymi", "report", "--store", "store", "--json").stdout)["models"][0]
    assert (verified["verified"], verified["agreed"]) == (3, 3)
    # Where the package is missing, the job is refused, and the store is read but for those rows.
    without = command(*raymi_run("store", "--inline"), installed=False)
    assert without.returncode == 2
    assert "found 'scale'; allowed: knockout, sae" in without.stderr
    bare = command("-m", "raymi", "report", "--store", "store", installed=False)
    assert bare.returncode == 0, bare.stderr
    assert "no kind 'scale' is installed" in bare.stdout


def _check_against_hooks(rows: list[dict], cache: Path) -> None:
    """Every row beside a forward of the untouched model, in which a plain hook scales what the projection is given."""
    from transformers import AutoModelForCausalLM

    [snapshot] = (cache / "models--tiny--llama" / "snapshots").iterdir()
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
    width = model.config.hidden_size // model.config.num_attention_heads
    tokens = {row["prompt_id"]: row for row in rows}
    assert set(tokens) == {"france", "spain"}
    effects = set()
    for row in rows:
        ids_1T = torch.tensor([row["token_ids"]])
        head, factor = slice(row["head"] * width, (row["head"] + 1) * width), row["factor"]

        def scaled(_, args, head=head, factor=factor):
            z_1TD = args[0].clone()
            z_1TD[:, -1, head] *= factor
            return (z_1TD,)

        with torch.no_grad():
            clean = model(ids_1T).logits[0, -1].double()
            handle = model.model.layers[row["layer"]].self_attn.o_proj.register_forward_pre_hook(scaled)
            changed = model(ids_1T).logits[0, -1].double()
            handle.remove()
        log_p, log_q = clean.log_softmax(0), changed.log_softmax(0)
        kl = float((log_p.exp() * (log_p - log_q)).sum())
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
        token = row["answer_id"]
        assert row["logit_diff"] == pytest.approx(float(clean[token] - changed[token]), rel=1e-3, abs=1e-6)
        effects.add(round(kl, 12))
    assert len(effects) > N_CELLS // 2, "cells do different things"


def rows(store: Path, command: Command) -> pl.DataFrame:
    """Read by a process that has the package; with the tokens of their prompts."""
    code = (
        "import raymi.store; s = raymi.store.open('" + str(store) + "');"
        "s.scan('scalings').join(s.scan('prompts').select('prompt_id', 'token_ids'), on='prompt_id')"
        ".collect().write_json('rows.json')"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    return pl.read_json(store.parent / "rows.json")


@pytest.mark.slow
def test_on_ray_killed_and_gone_on_with(command: Command, tmp_path: Path):
    killed = command(str(VICTIM), "driver", "3", "pids", "--", *raymi_run("store")[2:])
    assert killed.returncode == -9, killed.stdout + killed.stderr
    done = command(*raymi_run("store"))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = command(*raymi_run("whole", "--inline"))
    assert whole.returncode == 0, whole.stderr
    found, expected = (rows(tmp_path / store, command).sort("ablation_id") for store in ("store", "whole"))
    assert found["ablation_id"].to_list() == expected["ablation_id"].to_list()
    assert found["kl"].to_list() == pytest.approx(expected["kl"].to_list(), rel=1e-3, abs=1e-9)


# -- what cannot be had ------------------------------------------------------------------------------------------------


class _Point:
    """As `importlib.metadata` has it."""

    def __init__(self, name: str, package: str, found: object) -> None:
        self.name, self.value, self.found = name, f"{package}.spec:KIND", found
        self.dist = type("Dist", (), {"name": package})

    def load(self) -> object:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def install(*points: _Point) -> None:
        monkeypatch.setattr(kinds, "entry_points", lambda group: list(points))
        kinds._found.cache_clear()

    yield install
    monkeypatch.undo()
    kinds._found.cache_clear()


def kind(name: str, **fields: object) -> Kind:
    own = kinds.kinds()["knockout"]
    return Kind(name, own.spec, fields.get("tables", {}), running="none")  # pyright: ignore[reportArgumentType]


def test_two_packages_with_one_name(installed: Callable[..., None]):
    installed(_Point("scale", "one", kind("scale")), _Point("scale", "two", kind("scale")))
    [found] = kinds.unusable()
    assert "one and two both bring a kind of that name" in found.why
    assert "scale" not in kinds.kinds()
    installed(_Point("sae", "mine", kind("sae")))
    assert "raymi and mine both bring" in kinds.unusable()[0].why
    assert kinds.package("sae") == "raymi"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (ImportError("no module named numba"), "ImportError: no module named numba"),
        ("no kind", "is no raymi.experiments.kind.Kind"),
        (kind("other"), "calls itself 'other'"),
        (kind("mine", tables=kinds.kinds()["knockout"].tables), "its table 'ablations' is one of the kind 'knockout'"),
    ],
)
def test_what_cannot_be_used_is_said_and_the_rest_goes_on(found: object, why: str, installed: Callable[..., None]):
    installed(_Point("mine", "theirs", found), _Point("good", "ours", kind("good")))
    [unusable] = kinds.unusable()
    assert why in unusable.why
    assert set(kinds.kinds()) == {"knockout", "sae", "good"}
    assert kinds.package("good") == "ours"


def test_what_the_documentation_shows_is_the_example():
    shown = [part.split("```")[0] for part in (ROOT / "docs" / "kinds.md").read_text().split("```python\n")[1:]]
    code = "".join(file.read_text() for file in EXAMPLE.rglob("*.py"))
    assert shown
    assert all(part in code for part in shown)
