"""Stored units that the plan does not name any more: which they are, and why, in words."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from raymi.experiments import kinds
from raymi.experiments.kind import Facts
from raymi.experiments.unit import Unit
from raymi.store.reader import Store
from raymi.store.schemas import UNIT_TABLES


@dataclass(frozen=True, slots=True)
class StoredUnit:
    """A unit as its rows tell of it."""

    experiment: str
    prompts: frozenset[str]
    """Ids; empty where rows do not say them (sums over texts)."""
    table: str
    """Where they are."""
    facts: Facts
    """What they hold of the columns that the table's kind knows units by."""
    superseded: bool = False
    """As last noticed."""


def stored_units(store: Store, run: str) -> dict[tuple[str, str], dict[str, StoredUnit]]:
    """The units of a run, by model id and revision, and then by their id."""
    notices = store.scan("superseded", run).sort("noticed_at", maintain_order=True).collect()
    gone = {row["unit_id"] for row in notices.iter_rows(named=True) if row["why"] is not None}
    gone -= {
        unit
        for (unit,), its in notices.group_by(["unit_id"], maintain_order=True)
        if its["why"].is_null()[-1]  # it came back
    }
    of_unit = ["model_id", "revision", "experiment", "unit_id"]
    found: dict[tuple[str, str], dict[str, StoredUnit]] = {}
    for table in UNIT_TABLES:
        rows = store.scan(table, run)
        has = rows.collect_schema().names()
        facts = [column for column in kinds.tables()[table].facts if column in has]
        parts: dict[str, pl.Expr] = {}
        if "prompt_id" in has:
            parts["prompts"] = pl.col("prompt_id").unique()
        if facts:
            parts["facts"] = pl.struct(facts).unique()
        for row in rows.group_by(of_unit).agg(**parts).collect().iter_rows(named=True):
            found.setdefault((row["model_id"], row["revision"]), {})[row["unit_id"]] = StoredUnit(
                row["experiment"],
                frozenset(row.get("prompts", ())),
                table,
                frozenset(tuple(each.values()) for each in row.get("facts", ())),
                row["unit_id"] in gone,
            )
    return found


def notices(
    stored: Mapping[str, StoredUnit],
    planned: Sequence[Unit],
    experiments: Collection[str],
    wanted: Collection[str],
    summed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What is to be noted in table `superseded` of one model: experiment, unit_id, why (null: it counts again).

    Args:
        stored: the units in the store, by id.
        planned: all units of the model, those of prompts that the job has no longer among them.
        experiments: names of those that were planned: what is stored of others is left alone.
        wanted: ids of the texts that the job measures: a unit that holds none of them is left alone.
        summed: ids of what would be planned if sums over prompts still held those that the job has no longer.
    """
    ids = {unit.unit_id for unit in planned}
    moment = datetime.now(UTC)
    found: list[dict[str, Any]] = []
    for unit_id, unit in stored.items():
        if unit.experiment not in experiments or (unit_id in ids) == (not unit.superseded):
            continue
        why = None
        if unit_id not in ids:
            if unit.prompts and not unit.prompts & set(wanted):
                continue
            why = reason(unit, [each for each in planned if each.experiment == unit.experiment])
            if unit_id in summed:
                why = "its sums are over prompts of which the job has some no longer"
        found.append({"experiment": unit.experiment, "unit_id": unit_id, "why": why, "noticed_at": moment})
    return found


def reason(unit: StoredUnit, planned: Iterable[Unit]) -> str:
    """Why a unit is not among those that are planned of its experiment."""
    work = [one for each in planned for _, its in each.items for one in its]
    # A unit ends where the rule of cutting says: heads more in one layer move all that come behind.
    return kinds.tables()[unit.table].gone(unit.facts, work) or (
        "what its experiment measures of these prompts has changed, and is cut into other units"
    )
