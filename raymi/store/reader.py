"""Reading a store: its runs, and its tables as lazy frames."""

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

import polars as pl

from raymi.errors import UserError
from raymi.store import layout, ownership
from raymi.store.manifest import Issue, Manifest
from raymi.store.objects import Entry, Objects
from raymi.store.scan import scan
from raymi.store.writer import Run

HEARTBEAT_SECONDS = 10.0


class Store:
    """Results of any number of runs. Made by `raymi.store.open`. Reading needs no right to write."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def __str__(self) -> str:
        return str(self.objects)

    def runs(self) -> list[Manifest]:
        """Every run, the one that was last issued at the end.

        Raises:
            UserError: one was written by a newer raymi.
        """
        names = {entry.key.split("/")[1] for entry in self.objects.entries("runs")}
        found = [manifest for name in sorted(names) if (manifest := ownership.read(self.objects, name))]
        return sorted(found, key=lambda manifest: manifest.driver.started_at)

    def find(self, ref: str | None = None) -> Manifest:
        """The run of that name, or the only one whose name begins so; None: the one that was last issued.

        Raises:
            UserError: there is none, or more than one.
        """
        runs = {manifest.run: manifest for manifest in self.runs()}
        if not runs:
            raise UserError(
                f"there are no runs in the store {self}", hint="`raymi run JOB.yaml` makes one; --store names another."
            )
        if ref is None:
            return list(runs.values())[-1]
        candidates = [ref] if ref in runs else [name for name in runs if name.startswith(ref)]
        if len(candidates) == 1:
            return runs[candidates[0]]
        near = candidates or get_close_matches(ref, runs, n=3, cutoff=0.5)
        said = f"several runs begin with {ref!r}" if candidates else f"no run {ref!r}"
        hint = f"Did you mean {' or '.join(near)}?" if near else "`raymi runs` lists them."
        raise UserError(f"{said} in the store {self}", hint=hint)

    def is_driven(self, manifest: Manifest) -> bool:
        """Whether some process is driving the run now."""
        return ownership.is_driven(self.objects, manifest, time.time())

    def last_write(self, run: str) -> datetime | None:
        """When rows last arrived."""
        moments = [entry.modified for entry in ownership.present_files(self.objects, run)]
        return datetime.fromtimestamp(max(moments), UTC) if moments else None

    def scan(self, table: str, run: str | None = None) -> pl.LazyFrame:
        """A table, of one run or of all, as it stands now; a run may be going on.

        Returns:
            The columns of the table's schema, always all of them, and `run` and `model` (the slug), both strings.
        """
        entries = self._live_files(run)
        return scan(self.objects, table, (entry.key for entry in entries if layout.group_of(entry.key)[0] == table))

    def take(
        self,
        run: str,
        *,
        written: str,
        resolved: dict[str, Any],
        cut_rule: Mapping[str, Any] | None = None,
        heartbeat: float | None = None,
    ) -> Run:
        """Makes this process the driver of a run; the run is made where there is none.

        Args:
            run: its name.
            written: text of the job file.
            resolved: the job with every default filled in, as JSON values.
            cut_rule: how units are cut; the first command's holds, see `Run.manifest.cut_rule`.
            heartbeat: seconds between signs of life (default: RAYMI_HEARTBEAT_SECONDS, or 10).

        Raises:
            UserError: its driver lives; the store cannot be written, or was written by a newer raymi.
        """
        seconds = heartbeat or float(os.environ.get("RAYMI_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS))
        issue = Issue(written=written, resolved=resolved)
        return Run(self.objects, ownership.take(self.objects, run, issue, cut_rule or {}, seconds))

    def _live_files(self, run: str | None) -> list[Entry]:
        names = [run] if run else [manifest.run for manifest in self.runs()]
        snapshots = (ownership.snapshot(self.objects, name) for name in names)
        return [entry for snapshot in snapshots if snapshot for entry in snapshot[1]]
