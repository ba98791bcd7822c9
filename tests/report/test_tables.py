import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import raymi.store
from raymi.report import tables
from raymi.store import schemas
from raymi.store.layout import slug
from raymi.store.reader import Store
from raymi.store.writer import Run
from tests.rows import MODEL, MOMENT, REVISION, cell, failure, loaded, take, verified


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path))


def put(run: Run, *cells: dict[str, Any]) -> None:
    for one in cells:
        run.add("ablations", slug(one["model_id"]), schemas.rows("ablations", [one]))


def only(frame: pl.DataFrame) -> dict[str, Any]:
    (row,) = frame.to_dicts()
    return row


def test_a_model_is_summed_up(store: Store) -> None:
    with take(store) as run:
        run.manifest.freeze_commits({MODEL: REVISION})
        run.add("models", "m", loaded(load_seconds=9.0, loaded_at=MOMENT + timedelta(hours=1)))
        run.add("models", "m", loaded(load_seconds=1.0))
        put(
            run,
            cell("a", 0, 0, prompt_id="p", kl=0.1, logit_diff=1.0, answer_prob_clean=0.5, answer_rank_clean=0),
            cell("b", 0, 1, prompt_id="p", kl=0.2, logit_diff=None, answer_prob_clean=0.5, answer_rank_clean=0),
            cell("c", 0, 0, prompt_id="q", kl=0.3, logit_diff=4.0, answer_prob_clean=0.1, answer_rank_clean=3),
            cell("d", 2, 1, prompt_id="q", kl=0.25, logit_diff=-2.0, answer_prob_clean=0.1, answer_rank_clean=3),
        )
        run.close("done")
    row = only(tables.report(store).models)
    assert (row["model_id"], row["experiment"], row["ablations"], row["prompts"]) == (MODEL, "heads", 4, 2)
    assert math.isclose(row["mean_kl"], 0.2125)
    assert row["max_kl"] == 0.3
    assert row["mean_logit_diff"] == 1.0
    # 0.25 in the one prompt that has it beats the mean of 0.1 and 0.3.
    assert (row["strongest_layers"], row["strongest_heads"], row["strongest_kl"]) == ("2", "1", 0.25)
    assert math.isclose(row["answer_prob"], 0.3)
    assert row["answer_top1"] == 0.5
    assert row["load_seconds"] == 9.0
    assert row["failures"] == 0


def test_layers_are_grouped_as_they_were_ablated_together(store: Store) -> None:
    def window(unit: str, layers: list[int], kl: float) -> dict[str, Any]:
        return cell(unit, 0, None, layers=layers, layer=None, ablation_id=unit, kl=kl)

    with take(store) as run:
        put(run, *(window(str(at), list(range(max(0, at - 1), at + 2)), float(at)) for at in range(11)))
        put(run, window("gap", [1, 5], 20.0), window("gap2", [1, 5], 40.0))
        run.close("done")
    layers = tables.report(store).layers
    assert layers["layers"].to_list() == [
        "0-1",
        "0-2",
        "1-3",
        "1,5",
        "2-4",
        "3-5",
        "4-6",
        "5-7",
        "6-8",
        "7-9",
        "8-10",
        "9-11",
    ]
    row = only(layers.filter(pl.col("layers") == "1,5"))
    assert (row["ablations"], row["mean_kl"], row["max_kl"]) == (2, 30.0, 40.0)
    assert only(tables.report(store).models)["strongest_heads"] == "all"


def test_experiments_are_not_mixed(store: Store) -> None:
    with take(store) as run:
        put(run, cell("a", 0, kl=1.0), cell("b", 0, kl=3.0, experiment="subject"))
        run.close("done")
    report = tables.report(store)
    assert report.models.select("experiment", "mean_kl").rows() == [("heads", 1.0), ("subject", 3.0)]
    assert report.layers.select("experiment", "mean_kl").rows() == [("heads", 1.0), ("subject", 3.0)]


def test_rows_that_stand_twice_for_an_instant_count_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with take(store) as run:
        put(run, cell("a", 0, kl=1.0), cell("b", 1, kl=3.0))
        run.flush()
        once = store.scan
        monkeypatch.setattr(
            store, "scan", lambda *asked, **more: pl.concat([once(*asked, **more)] * (1 + (asked[0] == "ablations")))
        )
        row = only(tables.report(store).models)
    assert (row["ablations"], row["mean_kl"]) == (2, 2.0)


def test_models_of_which_nothing_was_measured_are_there(store: Store) -> None:
    with take(store) as run:
        run.manifest.freeze_commits({"org/waiting": "r"})
        run.add("failures", None, failure("org/broken"))
        put(run, cell("a", 0))
        run.close("failed")
    models = tables.report(store).models
    assert models.select("model_id", "ablations", "failures").rows() == [
        ("org/broken", 0, 1),
        (MODEL, 1, 0),
        ("org/waiting", 0, 0),
    ]


def unit_failed(unit: str, **more: Any) -> pa.Table:
    return failure(stage="unit", unit_id=unit, **more)


LATER = MOMENT + timedelta(minutes=1)


@pytest.mark.parametrize(
    ("rows", "status", "failed"),
    [
        ([("failures", unit_failed("u"))], "failed", [("u", 1)]),
        ([("failures", unit_failed("u", message=m)) for m in ("one", "two")], "failed", [("u", 2)]),
        ([("failures", unit_failed("u")), ("ablations", cell("u", 0))], "failed", []),
        ([("failures", unit_failed("u")), ("ablations", cell("other", 0))], "failed", [("u", 1)]),
        ([("failures", failure())], "failed", [(None, 1)]),
        ([("failures", failure()), ("models", loaded(loaded_at=LATER))], "failed", []),
        ([("failures", failure(failed_at=LATER)), ("models", loaded())], "failed", [(None, 1)]),
        ([("failures", failure()), ("models", loaded("org/other", loaded_at=LATER))], "failed", [(None, 1)]),
        ([("failures", failure(stage="replica", failed_at=LATER)), ("models", loaded())], "done", []),
    ],
    ids=[
        "a unit",
        "a unit twice",
        "a unit that came through later",
        "another unit came through",
        "a load",
        "a load that came through later",
        "a load that failed after one that did not",
        "another model was loaded",
        "a replica whose work others did",
    ],
)
def test_what_was_mended_is_no_longer_a_failure(
    store: Store, rows: list[tuple[str, Any]], status: Any, failed: list[tuple[str | None, int]]
) -> None:
    with take(store) as run:
        for table, data in rows:
            run.add(table, "m", schemas.rows(table, [data]) if isinstance(data, dict) else data)
        run.close(status)
    report = tables.report(store)
    assert report.failures.select("unit_id", "attempts").rows() == failed
    assert report.models["failures"].sum() == len(failed)
    assert tables.runs(store)["failures"].to_list() == [len(failed)]


def test_runs_say_how_they_stand(store: Store) -> None:
    take(store, "done-1").close("done")
    take(store, "failed-1").close("failed")
    with take(store, "stopped-1") as run:
        run.manifest.freeze_commits({MODEL: REVISION, "org/other": "r"})
        put(run, cell("a", 0), cell("b", 0))
    killed = take(store, "killed-1")
    killed._heart.stop()
    killed.manifest.driver.process_started = 1.0
    killed.save()
    with take(store, "running-1"):
        runs = tables.runs(store)
        assert tables.report(store).driven
    assert runs.select("run", "status").rows() == [
        ("done-1", "done"),
        ("failed-1", "failed"),
        ("stopped-1", "stopped"),
        ("killed-1", "stopped"),
        ("running-1", "running"),
    ]
    row = only(runs.filter(pl.col("run") == "stopped-1"))
    assert (row["models"], row["measured"]) == (2, 2)
    assert row["last_write"] >= row["started"]


def test_an_empty_run_has_empty_tables(store: Store) -> None:
    with take(store):
        report = tables.report(store)
    assert report.models.is_empty()
    assert report.layers.is_empty()
    assert report.failures.is_empty()
    with take(store) as run:
        put(run, cell("a", 0))
        run.flush()
        full = tables.report(store)
    assert report.models.schema == full.models.schema
    assert report.layers.schema == full.layers.schema


def test_files_that_were_merged_meanwhile_are_looked_up_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = take(store)
    for unit in ("a", "b", "c"):
        put(run, cell(unit, 0))
        run.flush()
    scan = store.scan
    left = iter([run])

    def merged_after_planning(table: str, name: str, **more: Any) -> pl.LazyFrame:
        frame = scan(table, name, **more)
        if table == "ablations" and (late := next(left, None)):
            late.close("done")
        return frame

    monkeypatch.setattr(store, "scan", merged_after_planning)
    assert only(tables.report(store).models)["ablations"] == 3


# -- what was measured twice -------------------------------------------------------------------------------------------


def after(minutes: float) -> Any:
    return MOMENT + timedelta(minutes=minutes)


def tried(minutes: float, *verifications: pa.Table, good: bool) -> list[tuple[str, pa.Table]]:
    """A load that ended then, and what was verified at it."""
    end = ("models", loaded(loaded_at=after(minutes))) if good else ("failures", failure(failed_at=after(minutes)))
    return [*(("verifications", each) for each in verifications), end]


BAD, GOOD = (0.25, 0.2, 0.01), (0.01, 0.02, 0.001)


@pytest.mark.parametrize(
    ("loads", "rows", "line", "differed"),
    [
        (tried(1, verified("cone", *GOOD), good=True), ["cone"], (3, 3, 0.02), []),
        (
            tried(1, verified("cone", *BAD), verified("full", *GOOD), good=True),
            ["full"],
            (3, 3, 0.02),
            [("cone", "full", 1, 3, 2, 0.25)],
        ),
        (
            [
                *tried(1, verified("cone", *BAD), good=False),
                *tried(3, verified("cone", *GOOD, measured_at=after(2)), good=True),
            ],
            ["cone"],
            (3, 3, 0.02),
            [("cone", "failed", 1, 3, 2, 0.25)],
        ),
        (
            [
                *tried(1, verified("cone", *GOOD), good=True),
                *tried(3, verified("cone", *BAD, measured_at=after(2)), good=False),
            ],
            ["cone"],
            (3, 3, 0.02),
            [("cone", "failed", 1, 3, 2, 0.25)],
        ),
        (
            [
                *tried(1, verified("cone", *BAD), good=False),
                *tried(
                    3,
                    verified("cone", *BAD, measured_at=after(2)),
                    verified("full", 0.5, measured_at=after(2)),
                    good=False,
                ),
            ],
            [],
            (None, None, None),
            [("cone", "failed", 2, 6, 4, 0.25), ("full", "failed", 1, 1, 1, 0.5)],
        ),
        (
            [
                *tried(1, verified("cone", *GOOD), good=True),
                *tried(
                    3,
                    verified("cone", *BAD, measured_at=after(2)),
                    verified("full", *GOOD, measured_at=after(2)),
                    good=True,
                ),
            ],
            ["cone", "full"],
            (6, 6, 0.02),
            [("cone", "full", 1, 3, 2, 0.25)],
        ),
        (
            [
                *tried(2, verified("cone", *GOOD), good=True),
                *tried(2.5, verified("cone", *GOOD, measured_at=after(1.5)), good=True),
                *tried(3, verified("cone", 0.005, measured_at=after(2.2)), good=True),
            ],
            ["cone"],
            (7, 7, 0.02),
            [],
        ),
        (
            tried(1, verified("cone", *GOOD), verified("layers", 0.01), verified("full", 0.02), good=True),
            ["cone"],
            (5, 5, 0.02),
            [],
        ),
        (
            [
                *tried(2, verified("cone", *GOOD), good=True),
                *tried(3, verified("cone", 0.25, measured_at=after(1)), good=False),
            ],
            ["cone"],
            (3, 3, 0.02),
            [("cone", "failed", 1, 1, 1, 0.25)],
        ),
    ],
    ids=[
        "all agreed",
        "gave way to full forwards",
        "failed, and was good later",
        "was good, and failed later",
        "failed twice",
        "was good, and later gave way to full forwards",
        "three replicas, two of them at once",
        "experiments that go different ways",
        "two replicas at once, one of which failed",
    ],
)
def test_a_model_s_line_has_what_its_rows_rest_on(
    store: Store, loads: list[tuple[str, pa.Table]], rows: list[str], line: Any, differed: list[Any]
) -> None:
    with take(store) as run:
        run.manifest.freeze_commits({MODEL: REVISION})
        put(run, *(cell(engine, 0, engine=engine) for engine in rows))
        run.add("verifications", "other", verified("cone", 0.03, 0.125, model="org/other"))
        run.add("models", "other", loaded("org/other"))
        for table, data in loads:
            run.add(table, slug(MODEL), data)
        run.close("failed")
    report = tables.report(store)
    row = only(report.models.filter(model_id=MODEL))
    assert (row["verified"], row["agreed"], row["verified_error"]) == line
    found = report.mismatches.filter(model_id=MODEL)
    asked = ["engine", "then", "attempts", "verified", "differed", "max_logit_diff"]
    assert found.select(asked).rows() == differed


def test_without_verifications_there_is_nothing_that_differs(store: Store) -> None:
    with take(store) as run:
        put(run, cell("a", 0))
        run.close("done")
    report = tables.report(store)
    assert only(report.models)["verified"] is None
    assert report.mismatches.is_empty()
