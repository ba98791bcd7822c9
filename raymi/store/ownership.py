"""Who drives a run, and which files therefore hold.

A driver may be stopped at any instant (SIGSTOP, a laptop's lid) and wake hours later in the middle of a write, so no
check before a write can be enough. Two things fence it off. Every file it writes carries its epoch in its name. And who
takes the run creates the next epoch, once and atomically, with the list of the files that it accepted from before: a
file of an earlier epoch that is not on that list was written too late, is never read, and is deleted by the new driver.

Manifests are fenced the same way: a driver writes its own in `epochs/`, and `manifest.json` is a copy that is believed
only while its epoch is the newest.
"""

import time
from collections.abc import Mapping
from typing import Any

from raymi.errors import UserError
from raymi.store import layout
from raymi.store.manifest import Driver, Issue, Manifest, NoManifest, parse
from raymi.store.objects import Entry, Objects
from raymi.store.schemas import SCHEMAS

_MISSED_BEATS = 6
"""A driver that has given no sign of life for so many heartbeats has lost its claim: a minute, at ten seconds each."""


class RunLost(UserError):
    """Another driver has taken the run."""


def read(objects: Objects, run: str, notes: list[str] | None = None) -> Manifest | None:
    """The newest word on a run, or None when there is no such run.

    Args:
        objects: the store.
        run: its name.
        notes: what is said of a damaged `manifest.json` is added; its driver's own copy is taken for it.

    Raises:
        UserError: it was written by a newer raymi, or no copy of it is left.
    """
    listed = objects.entries(layout.epochs(run))
    newest = max((layout.epoch_of(entry.key) for entry in listed if layout.is_epoch(entry.key)), default=0)
    key = layout.manifest(run)
    try:
        manifest = parse(data, f"{objects}/{key}") if (data := objects.get(key)) else None
    except NoManifest as error:
        try:
            manifest = read_epoch(objects, run, newest)
        except UserError:
            manifest = None
        if manifest is None:
            raise
        if notes is not None:
            notes.append(f"{error.what}. The copy in {objects}/{layout.epoch(run, newest)} is used.")
    if newest and (manifest is None or manifest.epoch < newest):
        return read_epoch(objects, run, newest)
    return manifest


def read_epoch(objects: Objects, run: str, number: int) -> Manifest | None:
    """What the driver of one epoch last said."""
    key = layout.epoch(run, number)
    data = objects.get(key)
    return parse(data, f"{objects}/{key}") if data else None


def save(objects: Objects, manifest: Manifest) -> None:
    """Writes a driver's word: to its own place first, then to where everybody looks."""
    data = manifest.as_bytes()
    objects.put(layout.epoch(manifest.run, manifest.epoch), data)
    objects.put(layout.manifest(manifest.run), data)


def present_files(objects: Objects, run: str) -> list[Entry]:
    """Every file of rows that any driver of the run has written."""
    listed = (entry for table in SCHEMAS for entry in objects.entries(layout.partition(table, run)))
    return [entry for entry in listed if layout.is_rows(entry.key)]


def live_files(objects: Objects, manifest: Manifest) -> list[Entry]:
    """The files that hold, as far as `manifest` knows."""
    return [entry for entry in present_files(objects, manifest.run) if holds(manifest, entry.key)]


def holds(manifest: Manifest, key: str) -> bool:
    """Whether a file of rows counts, as far as `manifest` knows."""
    if manifest.live is not None:
        return key in manifest.live
    return layout.epoch_of(key) == manifest.epoch or key in manifest.accepted


def snapshot(objects: Objects, run: str) -> tuple[Manifest, list[Entry]] | None:
    """The run and the files that hold, of one instant, even while a driver writes, compacts or takes it."""
    manifest = read(objects, run)
    while manifest is not None:
        files = live_files(objects, manifest)
        after = read(objects, run)
        if after is not None and _holding(after) == _holding(manifest):
            return manifest, files
        manifest = after
    return None


def _holding(manifest: Manifest) -> tuple[object, ...]:
    """What decides which files hold; whatever else a damaged manifest lacks is made up, each time anew."""
    return manifest.epoch, manifest.live, manifest.accepted


def is_driven(objects: Objects, manifest: Manifest, clock: float) -> bool:
    """Whether the run's driver lives, at `clock` (seconds since 1970, by the store's clock)."""
    if manifest.status != "running" or manifest.driver.process_is_gone():
        return False
    keys = layout.heartbeat(manifest.run, manifest.epoch), layout.epoch(manifest.run, manifest.epoch)
    signs = [entry.modified for key in keys if (entry := objects.head(key))]
    return clock - max(signs, default=0) < _MISSED_BEATS * manifest.driver.heartbeat


def take(objects: Objects, run: str, issue: Issue, cut_rule: Mapping[str, Any], heartbeat: float) -> Manifest:
    """Makes this process the driver of a run, new or old.

    Raises:
        UserError: its driver lives, or another process took it at the same instant.
    """
    before = read(objects, layout.run_name(run))
    if before and is_driven(objects, before, _clock(objects, run)):
        raise refused(before)
    driver = Driver(heartbeat=heartbeat)
    manifest = before.model_copy(deep=True) if before else Manifest(run=run, epoch=0, driver=driver)
    manifest.follow(issue, cut_rule)
    manifest.driver, manifest.live = driver, None
    while True:
        manifest.accepted = _accepted(objects, before)
        manifest.epoch += 1
        _create(objects, manifest)
        # The driver before may have woken since and committed a compaction. It looks for a later epoch between doing so
        # and deleting what it replaced: either it found ours and deletes nothing, or we find its new list here.
        if _accepted(objects, before) == manifest.accepted:
            break
    save(objects, manifest)
    return manifest


def _accepted(objects: Objects, before: Manifest | None) -> list[str]:
    if before is None:
        return []
    last_word = read_epoch(objects, before.run, before.epoch) or before
    return sorted(entry.key for entry in live_files(objects, last_word))


def _create(objects: Objects, manifest: Manifest) -> None:
    """Takes the epoch `manifest.epoch`, or raises UserError when another process has it."""
    if objects.create(layout.epoch(manifest.run, manifest.epoch), manifest.as_bytes()):
        return
    there = read_epoch(objects, manifest.run, manifest.epoch)
    # A request that succeeds while its answer is lost is sent again by the client and then refused: it may be our own.
    if there is None or there.driver.token != manifest.driver.token:
        raise refused(there or manifest)


def refused(manifest: Manifest) -> UserError:
    """What is said to whoever wants a run that another process drives."""
    return UserError(
        f"the run {manifest.run} is being driven by {manifest.driver}",
        hint="Wait for it, or stop it and issue the command again; --new starts a run of its own.",
    )


def _clock(objects: Objects, run: str) -> float:
    """The time by the store's own clock, which is what its heartbeats are dated with."""
    key = layout.clock(run)
    objects.put(key, b"")
    entry = objects.head(key)
    objects.delete([key])
    return entry.modified if entry else time.time()
