"""Rows of JSONL and Parquet files, whoever wrote them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raymi.errors import UserError, quoted

UNREADABLE = (OSError, ValueError, OverflowError, pa.ArrowException)
"""What opening a file and taking values out of it may raise, UnicodeDecodeError included."""


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(Line, what is in it) of every line of a JSONL file that is not blank. UserError where one is no JSON."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _json(f"{path}:{number}", line)


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{place}: has too many lists or objects within each other") from None
    except ValueError:  # Python refuses to read the longest ones
        raise UserError(f"{place}: has a number that is too long") from None


def parquet_rows(path: Path, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file. Columns that are not wanted may be of any kind; None stands for their values.

    Raises:
        UserError: a wanted column is there more than once, or the file is none.
        UNREADABLE: it is spoilt further inside.
    """
    with pq.ParquetFile(path) as file:
        names: list[str] = file.schema_arrow.names
        columns = [name for name in names if wanted(name)]
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{path}: has the column {quoted(twice[0])} more than once")
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield {name: row.get(name) for name in names}
