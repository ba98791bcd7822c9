"""Stores: manifests and files of rows."""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import raymi.store
from raymi.cli.report import lines
from raymi.report import export, tables
from raymi.store import schemas
from raymi.store.reader import Store
from tests.fuzz.guard import Wrong
from tests.fuzz.inputs import Files
from tests.fuzz.targets import Target
from tests.rows import MODEL, add_units, failure, loaded, take, verified
from tests.sae_rows import Tokens, ablated, injected, moved, seen, text

RUN = "heads-1a2b3c4d"


def knockouts(store: Store) -> None:
    with take(store, RUN) as run:
        run.manifest.freeze_commits({MODEL: "0" * 40})
        run.manifest.add_prompts(["france"])
        add_units(run, "a", "b")
        run.add("models", "m", loaded())
        run.add("failures", "m", failure(stage="unit", unit_id="x"))
        run.add("verifications", "m", verified("cone", 0.001, 0.5))
        run.close("failed")


def autoencoders(store: Store) -> None:
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = {
        "prompts": [text("p", ["The", "capital"])],
        "sae_quality": [Tokens(rng, 7).row("q")],
        "sae_features": [seen("p", 1, {3: 1.5, 2: 0.5})],
        "sae_injections": [injected(5.0, "p", changed=moved(t1=0.5))],
        "sae_ablations": [ablated(3, "p")],
    }
    with take(store, "saes-00000000") as run:
        for table, rows in found.items():
            run.add(table, "m", schemas.rows(table, rows))
        run.close("done")


@cache
def stores() -> dict[str, Files]:
    found: dict[str, Files] = {}
    for name, makers in {"knockouts": (knockouts,), "saes": (autoencoders,)}.items():
        with tempfile.TemporaryDirectory() as folder:
            store = raymi.store.open(folder)
            for make in makers:
                make(store)
            paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_size]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
            found[name] = files
    return found


def read_store(folder: Path) -> None:
    """Looks at a store as one of the commands does: all of them at every input would take seconds."""
    store = raymi.store.open(str(folder))
    looks = (look_at_runs, look_at_report, go_on)
    sizes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for line in looks[sizes % len(looks)](store):
        line.encode("utf-8", "surrogatepass")
    untouched(folder, store)


def look_at_runs(store: Store) -> Iterator[str]:
    yield export.as_json(tables.runs(store).to_dicts())


def look_at_report(store: Store) -> Iterator[str]:
    report = tables.report(store)
    yield from lines(report, 80)
    yield export.as_json(export.as_record(report))


def go_on(store: Store) -> Iterator[str]:
    store.refuse_damaged(RUN)
    with take(store, RUN) as run:
        yield from run.done_units()
        add_units(run, "c")


def untouched(folder: Path, store: Store) -> None:
    """Whether the rows of a run whose files are as they were are those that it had."""
    base = stores()["knockouts"]
    mine = {name: data for name, data in base.items() if f"run={RUN}/" in name or name.startswith(f"runs/{RUN}/")}
    if not all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in mine.items()):
        return
    rows = store.scan("ablations", RUN).select("kl", "unit_id").collect()
    if rows.filter(pl.col("unit_id") != "c").height != 6 or set(rows["kl"]) != {0.5}:
        raise Wrong("other rows than the store has")


STORE = Target("store", stores, read_store)
