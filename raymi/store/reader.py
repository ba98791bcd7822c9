"""Reading a store: its runs, and its tables as lazy frames."""

import os
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

import polars as pl

from raymi.errors import UserError
from raymi.store import layout, ownership
from raymi.store.damage import Damage, look, refuse
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
        """Every run whose manifest can be read, the one that was last issued at the end."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Manifest], dict[str, UserError]]:
        """Every run whose manifest can be read, the one that was last issued at the end; and by name, why manifests of
        others cannot be, or had to be had from a copy.
        """
        names = {parts[1] for entry in self.objects.entries("runs") if len(parts := entry.key.split("/")) > 2}
        found: list[Manifest] = []
        damaged: dict[str, UserError] = {}
        for name in sorted(names):
            notes: list[str] = []
            try:
                if manifest := ownership.read(self.objects, name, notes):
                    found.append(manifest)
            except UserError as error:
                damaged[name] = error
            if notes:
                damaged[name] = UserError(notes[0])
        return sorted(found, key=lambda manifest: manifest.driver.started_at), damaged

    def find(self, ref: str | None = None) -> Manifest:
        """The run of that name, or the only one whose name begins so; None: the one that was last issued.

        Raises:
            UserError: there is none, or more than one, or its manifest cannot be read.
        """
        readable, damaged = self.survey()
        runs = {manifest.run: manifest for manifest in readable}
        lost = {name: error for name, error in damaged.items() if name not in runs}
        meant = [name for name in lost if ref is None or name.startswith(ref)]
        if meant and not (runs if ref is None else [name for name in runs if name.startswith(ref)]):
            raise lost[meant[0]]
        if ref in lost:
            raise lost[ref]
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

    def scan(self, table: str, run: str | None = None, *, without: Collection[str] = ()) -> pl.LazyFrame:
        """A table, of one run or of all, as it stands now; a run may be going on.

        Args:
            table: its name.
            run: name of the run.
            without: keys of files that are left out (`damage`).

        Returns:
            The columns of the table's schema, always all of them, and `run` and `model` (the slug), both strings.

        Raises:
            UserError: a manifest cannot be read.
        """
        keys = (entry.key for entry in self._live_files(run) if layout.group_of(entry.key)[0] == table)
        return scan(self.objects, table, [key for key in keys if key not in without])

    def damage(self, run: str, *, thoroughly: bool = False) -> Damage:
        """What is wrong with a run's files of rows.

        Args:
            run: its name.
            thoroughly: read all of every file, and not only what it says of itself and the numbers.
        """
        return look(self.objects, [entry.key for entry in self._live_files(run)], thoroughly=thoroughly)

    def refuse_damaged(self, run: str) -> None:
        """Raises UserError, naming each, when files of rows of a run cannot be read."""
        refuse(self.objects, [entry.key for entry in self._live_files(run)])

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
        names = [run] if run else []
        if not run:
            runs, damaged = self.survey()
            names = [manifest.run for manifest in runs]
            for name in damaged.keys() - set(names):  # without a word it would be missing from all numbers
                raise damaged[name]
        snapshots = (ownership.snapshot(self.objects, name) for name in names)
        return [entry for snapshot in snapshots if snapshot for entry in snapshot[1]]
