"""What a store holds and a report does not count, and models that have one id."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import raymi.store
from raymi.cli.report import lines
from raymi.report import tables
from raymi.store import schemas
from raymi.store.layout import slug
from raymi.store.reader import Store
from raymi.store.writer import Run
from tests.rows import MODEL, MOMENT, REVISION, cell, failure, loaded
from tests.sae_rows import Tokens, injected

OTHER = "1" * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path))


def take(store: Store, *prompts: str, experiments: list[dict[str, Any]] | None = None) -> Run:
    resolved = {"name": "heads", "prompts": [{"id": each} for each in prompts], "experiments": experiments or []}
    return store.take("heads-1a2b3c4d", written="name: heads\n", resolved=resolved)


def put(run: Run, table: str, *rows: dict[str, Any]) -> None:
    for row in rows:
        run.add(table, slug(MODEL), schemas.rows(table, [row]))


def text(store: Store, *, everything: bool = False) -> str:
    return "\n".join(lines(tables.report(store, everything=everything), 0))


def test_two_checkpoints_of_one_id_are_two_models(store: Store) -> None:
    with take(store, "p") as run:
        run.manifest.freeze_commits({f"{MODEL}@main": REVISION, f"{MODEL}@step1": OTHER})
        put(run, "ablations", cell("a", 0, prompt_id="p", kl=0.000133))
        put(run, "ablations", cell("b", 0, prompt_id="p", kl=0.002088, revision=OTHER))
        run.add("models", "m", loaded())
        run.add("failures", "m", failure(revision=OTHER, failed_at=MOMENT + timedelta(hours=1)))
        put(
            run, "events", {"model_id": MODEL, "revision": OTHER, "kind": "full", "message": "m", "happened_at": MOMENT}
        )
        put(run, "events", {"model_id": MODEL, "kind": "full", "message": "of whom?", "happened_at": MOMENT})
    report = tables.report(store)
    models = {row["revision"]: row for row in report.models.drop_nulls("experiment").to_dicts()}
    assert {revision: row["mean_kl"] for revision, row in models.items()} == {REVISION: 0.000133, OTHER: 0.002088}
    assert all("@" not in name for name in report.models["model_id"])
    # One of them failed after the other had been loaded.
    assert report.failures["revision"].to_list() == [OTHER]
    assert (models[REVISION]["failures"], models[OTHER]["failures"]) == (0, 1)
    # An event that does not say the revision belongs to neither of two.
    assert (models[REVISION]["fallbacks"], models[OTHER]["fallbacks"]) == (0, 1)
    shown = text(store)
    assert f"{MODEL}@{REVISION[:7]}" in shown
    assert f"{MODEL}@{OTHER[:7]}" in shown


def test_an_event_without_revision_is_the_only_revision_s(store: Store) -> None:
    with take(store, "p") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p"))
        put(run, "events", {"model_id": MODEL, "kind": "full", "message": "old", "happened_at": MOMENT})
    assert tables.report(store).models["fallbacks"].to_list() == [1]


def test_dtypes_are_not_mixed(store: Store) -> None:
    with take(store, "p") as run:
        put(
            run,
            "ablations",
            cell("a", 0, prompt_id="p", kl=0.25),
            cell("b", 0, prompt_id="p", kl=0.75, dtype="bfloat16"),
        )
    found = tables.report(store).models
    assert dict(found.select("dtype", "mean_kl").iter_rows()) == {"float32": 0.25, "bfloat16": 0.75}


def test_prompts_that_the_job_has_no_longer_count_only_when_asked_for(store: Store) -> None:
    with take(store, "p", "gone") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p", kl=0.25), cell("b", 0, prompt_id="gone", kl=0.75))
        put(
            run,
            "ablations",
            cell("c", 0, prompt_id="gone [without BOS]", kl=0.75),
            cell("d", 0, prompt_id="c/7", kl=0.25),
        )
    take(store, "p").__enter__().close("done")
    report = tables.report(store)
    assert (report.models["ablations"].to_list(), report.models["mean_kl"].to_list()) == ([2], [0.25])
    assert report.left_out.prompts.to_dicts() == [
        {"prompt_id": "gone", "rows": 1},
        {"prompt_id": "gone [without BOS]", "rows": 1},
    ]
    assert "--all counts them" in text(store)
    whole = tables.report(store, everything=True)
    assert (whole.models["ablations"].to_list(), whole.models["mean_kl"].to_list()) == ([4], [0.5])
    assert "--all" not in text(store, everything=True)


def test_superseded_units_leave_the_means_and_are_said_with_the_reason(store: Store) -> None:
    about = {"model_id": MODEL, "revision": REVISION, "experiment": "heads"}
    with take(store, "p") as run:
        put(run, "ablations", cell("old", 0, prompt_id="p", kl=8.0), cell("new", 0, prompt_id="p", kl=0.5))
        put(run, "ablations", cell("back", 1, prompt_id="p", kl=0.25))
        why = {**about, "why": "layer 0 has 8 heads", "noticed_at": MOMENT}
        put(run, "superseded", {**why, "unit_id": "old"}, {**why, "unit_id": "back"})
        put(run, "superseded", {**why, "unit_id": "back", "why": None, "noticed_at": MOMENT + timedelta(hours=1)})
    report = tables.report(store)
    assert report.models["mean_kl"].to_list() == [0.375]
    assert report.left_out.superseded.select("units", "rows", "why").rows() == [(1, 1, "layer 0 has 8 heads")]
    assert report.measured == 2
    assert "1 row of work that is not planned any more: layer 0 has 8 heads" in text(store)


def test_a_superseded_unit_of_a_former_prompt_is_said_once(store: Store) -> None:
    with take(store, "p", "gone") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p"), cell("old", 0, prompt_id="gone"))
        put(run, "ablations", cell("b", 0, prompt_id="gone"))
        gone = {"model_id": MODEL, "revision": REVISION, "experiment": "heads", "unit_id": "old", "why": "y"}
        put(run, "superseded", gone | {"noticed_at": MOMENT})
    take(store, "p").__enter__().close("done")
    report = tables.report(store)
    assert report.left_out.prompts.rows() == [("gone", 1)]
    assert report.left_out.superseded["rows"].to_list() == [1]
    # --all counts just what the report says that it counts.
    assert tables.report(store, everything=True).models["ablations"].to_list() == [1 + 1]


def test_sums_that_hold_former_prompts_are_said_also_where_nothing_else_is_measured(store: Store) -> None:
    """As an older raymi has gone on with them."""
    sums = Tokens(np.random.default_rng(0), 5).row("a")
    both = [{"name": name, "measure": "quality", "corpus": None, "prompts": ["*"]} for name in ("sums", "right")]
    with take(store, "p", "gone", experiments=both) as run:
        put(run, "sae_quality", {**sums, "experiment": "sums", "texts": 2})
        put(run, "sae_quality", {**sums, "experiment": "right", "unit_id": "b", "texts": 1})
    take(store, "p", experiments=both).__enter__().close("done")
    assert tables.report(store).left_out.mixed == ["sums"]
    assert "sums: its sums are over prompts of which the job has some no longer" in text(store)
    assert tables.report(store, everything=True).left_out.mixed == []


def test_cells_that_cut_nothing_are_counted_and_stay_out_of_means_and_rankings(store: Store) -> None:
    with take(store, "p") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p", kl=0.0, fired=0, closed=4))
        put(
            run,
            "ablations",
            cell("b", 1, prompt_id="p", kl=0.5, fired=2, closed=2),
            cell("c", 2, prompt_id="p", kl=0.25),
        )
    row = tables.report(store).models.row(0, named=True)
    assert (row["ablations"], row["closed"], row["mean_kl"]) == (3, 1, 0.375)
    layers = tables.report(store).layers
    assert 0.0 not in layers["mean_kl"].to_list()
    assert "1 of 3 ablations cut nothing" in text(store)


def test_answers_are_of_each_experiment_s_prompts(store: Store) -> None:
    with take(store, "p", "q") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p", answer_prob_clean=0.5, answer_rank_clean=0))
        other = {"experiment": "others", "prompt_id": "q", "answer_prob_clean": 0.1, "answer_rank_clean": 3}
        put(run, "ablations", cell("b", 0, **other))
    answers = tables.report(store).answers.select("experiment", "prompts", "answer_prob", "answer_top1")
    assert answers.rows() == [("heads", 1, 0.5, 1.0), ("others", 1, 0.1, 0.0)]
    assert "by the prompts of each experiment" in text(store)


def test_a_model_without_knockouts_has_the_answers_of_its_only_experiment(store: Store) -> None:
    about = {"answer_prob_clean": 0.5, "answer_rank_clean": 0}
    with take(store, "p", "q") as run:
        put(run, "sae_injections", injected(5.0, "p", unit_id="a", experiment="one", **about))
    [model] = tables.report(store).models.to_dicts()
    assert (model["experiment"], model["prompts"], model["answer_prob"], model["answer_top1"]) == (None, 1, 0.5, 1.0)
    with take(store, "p", "q") as run:
        put(
            run,
            "sae_injections",
            injected(5.0, "q", unit_id="b", experiment="two", **(about | {"answer_prob_clean": 0.1})),
        )
    # Of two, neither is all.
    assert tables.report(store).models["answer_prob"].to_list() == [None]


def test_rows_of_several_testbeds_are_said(store: Store) -> None:
    with take(store, "p") as run:
        put(run, "ablations", cell("a", 0, prompt_id="p", testbed="one"), cell("b", 1, prompt_id="p", testbed="two"))
        put(run, "ablations", cell("c", 2, prompt_id="p"))
    # Where rows of older versions were measured is not known: they count as one more.
    assert tables.report(store).models["testbeds"].to_list() == [3]
    assert "3 testbeds" in text(store)


def test_tables_of_models_with_one_id_can_be_joined(store: Store) -> None:
    with take(store, "p") as run:
        put(
            run,
            "ablations",
            *(cell(f"{r}{d}", 0, prompt_id="p", revision=r, dtype=d) for r in (REVISION, OTHER) for d in "ab"),
        )
    report = tables.report(store)
    key = ["model_id", "revision", "dtype"]
    assert report.models.select(key).is_unique().all()
    assert report.layers.join(report.models, on=key, how="inner").height == report.layers.height == 4
    assert isinstance(report.answers, pl.DataFrame)
