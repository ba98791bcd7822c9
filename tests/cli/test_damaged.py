"""Stores that were damaged by hand: what is wrong is named with its file and what to do, and the rest is shown."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import raymi.store
from raymi.report import tables
from tests.cli.inline import Shell, one_thread
from tests.fakes import add_model
from tests.rows import add_units, loaded, take
from tests.store.test_damage import DAMAGE, flip, nan

GOOD, OTHER = "heads-1a2b3c4d", "heads-22222222"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, monkeypatch, capfd)


@pytest.fixture
def store(shell: Shell) -> Path:
    """Two runs; of the first, one file with three ablations by each of two models."""
    made = raymi.store.open("store")
    for name in (GOOD, OTHER):
        with take(made, name) as run:
            for model in ("org/tiny", "org/other"):
                run.add("models", model.replace("/", "--"), loaded(model))
                add_units(run, f"{model}-u1", model=model)
            run.flush()
            run.close("done")
    return Path("store")


def one(store: Path, table: str = "ablations", run: str = GOOD, model: str = "org--tiny") -> Path:
    [file] = (store / table / f"run={run}" / f"model={model}").glob("*.parquet")
    return file


def words(text: str) -> str:
    """A message, however it was folded."""
    return " ".join(text.split())


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.__name__) for damage in DAMAGE])
def test_a_report_shows_the_rest(shell: Shell, store: Path, damage: Callable[[Path], str]) -> None:
    file = one(store)
    why = damage(file)
    said = shell("report", GOOD, "--store", "store")
    assert said.code == 0, said.err
    shown = words(said.out)
    assert f"damaged, and left out: {file.absolute()}: {why}" in shown
    assert "Move it out of the store, and the same `raymi run` measures again what it held." in shown
    assert "org/other 3 0.5000" in shown
    assert "Traceback" not in said.err
    record = json.loads(shell("report", GOOD, "--store", "store", "--json").out)
    assert {row["model_id"]: row["ablations"] for row in record["models"]}["org/other"] == 3
    assert why in record["damaged"][0]
    listed = shell("runs", "--store", "store")
    assert listed.code == 0
    assert GOOD in listed.out
    assert OTHER in listed.out


@pytest.mark.parametrize("table", ["models", "ablations"])
def test_any_table_may_be_damaged(shell: Shell, store: Path, table: str) -> None:
    file = one(store, table)
    file.write_bytes(file.read_bytes()[:-20])
    said = shell("report", GOOD, "--store", "store")
    assert said.code == 0, said.err
    assert str(file.absolute()) in words(said.out)
    listed = shell("runs", "--store", "store")
    assert listed.code == 0
    assert GOOD in listed.out
    if table == "ablations":
        assert str(file.absolute()) in listed.err


def test_rows_with_nan_leave_every_mean_and_the_others_of_their_file_stay(shell: Shell, store: Path) -> None:
    nan(one(store))
    report = tables.report(raymi.store.open("store"), GOOD)
    kl = dict(report.models.select("model_id", "mean_kl").iter_rows())
    assert kl == {"org/tiny": 0.5, "org/other": 0.5}
    counts = dict(report.models.select("model_id", "ablations").iter_rows())
    assert counts == {"org/tiny": 2, "org/other": 3}


def test_a_spoilt_page_is_found_when_a_report_stumbles_over_it(shell: Shell, store: Path) -> None:
    flip(one(store))
    report = tables.report(raymi.store.open("store"), GOOD)
    assert "it is no whole Parquet file" in report.damaged[0]
    assert report.models["model_id"].to_list() == ["org/other", "org/tiny"]


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.__name__) for damage in (*DAMAGE, flip)])
def test_one_row_of_the_rest_is_shown(shell: Shell, store: Path, damage: Callable[[Path], str]) -> None:
    file = one(store)
    why = damage(file)
    said = shell("show", GOOD, "--store", "store")
    assert said.code == 0, said.err
    assert f"damaged, and left out: {file.absolute()}: {why}" in said.err
    assert "kl" in said.out


def test_a_damaged_manifest_stops_nothing_else(shell: Shell, store: Path) -> None:
    for file in (store / "runs" / OTHER).rglob("*.json"):
        file.write_text('{"schema_version": 1, "run": 5')
    for arguments in (["runs"], ["report"], ["report", GOOD]):
        said = shell(*arguments, "--store", "store")
        assert said.code == 0, said.err
        assert GOOD in said.out
        assert f"damaged: {store.absolute()}/runs/{OTHER}/manifest.json is not a manifest" in said.err
        assert "Put back a good copy" in said.err
    said = shell("report", OTHER, "--store", "store")
    assert said.code == 2
    assert "is not a manifest" in said.err


def test_a_run_goes_on_beside_damaged_ones_and_refuses_its_own(shell: Shell, store: Path) -> None:
    add_model(Path("cache"), "org/one")
    Path("job.json").write_text(
        json.dumps(
            {
                "name": "job",
                "models": "org/*",
                "prompts": [{"id": "paris", "text": "The capital of France is", "answer": " Paris"}],
                "experiments": [{"kind": "knockout", "layers": {"each": "all"}, "keys": "first"}],
                "verify": 1,
            }
        )
    )
    for file in (store / "runs" / OTHER).rglob("*.json"):
        file.write_text("{")
    one(store, run=GOOD).write_bytes(b"PAR1")
    with one_thread():
        said = shell.run(job="job.json")
        assert said.code == 0, said.err
        assert f"runs/{OTHER}/manifest.json is not a manifest" in said.err
        assert shell.rows is not None
        [run] = [each.run for each in raymi.store.open("store").runs() if each.run.startswith("job-")]
        before = raymi.store.open("store").scan("ablations", run).collect()
        file = one(store, run=run, model="org--one")
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        manifest = (store / "runs" / run / "manifest.json").read_bytes()
        said = shell.run(job="job.json")
        assert said.code == 2, said.err
        assert f"{file.absolute()}: it is no whole Parquet file" in said.err
        assert "Move it out of the store" in said.err
        assert (store / "runs" / run / "manifest.json").read_bytes() == manifest, "a refused command writes nothing"
        file.rename("elsewhere")
        said = shell.run(job="job.json")
        assert said.code == 0, said.err
        again = raymi.store.open("store").scan("ablations", run).collect()
        assert again.select("unit_id", "ablation_id", "kl").equals(before.select("unit_id", "ablation_id", "kl"))
