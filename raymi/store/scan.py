"""Files of rows as one lazy frame of the pinned schema."""

from collections.abc import Iterable

import polars as pl

from raymi.store.objects import Objects
from raymi.store.schemas import SCHEMAS


def scan(objects: Objects, table: str, keys: Iterable[str], *, path: bool = False) -> pl.LazyFrame:
    """Rows of the given files, which may have been written before a column was added, or after.

    Returns:
        The columns of the table's schema, always all of them, and `run` and `model` (the slug), both strings; and, if
        asked for, `path`, the file.
    """
    schema = dict(pl.Schema(SCHEMAS[table]))
    files = [objects.uri(key) for key in keys]
    if not files:
        return pl.LazyFrame(schema=schema | {"run": pl.String(), "model": pl.String()})
    # Partitions come from the path by pattern: hive parsing also takes any `x=y` above the store for one.
    frame = pl.scan_parquet(
        files,
        schema=schema,
        glob=False,
        hive_partitioning=False,
        missing_columns="insert",
        extra_columns="ignore",
        include_file_paths="path",
    )
    place = pl.col("path").str.replace_all("\\", "/", literal=True)
    return frame.select(
        *schema,
        place.str.extract(r"/run=([^/]+)/model=[^/]+/[^/]+$").alias("run"),
        place.str.extract(r"/model=([^/]+)/[^/]+$").alias("model"),
        *(["path"] if path else []),
    )
