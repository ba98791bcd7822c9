"""Queries of a store that may be changing, and what rows of every kind have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import polars as pl

from raymi.experiments import kinds
from raymi.fed import fed_id
from raymi.sae.description import MLP_INPUT, NORMALISED
from raymi.store import schemas
from raymi.store.damage import Damage, has_nan
from raymi.store.manifest import Manifest
from raymi.store.reader import Store

MODEL = ("model_id", "revision", "dtype")
"""What rows of units say of the model: those of another revision or dtype are another model's."""

_ATTEMPTS = 5
"""Readings of a store in which files are being merged: what was listed may be gone when it is opened."""


def collect(query: Callable[[], pl.LazyFrame]) -> pl.DataFrame:
    """The rows of a query, planned again when a file that it was to read has been merged into another."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return query().collect()
        except (OSError, pl.exceptions.ComputeError):
            continue
    return query().collect()


@dataclass(frozen=True, slots=True)
class View:
    """The rows of a run that a report counts.

    Args:
        store: where it is.
        run: it.
        everything: also count prompts that the job has no longer.
        damage: what is wrong with its files, which is left out.
    """

    store: Store
    run: Manifest
    everything: bool = False
    damage: Damage = field(default_factory=Damage)
    former: frozenset[str] = field(init=False)
    """Ids of the prompts that the job as last issued has no longer."""

    def __post_init__(self) -> None:
        issued = [{prompt["id"] for prompt in issue.resolved.get("prompts", ())} for issue in self.run.jobs]
        gone = frozenset[str]() if self.everything or not issued else frozenset[str]().union(*issued) - issued[-1]
        former = frozenset(fed_id(prompt_id, bos) for prompt_id in gone for bos in (None, "always", "never"))
        object.__setattr__(self, "former", former)

    def scan(self, table: str) -> pl.LazyFrame:
        """All rows of a table, but damaged ones."""
        rows = self.store.scan(table, self.run.run, without=self.damage.unreadable.keys())
        return rows.filter(~has_nan(table)) if table in self.damage.tables else rows

    def superseded(self) -> pl.LazyFrame:
        """The units that the plan does not name any more: model_id, revision, experiment, unit_id, why."""
        unit = ["model_id", "revision", "experiment", "unit_id"]
        notices = self.scan("superseded").sort("noticed_at", maintain_order=True)
        return notices.group_by(unit, maintain_order=True).agg(pl.col("why").last()).filter(pl.col("why").is_not_null())

    def planned(self, table: str) -> pl.LazyFrame:
        """The rows of units that the plan names, those of former prompts among them."""
        return self.scan(table).join(self.superseded(), on="unit_id", how="anti")

    def units(self, table: str) -> pl.LazyFrame:
        """The rows of units that count."""
        rows = self.planned(table)
        if self.former and "prompt_id" in schemas.SCHEMAS[table].names:
            rows = rows.filter(~pl.col("prompt_id").is_in(list(self.former)))
        return self._renamed(rows) if "site" in schemas.SCHEMAS[table].names else rows

    def _renamed(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """What an MLP is fed was once called by another name, which rows of autoencoders that read it still have."""
        which = ["model_id", "revision", "experiment", "sae"]
        fed = self.scan("saes").filter(pl.col("site").str.ends_with(MLP_INPUT)).select(which).unique()
        now = pl.col("site").str.replace(NORMALISED, MLP_INPUT, literal=True)
        rows = rows.join(fed.with_columns(fed=True), on=which, how="left", maintain_order="left")
        return rows.with_columns(site=pl.when("fed").then(now).otherwise("site")).drop("fed")

    def effects(self, table: str) -> pl.LazyFrame:
        """The same, without what cut nothing because the model's own mask had closed it already."""
        return self.units(table).filter(~closed(table))


Seen = TypeVar("Seen")


def despite_damage(store: Store, run: Manifest, look: Callable[[View], Seen], *, everything: bool = False) -> Seen:
    """What `look` makes of the rows of a run without those that are damaged; all files are read for it at need.

    Args:
        store: where it is.
        run: it.
        look: given the rows that count.
        everything: count also prompts that the job has no longer.
    """
    try:
        return look(View(store, run, everything, store.damage(run.run)))
    except (OSError, pl.exceptions.PolarsError):
        damage = store.damage(run.run, thoroughly=True)
        if not damage.unreadable:
            raise
    return look(View(store, run, everything, damage))


def closed(table: str) -> pl.Expr:
    """Whether a row cut nothing: all that it names was closed anyway, so that no effect says nothing of the head."""
    if "closed" not in schemas.SCHEMAS[table].names:
        return pl.lit(False)
    return ((pl.col("closed") > 0) & (pl.col("fired") == 0)).fill_null(False)


def units(view: View) -> pl.LazyFrame:
    """The ids of the units that have rows, in whatever table."""
    return pl.concat([view.scan(table).select("unit_id") for table in schemas.UNIT_TABLES]).unique()


def measured(view: View) -> int:
    """How much was measured, as plans count: ablations, injections, and texts for each autoencoder that reads them."""

    def counts() -> pl.LazyFrame:
        return pl.concat([_counted(view, name, table) for name, table in kinds.tables().items()]).sum()

    return collect(counts).item()


def _counted(view: View, name: str, table: kinds.Table) -> pl.LazyFrame:
    times = [table.times] if table.times else []
    work = view.units(name).select("unit_id", *table.of_work, *times).unique()
    return work.select(n=(pl.col(table.times).sum() if table.times else pl.len()).cast(pl.Int64))


def lacking(run: Manifest) -> list[str]:
    """Why experiments of a run have no rows here: a line each kind that is not installed."""
    by_kind: dict[str, list[str]] = {}
    for issue in run.jobs:
        for spec in issue.resolved.get("experiments", ()):
            if spec.get("kind") is not None and spec["name"] not in (names := by_kind.setdefault(spec["kind"], [])):
                names.append(spec["name"])
    why = {each.name: f"the kind {each.name!r} cannot be used: {each.why}" for each in kinds.unusable()}
    return [
        f"{', '.join(names)}: {why.get(kind, f'no kind {kind!r} is installed')}"
        for kind, names in by_kind.items()
        if kind not in kinds.kinds()
    ]


def cells_of_heads() -> list[str]:
    """The tables with a row a cell that names layers and heads, of whatever kinds."""
    return [table for table in schemas.UNIT_TABLES if {"layers", "heads", "kl"} <= set(schemas.SCHEMAS[table].names)]


def placed(rows: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Rows without a revision get their model's, where the run has only one of it; else they stand apart.

    Args:
        rows: with model_id and revision.
        known: model_id and revision of all that the run has.
    """
    of_id = known.select("model_id", "revision").drop_nulls().unique().group_by("model_id")
    only = of_id.agg(pl.col("revision").first().alias("only"), pl.len().alias("n")).filter(pl.col("n") == 1)
    found = rows.join(only.select("model_id", "only"), on="model_id", how="left", maintain_order="left")
    return found.with_columns(pl.coalesce("revision", "only").alias("revision")).drop("only")


def revisions(view: View) -> pl.DataFrame:
    """Every model that the run knows, measured or not: model_id, revision (null only where nothing says it)."""
    frozen = pl.DataFrame(
        [(ref.partition("@")[0], revision) for ref, revision in view.run.commits.items()],
        schema={"model_id": pl.String(), "revision": pl.String()},
        orient="row",
    )
    tables = ("models", "failures", *schemas.UNIT_TABLES)

    def named() -> pl.LazyFrame:
        return pl.concat([view.scan(table).select("model_id", "revision") for table in tables]).unique()

    found = pl.concat([frozen, collect(named)]).filter(pl.col("model_id").is_not_null()).unique()
    return placed(found, found).unique().sort("model_id", "revision")
