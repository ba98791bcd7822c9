"""One row of a run whole: an ablation, or whatever else was measured, or a failure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from raymi.errors import UserError
from raymi.fields import near
from raymi.report.query import View, collect, placed, revisions
from raymi.store import schemas

_ALIKE = ("model_id", "revision", "stage", "kind", "message")


@dataclass(frozen=True, slots=True)
class Found:
    """A row, and how many others were meant as well."""

    table: str
    row: dict[str, Any]
    n: int
    """Rows that fit."""


def alike(failures: pl.DataFrame) -> pl.DataFrame:
    """Failures that differ in nothing but their unit, as one: model_id, revision, stage, kind, message, n, attempts and
    the first one's unit_id and failed_at; in the order of their first.
    """
    return failures.group_by(_ALIKE, maintain_order=True).agg(
        pl.len().alias("n"), pl.col("attempts").max(), pl.col("unit_id", "failed_at").first()
    )


def failure(view: View, failures: pl.DataFrame, number: int) -> Found:
    """The failure that has a number in the report, as it was stored last.

    Args:
        view: of the run.
        failures: that are open (`tables.open_failures`).
        number: from 1, of those that are `alike`.

    Raises:
        UserError: there is none of that number.
    """
    listed = alike(failures)
    if not 1 <= number <= listed.height:
        none = (
            "nothing has failed in it, or all was made good" if listed.is_empty() else f"allowed: 1 to {listed.height}"
        )
        raise UserError(f"--failure {number}: {none}", hint="`raymi report` lists what failed, with numbers.")
    meant = listed.row(number - 1, named=True)
    every = placed(collect(lambda: view.scan("failures").sort("failed_at", descending=True)), revisions(view))
    same = [pl.col(name).eq_missing(pl.lit(meant[name])) for name in (*_ALIKE, "unit_id")]
    return Found("failures", every.filter(*same).row(0, named=True), int(meant["n"]))


def row(view: View, wanted: Mapping[str, Any], table: str | None = None) -> Found:
    """The row that fits, of several the one with the largest KL.

    Args:
        view: of the run: rows that it does not count are not found.
        wanted: by column. Of text the beginning will do; of a list the whole.
        table: of rows of units; None: the first that has any that fit.

    Raises:
        UserError: none fits.
    """
    for name in (table,) if table else schemas.UNIT_TABLES:
        if not wanted.keys() <= set(schemas.SCHEMAS[name].names):
            continue
        found = collect(lambda name=name: view.units(name).filter(*(_is(*each) for each in wanted.items())))
        if not found.is_empty():
            at = found["kl"].arg_max() or 0 if "kl" in found.columns else 0
            return Found(name, _with_tokens(view, found.row(at, named=True)), found.height)
    said = ", ".join(f"{name} {value}" for name, value in wanted.items())
    raise UserError(
        f"no row of {view.run.run} has {said}" if said else f"{view.run.run} has no rows", hint=_hint(view, wanted)
    )


def _is(column: str, value: Any) -> pl.Expr:
    return pl.col(column).cast(pl.String).str.starts_with(value) if isinstance(value, str) else pl.col(column) == value


def _hint(view: View, wanted: Mapping[str, Any]) -> str | None:
    """What there is in the place of a value that is not there."""
    for column, value in wanted.items():
        there = _values(view, column)
        if there and not any(
            str(each).startswith(value) if isinstance(value, str) else each == value for each in there
        ):
            meant = near(value, map(str, there)) if isinstance(value, str) else ""
            return f"There is {', '.join(map(str, there[:8]))}{', ...' if len(there) > 8 else ''}{meant}."
    return None


def _values(view: View, column: str) -> list[Any]:
    tables = [name for name in schemas.UNIT_TABLES if column in schemas.SCHEMAS[name].names]
    every = collect(lambda: pl.concat([view.units(name).select(column) for name in tables]).drop_nulls().unique())
    return every[column].sort().to_list()


def _with_tokens(view: View, row: dict[str, Any]) -> dict[str, Any]:
    """The row, and the text of each token that it names behind its number."""
    here = (pl.col("model_id") == row["model_id"]) & (pl.col("revision") == row["revision"])
    known = collect(lambda: view.scan("vocabulary").filter(here).select("token_id", "token"))
    texts: dict[int, str] = dict(zip(known["token_id"], known["token"], strict=True))
    out: dict[str, Any] = {}
    for name, value in row.items():
        out[name] = value
        if name == "changed" and value is not None:
            out[name] = [{"token": texts.get(each["token_id"]), **each} for each in value]
        elif isinstance(value, int) and name in ("answer_id", "wrong_id", "top1_clean", "top1_ablated"):
            out[f"{name.removesuffix('_id')}_token"] = texts.get(value)
    return out
