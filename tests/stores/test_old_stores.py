"""What an older raymi has left half-finished is gone on with: no row twice, old rows as they were, the rest as ever."""

import sys
import tarfile
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal

import raymi.store
from raymi.cli.main import main
from raymi.store.schemas import UNIT_TABLES
from tests.stores.write_old_stores import OLD

HERE = Path(__file__).parent
CELLS = {
    "ablations": ["unit_id", "ablation_id"],
    "sae_injections": ["unit_id", "ablation_id"],
    "sae_ablations": ["unit_id", "sae", "site", "prompt_id", "ablation_id"],
    "sae_features": ["unit_id", "sae", "site", "prompt_id", "position"],
    "sae_quality": ["unit_id", "sae", "site"],
}
"""What tells a row from all others."""
HOW = {"changed", "clean_error", "closed", "bos_differs", "testbed", "run", "model"}
"""Columns that two runs need not have alike, nor an older raymi at all. Of tokens that changed alike but for rounding,
either may be first."""


def issue(name: str, store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.chdir(HERE.parents[1])  # what jobs name is relative to their files
    monkeypatch.setattr(sys, "argv", ["raymi", *OLD[name].arguments(name, str(store), str(cache)), *more])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code


@pytest.mark.parametrize(
    "name", ["knockout", "heads", "subject", *(pytest.param(n, marks=pytest.mark.slow) for n in ("demo", "sae"))]
)
def test_a_half_finished_run_of_an_older_raymi_is_gone_on_with(
    name: str, demo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with tarfile.open(HERE / f"{name}.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    store = raymi.store.open(str(folder))
    [before] = store.runs()
    stored = {table: store.scan(table).collect() for table in UNIT_TABLES}
    assert sum(rows.height for rows in stored.values())

    issue(name, folder, demo_cache, monkeypatch)
    issue(name, folder, demo_cache, monkeypatch, "--new")

    old, new = sorted(store.runs(), key=lambda run: run.created_at)
    assert (old.run, new.run) == (before.run, f"{before.run}-2"), "it goes on under its name"
    assert (old.status, new.status) == ("done", "done")
    assert store.scan("superseded", old.run).collect().is_empty(), "all of it is planned still"
    for table, its in stored.items():
        resumed, fresh = (store.scan(table, run.run).collect().sort(CELLS[table]) for run in (old, new))
        assert not resumed.select(CELLS[table]).is_duplicated().any()
        kept = resumed.join(its, on="unit_id", how="semi")
        assert_frame_equal(kept.select(its.columns), its.sort(CELLS[table]))  # to the last bit
        measured = [column for column in fresh.columns if column not in HOW]
        assert_frame_equal(resumed.select(measured), fresh.select(measured), rel_tol=1e-3, abs_tol=1e-4)
    assert store.scan("prompts", old.run).select("model_id", "prompt_id").collect().is_duplicated().sum() == 0
