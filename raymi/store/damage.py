"""What is wrong with a run's files of rows, and what to do about each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from raymi.errors import UserError
from raymi.store import layout
from raymi.store.objects import Objects
from raymi.store.scan import scan
from raymi.store.schemas import SCHEMAS

WHAT_TO_DO = "Move it out of the store, and the same `raymi run` measures again what it held."


@dataclass(frozen=True, slots=True)
class Damage:
    """Of one run."""

    unreadable: Mapping[str, str] = field(default_factory=dict[str, str])
    """Files that no rows can be had of, by key, with the reason."""
    not_numbers: Mapping[str, int] = field(default_factory=dict[str, int])
    """Files with rows that hold NaN, and how many."""

    @property
    def tables(self) -> frozenset[str]:
        """Those with rows that hold NaN."""
        return frozenset(layout.group_of(key)[0] for key in self.not_numbers)

    def said(self, objects: Objects) -> list[str]:
        """A line a file."""
        lines = [f"{objects.uri(key)}: {why}. {WHAT_TO_DO}" for key, why in self.unreadable.items()]
        for key, n in self.not_numbers.items():
            rows = "1 row holds" if n == 1 else f"{n:,} rows hold"
            lines.append(f"{objects.uri(key)}: {rows} NaN, which is no number, and count in nothing. {WHAT_TO_DO}")
        return lines


def refuse(objects: Objects, keys: Iterable[str]) -> None:
    """Raises UserError, naming each, when files cannot be read."""
    if said := Damage(unreadable(objects, keys)).said(objects):
        raise UserError("\n".join(said))


def look(objects: Objects, keys: Iterable[str], *, thoroughly: bool = False) -> Damage:
    """What is wrong with files of rows.

    Args:
        objects: the store.
        keys: of the files.
        thoroughly: read all of every file: bytes may be spoilt that no footer tells of.
    """
    listed = list(keys)
    bad = unreadable(objects, listed, thoroughly=thoroughly)
    sound: dict[str, list[str]] = {}
    for key in listed:
        if key not in bad:
            sound.setdefault(layout.group_of(key)[0], []).append(key)
    found: dict[str, int] = {}
    for table, its in sound.items():
        if table not in _WITH_NUMBERS:
            continue
        try:
            rows = scan(objects, table, its, path=True).filter(has_nan(table)).group_by("path").len().collect()
        except (
            OSError,
            pl.exceptions.PolarsError,
        ):  # whoever reads it next says so, or it is gone, merged into another
            continue
        by_path = {objects.uri(key): key for key in its}
        found |= {by_path[path]: n for path, n in sorted(rows.iter_rows()) if path in by_path}
    return Damage(bad, found)


def unreadable(objects: Objects, keys: Iterable[str], *, thoroughly: bool = False) -> dict[str, str]:
    """By key, why files cannot be read; those that are gone are left out."""
    found: dict[str, str] = {}
    for key in keys:
        table = layout.group_of(key)[0]
        try:
            file = pl.scan_parquet(objects.uri(key), glob=False, hive_partitioning=False)
            why = _other_type(table, file.collect_schema())
            if thoroughly and why is None:
                file.collect()
        except (OSError, pl.exceptions.PolarsError) as error:
            if objects.head(key) is None:
                continue
            first = str(error).strip().partition("\n")[0][:200]
            why = f"it is no whole Parquet file ({first})"
        if why is not None:
            found[key] = why
    return found


def has_nan(table: str) -> pl.Expr:
    """Whether a row of a table holds NaN, at whatever depth."""
    return pl.any_horizontal(_WITH_NUMBERS[table])


def _other_type(table: str, found: pl.Schema) -> str | None:
    for name, kind in pl.Schema(SCHEMAS[table]).items():
        if name in found and found[name] != kind:
            return f"its column {name} is {found[name]}, not {kind}"
    return None


def _nans(value: pl.Expr, kind: pl.DataType) -> list[pl.Expr]:
    """What is true of a value of this type when there is NaN in it."""
    match kind:
        case pl.Float32() | pl.Float64():
            return [value.is_nan().fill_null(False)]
        case pl.List(inner=pl.DataType() as inner):
            return [value.list.eval(each).list.any().fill_null(False) for each in _nans(pl.element(), inner)]
        case pl.Struct():
            return [each for part in kind.fields for each in _nans(value.struct.field(part.name), part.dtype)]  # pyright: ignore[reportArgumentType]
        case _:
            return []


_WITH_NUMBERS: Mapping[str, list[pl.Expr]] = {
    table: found
    for table, schema in SCHEMAS.items()
    if (found := [each for name, kind in pl.Schema(schema).items() for each in _nans(pl.col(name), kind)])
}
