"""The single writer of a run: buffers rows, commits them as whole files, and stops when another driver has the run."""

import contextlib
import io
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from raymi.errors import UserError
from raymi.store import compaction, layout, ownership, schemas
from raymi.store.manifest import Manifest, Status
from raymi.store.objects import Objects
from raymi.store.ownership import RunLost
from raymi.store.scan import scan
from raymi.store.secret import scrub

MAX_ROWS = 65_536
MAX_BYTES = 64 * 2**20
MAX_SECONDS = 30.0

_FREE_TEXT = {"failures": ("message", "traceback"), "events": ("message",)}
"""Columns that may quote anything, secrets included."""


@dataclass(slots=True)
class _Buffer:
    """Rows of one table and model that are not yet in the store."""

    since: float
    tables: list[pa.Table] = field(default_factory=list[pa.Table])
    rows: int = 0
    size: int = 0

    def add(self, data: pa.Table) -> None:
        self.tables.append(data)
        self.rows += data.num_rows
        self.size += data.nbytes

    def is_due(self, now: float) -> bool:
        return self.rows >= MAX_ROWS or self.size >= MAX_BYTES or now - self.since >= MAX_SECONDS


class Run:
    """A run that this process drives. Not for several threads. As a context manager it never leaves the run claimed.

    Change `manifest` and `save` it; `add` rows and `flush` them; `close` at the end. A crash loses at most what was
    added since the last flush.
    """

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self.objects = objects
        self.manifest = manifest
        self._buffers: dict[tuple[str, str], _Buffer] = {}
        self._sequence = 0
        self._closed = False
        for table in schemas.SCHEMAS:
            objects.sweep(layout.partition(table, manifest.run))
        self._remove_dead()
        self._done = self._read_units()
        self._buffered: set[str] = set()
        self._heart = _Heart(objects, manifest)
        self._heart.start()

    @property
    def name(self) -> str:
        return self.manifest.run

    def done_units(self) -> set[str]:
        """Ids of the units whose rows are in the store."""
        return set(self._done)

    def add(self, table: str, model_slug: str | None, data: pa.Table) -> None:
        """Buffers rows; those of a unit, prompt or token that is there already are dropped, so the first ones win.

        Args:
            table: one of `schemas.SCHEMAS`.
            model_slug: `layout.slug` of the model's id; None for rows of the whole run.
            data: of exactly the table's schema; the rows of a unit all at once, and in one table.

        Raises:
            ValueError: another schema.
        """
        schemas.check(table, data)
        group = table, model_slug or layout.NO_MODEL
        if table in schemas.UNIT_TABLES:
            data = self._new_units(data)
        elif table in schemas.KEYS:
            data = self._new_keys(group, data)
        for column in _FREE_TEXT.get(table, ()):
            data = _scrubbed(data, column)
        if data.num_rows:
            self._buffers.setdefault(group, _Buffer(since=time.monotonic())).add(data)

    def maybe_flush(self) -> None:
        """Commits the buffers that have grown large or old; cheap when there are none.

        Raises:
            RunLost, UserError: as `flush`.
        """
        if self._heart.lost:
            self.check()
        now = time.monotonic()
        if due := [group for group, buffer in self._buffers.items() if buffer.is_due(now)]:
            self._commit(due)

    def flush(self) -> None:
        """Commits everything that was added.

        Raises:
            RunLost: another driver has the run; nothing more was written.
            UserError: the store cannot be written; what is not in it stays buffered.
        """
        self.check()
        self._commit(list(self._buffers))

    def save(self) -> None:
        """Writes the manifest. Raises as `flush` does."""
        self.check()
        ownership.save(self.objects, self.manifest)

    def check(self) -> None:
        """Raises RunLost when another driver has taken the run."""
        if self.objects.head(layout.epoch(self.name, self.manifest.epoch + 1)) is None:
            return
        owner = ownership.read(self.objects, self.name)
        by = f" by {owner.driver}" if owner else ""
        raise RunLost(
            f"the run {self.name} was taken over{by}, while this process gave no sign of life",
            hint="What it had not yet written is left to the new driver; nothing is lost and nothing is there twice.",
        )

    def close(self, status: Status) -> None:
        """Commits what is left and gives the run back; one that came to its end is compacted. Raises as `flush`."""
        self._closed = True
        try:
            self.flush()
            if status in ("done", "failed"):
                compaction.compact(self)
            self.manifest.set_status(status)
            self.save()
        finally:
            self._heart.stop()

    def write(self, table: str, model_slug: str, data: pa.Table) -> str:
        """Puts one file of rows, if the run is still ours; returns its key."""
        self.check()
        self._sequence += 1
        key = layout.rows(table, self.name, model_slug, self.manifest.epoch, self._sequence)
        self.objects.put(key, _as_parquet(table, data))
        return key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._closed:
            return
        if isinstance(error, RunLost):
            self._heart.stop()
            return
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.close("interrupted")

    def _commit(self, groups: list[tuple[str, str]]) -> None:
        order = list(schemas.SCHEMAS)
        for table, model_slug in sorted(groups, key=lambda group: order.index(group[0])):
            data = pa.concat_tables(self._buffers[table, model_slug].tables)
            self.write(table, model_slug, data)
            del self._buffers[table, model_slug]
            if table in schemas.UNIT_TABLES:
                units = _units(data)
                self._done |= units
                self._buffered -= units
        if groups:
            self._remove_dead()

    def _remove_dead(self) -> None:
        """Deletes what drivers wrote after they had lost the run."""
        self.objects.delete(
            entry.key
            for entry in ownership.present_files(self.objects, self.name)
            if layout.epoch_of(entry.key) < self.manifest.epoch and not ownership.holds(self.manifest, entry.key)
        )

    def _read_units(self) -> set[str]:
        tables = [self._scan(table).select(pl.col("unit_id").unique()) for table in schemas.UNIT_TABLES]
        return set(pl.concat(tables).collect()["unit_id"])

    def _scan(self, table: str, model_slug: str | None = None) -> pl.LazyFrame:
        folder = layout.partition(table, self.name) + (f"/model={model_slug}/" if model_slug else "/")
        live = (entry.key for entry in ownership.live_files(self.objects, self.manifest))
        return scan(self.objects, table, [key for key in live if key.startswith(folder)])

    def _new_units(self, data: pa.Table) -> pa.Table:
        units = _units(data)
        new = units - self._done - self._buffered
        self._buffered |= new
        return data if new == units else data.filter(pa.array([unit in new for unit in data["unit_id"].to_pylist()]))

    def _new_keys(self, group: tuple[str, str], data: pa.Table) -> pa.Table:
        table, model_slug = group
        key = list(schemas.KEYS[table])
        known = [self._scan(table, model_slug).select(key)]
        if buffer := self._buffers.get(group):
            known += [_frame(part.select(key)).lazy() for part in buffer.tables]
        rows = _frame(data.select(key)).lazy().with_row_index("row").unique(key, keep="first")
        for there in known:
            rows = rows.join(there, on=key, how="anti", nulls_equal=True)
        return data.take(pa.array(rows.collect()["row"].sort().to_list(), pa.int64()))


class _Heart(threading.Thread):
    """Renews the driver's sign of life until it is stopped or has lost the run."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        super().__init__(name=f"heartbeat of {manifest.run}", daemon=True)
        self.lost = False
        self._objects = objects
        self._beat = layout.heartbeat(manifest.run, manifest.epoch)
        self._next_epoch = layout.epoch(manifest.run, manifest.epoch + 1)
        self._seconds = manifest.driver.heartbeat
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set() and not self.lost:
            # A store out of reach may come back; where it does not, the next flush says so.
            with contextlib.suppress(UserError):
                self._objects.put(self._beat, b"")
                self.lost = self._objects.head(self._next_epoch) is not None
            self._stopped.wait(self._seconds)

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=1)  # it may be waiting for a store that does not answer


def _units(data: pa.Table) -> set[str]:
    return set(data["unit_id"].unique().to_pylist())


def _frame(data: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(data)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _scrubbed(data: pa.Table, column: str) -> pa.Table:
    texts = [text and scrub(text) for text in data[column].to_pylist()]
    return data.set_column(data.schema.get_field_index(column), data.schema.field(column), pa.array(texts, pa.string()))


def _as_parquet(table: str, data: pa.Table) -> bytes:
    sink = io.BytesIO()
    about = {"raymi.schema_version": str(schemas.SCHEMA_VERSION), "raymi.table": table}
    pq.write_table(data.combine_chunks().replace_schema_metadata(about), sink, compression="zstd")
    return sink.getvalue()
