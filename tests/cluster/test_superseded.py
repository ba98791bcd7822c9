"""Stored units that the plan does not name any more: noted with the reason, and only those."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import raymi.store
from raymi.cluster.superseded import StoredUnit, notices, reason
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.knockout.spec import Ablation
from raymi.experiments.unit import Unit
from raymi.report import tables
from raymi.report.saes import METRICS
from tests.cli.test_run import JOB, PARIS, ROME, Run, folder, run, write_job  # noqa: F401
from tests.fakes import add_model, write_sae

SAE = SaeRef("org/sae", "org/sae@1", "1" * 40, "blocks.0.mlp.hook_out", None, 8)


def unit(*work: Any, unit_id: str = "now", experiment: str = "e") -> Unit:
    return Unit(unit_id, experiment, (("p", work),), 0)


def stored(heads: dict[int, set[int]] | None = None, saes: Any = (), **more: Any) -> StoredUnit:
    cells = frozenset((layer, head) for layer, its in (heads or {}).items() for head in its)
    table, facts = ("sae_quality", frozenset(saes)) if saes else ("ablations", cells)
    return StoredUnit("e", frozenset({"p"}), table, facts, **more)


def rows(table: str) -> pl.DataFrame:
    return raymi.store.open("store").scan(table).collect()


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            stored(saes=[("org/sae", "1" * 40, "blocks.0.hook_mlp_out")]),
            SAE,
            "measured at blocks.0.hook_mlp_out, and belongs at blocks.0.mlp.hook_out",
        ),
        (
            stored(saes=[("org/sae", "2" * 40, SAE.site)]),
            SAE,
            "measured as of 222222222222, and is now at 111111111111",
        ),
        (stored(saes=[("org/other", "1" * 40, SAE.site)]), SAE, "org/other is not among the autoencoders"),
        (stored({0: {0, 7}}), Ablation((0,), (0,), ((1, 0),)), "layer 0 has 1 heads to cut, without head 7"),
        (stored({0: {0}}), Ablation((0,), (0,), ((1, 0),)), "cut into other units"),
    ],
)
def test_the_reason_is_said(was: StoredUnit, now: Any, said: str):
    assert said in reason(was, [unit(now)])


def test_only_what_is_planned_otherwise_is_noted():
    planned, ask = [unit(SAE)], {"experiments": ["e"], "wanted": ["p"]}
    assert notices({"now": stored()}, planned, **ask) == []
    [found] = notices({"old": stored()}, planned, **ask)
    assert (found["unit_id"], found["experiment"]) == ("old", "e")
    # Of an experiment or prompts that the job has not, nothing is known.
    assert notices({"old": stored()}, planned, **(ask | {"experiments": ["other"]})) == []
    assert notices({"old": stored()}, planned, **(ask | {"wanted": ["q"]})) == []
    # It is noted once, and once more when it comes back.
    assert notices({"old": stored(superseded=True)}, planned, **ask) == []
    [back] = notices({"now": stored(superseded=True)}, planned, **ask)
    assert back["why"] is None


def test_a_run_notes_what_it_plans_otherwise_now(run: Run, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    add_model(Path("cache"), "org/one")
    assert run().code == 0
    before = rows("ablations")
    # As if what units are made of had changed: all of them have other names.
    monkeypatch.setattr("raymi.plan.units.UNIT_VERSION", 99)
    said = run()
    assert said.code == 0, said.err
    noted = rows("superseded")
    assert set(noted["unit_id"]) == set(before["unit_id"])
    assert set(noted["revision"]) == set(before["revision"])
    assert rows("ablations").height == 2 * before.height
    report = tables.report(raymi.store.open("store"))
    assert report.models["ablations"].to_list() == [before.height]
    assert report.left_out.superseded["rows"].sum() == before.height
    assert "not planned any more" in said.out
    assert run().code == 0
    assert rows("superseded").height == noted.height, "once is enough"


def test_sums_over_prompts_are_over_those_that_the_job_has(run: Run):  # noqa: F811
    """Out of a sum none can be taken: it is made anew, and the old one counts again when its prompts are back."""
    add_model(Path("cache"), "org/one", scale=0.5)
    write_sae(Path("saes"), "blocks.1.hook_resid_pre", model="org/one")
    more = "  - {kind: sae, measure: quality, name: sums, saes: saes}\n"
    lima, long = "{id: lima, text: The capital of Peru is}", "{id: long, text: The capital of Peru is in the}"
    job = lambda *prompts: Path("job.yaml").write_text(  # noqa: E731
        JOB.format(models="org/*", prompts=", ".join(prompts)).replace("unit_ablations", more + "unit_ablations")
    )
    numbers = ["texts", "tokens", *METRICS]
    quality = lambda: tables.report(raymi.store.open("store")).saes.quality.select(numbers).to_dicts()  # noqa: E731
    job(PARIS, ROME, lima, long)
    assert run().code == 0
    [whole] = quality()
    assert whole["texts"] == 4
    # As it is of these alone, in a store of their own.
    job(PARIS, lima)
    assert run("--store", "other").code == 0
    [alone] = tables.report(raymi.store.open("other")).saes.quality.select(numbers).to_dicts()
    said = run()
    assert said.code == 0, said.err
    assert quality() == [pytest.approx(alone, rel=1e-9)]
    assert "sums are over prompts of which the job has some no longer" in " ".join(said.out.split())
    # The unit of just `long` as well: what is left of its row is said.
    assert tables.report(raymi.store.open("store")).left_out.superseded["units"].to_list() == [2]
    assert "nothing to do" in run().out
    # A few of the job's prompts are not all that it has.
    assert "nothing to do" in run("--limit", "1").out
    assert quality() == [pytest.approx(alone, rel=1e-9)]
    job(ROME, long, PARIS, lima)
    said = run()
    assert "nothing to do" in said.out
    assert quality() == [pytest.approx(whole, rel=1e-9)]


def test_nothing_is_superseded_by_less(run: Run):  # noqa: F811
    add_model(Path("cache"), "org/one")
    add_model(Path("cache"), "org/two")
    write_job(prompts=[PARIS, ROME])
    assert run().code == 0
    write_job(prompts=[PARIS])
    for less in ((), ("--models", "org/two"), ("--set", "unit_ablations=3"), ("--set", "engine=full")):
        assert run(*less).code == 0
    assert rows("superseded").is_empty()


def test_a_job_that_is_refused_is_none_of_the_run(run: Run):  # noqa: F811
    add_model(Path("cache"), "org/one")
    write_job(prompts=[PARIS, ROME])
    assert run().code == 0
    before = raymi.store.open("store").find()
    write_job(prompts=[PARIS.replace("France", "Spain"), "{id: lima, text: The capital of Peru is}"])
    said = run()
    assert said.code == 2
    assert "'paris' is not what it was" in said.err
    assert raymi.store.open("store").find() == before
    assert tables.report(raymi.store.open("store")).models["prompts"].to_list() == [2]
    # What it brought may be written otherwise.
    write_job(prompts=[PARIS, "{id: lima, text: The capital of Peru is in}"])
    assert run().code == 0


def test_a_unit_of_prompts_that_the_job_has_lost_is_no_open_failure(run: Run, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    from raymi.cluster.worker import Worker

    add_model(Path("cache"), "org/one")
    write_job(prompts=[PARIS, ROME])
    whole = Worker._measure

    def fails_for_rome(self: Worker, unit: Any) -> Any:
        if any(prompt_id == "rome" for prompt_id, _ in unit.items):
            raise RuntimeError("not today")
        return whole(self, unit)

    failures = lambda: tables.report(raymi.store.open("store")).failures["message"].to_list()  # noqa: E731
    monkeypatch.setattr(Worker, "_measure", fails_for_rome)
    assert run().code == 1
    assert failures() == ["not today"] * 2
    # What is not taken this time stays what it is.
    assert run("--limit", "1").code == 0
    assert failures() == ["not today"] * 2
    write_job(prompts=[PARIS])
    assert run().code == 0
    assert failures() == []
    write_job(prompts=[ROME, PARIS])
    assert run().code == 1
    assert failures() == ["not today"] * 2
    monkeypatch.setattr(Worker, "_measure", whole)
    assert run().code == 0
    assert failures() == []
    assert tables.report(raymi.store.open("store")).models["ablations"].to_list() == [16]
