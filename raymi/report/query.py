"""Queries of a store that may be changing, and what rows of every kind have in common."""

from collections.abc import Callable

import polars as pl

from raymi.store import schemas
from raymi.store.manifest import Manifest
from raymi.store.reader import Store

_ATTEMPTS = 5
"""Readings of a store in which files are being merged: what was listed may be gone when it is opened."""


def collect(query: Callable[[], pl.LazyFrame]) -> pl.DataFrame:
    """The rows of a query, planned again when a file that it was to read has been merged into another."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return query().collect()
        except (OSError, pl.exceptions.ComputeError):
            continue
    return query().collect()


def units(store: Store, run: Manifest) -> pl.LazyFrame:
    """The ids of the units that have rows, in whatever table."""
    tables = [store.scan(table, run.run).select("unit_id") for table in schemas.UNIT_TABLES]
    return pl.concat(tables).unique()


def measured(store: Store, run: Manifest) -> int:
    """How much was measured, as plans count: ablations, injections, and texts for each autoencoder that reads them."""
    texts = ("unit_id", "sae", "sae_version", "site")
    distinct = {
        "ablations": ("unit_id", "ablation_id"),
        "sae_features": (*texts, "prompt_id"),
        "sae_injections": ("unit_id", "ablation_id"),
        "sae_ablations": (*texts, "prompt_id"),
    }

    def counts() -> pl.LazyFrame:
        kinds = [store.scan(table, run.run).select(*key).unique().select(n=pl.len()) for table, key in distinct.items()]
        quality = store.scan("sae_quality", run.run).select(*texts, "texts").unique().select(n=pl.col("texts").sum())
        return pl.concat([kind.cast(pl.Int64) for kind in (*kinds, quality)]).sum()

    return collect(counts).item()
