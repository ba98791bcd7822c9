"""What is wrong with files of rows is said by name, and what is right is called right."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raymi.store
from raymi.errors import UserError
from raymi.store import schemas
from raymi.store.reader import Store
from raymi.store.schemas import SCHEMAS
from tests.rows import add_units, cell, take


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return "it is no whole Parquet file"


def empty(file: Path) -> str:
    file.write_bytes(b"")
    return "it is no whole Parquet file"


def text(file: Path) -> str:
    file.write_text("unit_id,kl\nu1,0.5\n")
    return "it is no whole Parquet file"


def other_type(file: Path) -> str:
    rows = pq.read_table(file)
    at = rows.schema.get_field_index("kl")
    pq.write_table(rows.set_column(at, "kl", rows["kl"].cast(pa.string())), file)
    return "its column kl is String, not Float64"


def nan(file: Path) -> str:
    rows = pq.read_table(file)
    numbers = [math.nan, *rows["kl"].to_pylist()[1:]]
    at = rows.schema.get_field_index("kl")
    pq.write_table(rows.set_column(at, "kl", pa.array(numbers, pa.float64())), file)
    return "1 row holds NaN, which is no number, and count in nothing"


def flip(file: Path) -> str:
    """Bytes in the first page, which no footer tells of."""
    whole = bytearray(file.read_bytes())
    whole[40:80] = bytes(255 - each for each in whole[40:80])
    file.write_bytes(whole)
    return "it is no whole Parquet file"


DAMAGE: list[Callable[[Path], str]] = [truncate, empty, text, other_type, nan]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path / "store"))


def written(store: Store, *names: str) -> list[Path]:
    with take(store) as run:
        for name in names:
            add_units(run, name)
            run.flush()
    return sorted(Path(str(store)).rglob("ablations/**/*.parquet"))


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.__name__) for damage in DAMAGE])
def test_each_is_named_with_its_file_and_what_to_do(store: Store, damage: Callable[[Path], str]) -> None:
    bad, _ = written(store, "u1", "u2")
    assert store.damage("heads-1a2b3c4d").said(store.objects) == []
    why = damage(bad)
    [said] = store.damage("heads-1a2b3c4d").said(store.objects)
    assert said.startswith(f"{bad}: {why}")
    assert "Move it out of the store" in said


def test_what_no_footer_tells_of_is_found_by_reading_all(store: Store) -> None:
    bad, _ = written(store, "u1", "u2")
    flip(bad)
    assert [*store.damage("heads-1a2b3c4d", thoroughly=True).unreadable] == [str(bad.relative_to(str(store)))]


def test_only_what_cannot_be_read_is_refused(store: Store) -> None:
    first, second = written(store, "u1", "u2")
    nan(first)
    store.refuse_damaged("heads-1a2b3c4d")
    truncate(second)
    with pytest.raises(UserError, match=second.name):
        store.refuse_damaged("heads-1a2b3c4d")


@pytest.mark.parametrize(
    "column",
    [
        {"kl": math.nan},
        {"changed": [{"token_id": 7, "prob_clean": 0.25, "prob_ablated": math.nan}]},
    ],
    ids=lambda column: next(iter(column)),
)
def test_nan_is_found_at_whatever_depth(store: Store, column: dict[str, Any]) -> None:
    with take(store) as run:
        run.add("ablations", "m", schemas.rows("ablations", [cell("u1", 0), cell("u1", 1, **column)]))
    damage = store.damage("heads-1a2b3c4d")
    assert list(damage.not_numbers.values()) == [1]
    assert damage.tables == {"ablations"}


def test_rows_without_numbers_hold_no_nan(store: Store) -> None:
    with take(store) as run:
        for table, schema in SCHEMAS.items():
            run.add(table, "m", schemas.rows(table, [{schema.names[0]: "x"}]))
    assert store.damage("heads-1a2b3c4d").said(store.objects) == []


def test_columns_of_other_versions_are_no_damage(store: Store) -> None:
    [file] = written(store, "u1")
    rows = pq.read_table(file)
    pq.write_table(rows.drop_columns(["testbed"]).append_column("later", pa.nulls(rows.num_rows, pa.int8())), file)
    assert store.damage("heads-1a2b3c4d").said(store.objects) == []
    assert store.scan("ablations").select(pl.len()).collect().item() == 3
