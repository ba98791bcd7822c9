"""Many small files into few, at the end of a run, such that a crash at any instant leaves a store that reads right.

The manifest first lists the files that hold, so that what is written next does not count. Then, for each group of
small files: write the merged file; put it on the list in place of the small ones, in one write; delete those. raymi's
reader goes by the list. A plain `scan_parquet` sees rows twice only between the writing of a merged file and the
deletion of what it replaces: milliseconds, and one table of one model at a time.
"""

import io
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from raymi.store import layout, ownership, schemas
from raymi.store.objects import Entry

if TYPE_CHECKING:
    from raymi.store.writer import Run

TARGET_BYTES = 64 * 2**20
"""Merged files stay below; files larger than half of it are left as they are."""


def compact(run: "Run") -> None:
    """Merges the small files of a run, table by table and model by model. Raises RunLost like every write."""
    live = {entry.key: entry for entry in ownership.live_files(run.objects, run.manifest)}
    _list_live(run, set(live))
    keys = set(live)
    for batch in _batches(sorted(live.values())):
        table, model_slug = layout.group_of(batch[0])
        try:
            rows = pa.concat_tables([_read(run, table, key) for key in batch])
        except (OSError, pa.ArrowException):  # a file is spoilt: the report says so, and they stay as they are
            continue
        merged = run.write(table, model_slug, rows)
        keys = (keys - set(batch)) | {merged}
        _list_live(run, keys)
        run.check()  # a driver that takes the run from here on reads the list just written
        run.objects.delete(batch)


def _list_live(run: "Run", keys: set[str]) -> None:
    run.manifest.live = sorted(keys)
    run.save()


def _batches(entries: list[Entry]) -> list[list[str]]:
    """Small files of one table and model that go together, in the order they were written."""
    batches: list[list[str]] = []
    small = (entry for entry in entries if entry.size <= TARGET_BYTES // 2)
    for _, group in groupby(small, key=lambda entry: layout.group_of(entry.key)):
        size = TARGET_BYTES
        for entry in group:
            size += entry.size
            if size > TARGET_BYTES:
                batches.append([])
                size = entry.size
            batches[-1].append(entry.key)
    return [batch for batch in batches if len(batch) > 1]


def _read(run: "Run", table: str, key: str) -> pa.Table:
    data = run.objects.get(key)
    if data is None:
        raise FileNotFoundError(key)
    return schemas.conform(table, pq.ParquetFile(io.BytesIO(data)).read(use_threads=False))
