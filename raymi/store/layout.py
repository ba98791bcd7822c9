"""Where things stand in a store.

```
runs/<run>/manifest.json                                      the newest word of the run's driver
runs/<run>/epochs/e0003.json                                  the same by each driver; who creates it has the run
runs/<run>/heartbeats/e0003                                   renewed while that driver lives
<table>/run=<run>/model=<slug>/e0003-000012-1f2e3d4c.parquet  rows; epoch and sequence number in the name
```
"""

import re
import secrets

from raymi.errors import UserError

NO_MODEL = "_"
"""Slug of rows that belong to no model (events of the whole run)."""

_EPOCH = re.compile(r"e(\d+)")
_ROWS = re.compile(r"\w+/run=[^/]+/model=[^/]+/e\d+-\d+-[0-9a-f]{8}\.parquet")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def run_name(name: str) -> str:
    """`name`, which becomes a folder and a partition value.

    Raises:
        UserError: it cannot be one.
    """
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"a run cannot be named {name!r}", hint="Allowed: letters, digits, dot, underscore and hyphen.")
    return name


def slug(model_id: str) -> str:
    """A model id as one safe path segment: `org/name` -> `org--name`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", model_id.replace("/", "--"))


def manifest(run: str) -> str:
    return f"runs/{run}/manifest.json"


def epochs(run: str) -> str:
    return f"runs/{run}/epochs"


def epoch(run: str, number: int) -> str:
    return f"{epochs(run)}/e{number:04}.json"


def clock(run: str) -> str:
    """An object that is put only to learn the time of the store."""
    return f"runs/{run}/clock-{secrets.token_hex(4)}"


def heartbeat(run: str, number: int) -> str:
    return f"runs/{run}/heartbeats/e{number:04}"


def partition(table: str, run: str) -> str:
    return f"{table}/run={run}"


def rows(table: str, run: str, model_slug: str, number: int, sequence: int) -> str:
    """A new file of a driver. The random part keeps apart what two drivers of one epoch could only write by a bug."""
    return f"{partition(table, run)}/model={model_slug}/e{number:04}-{sequence:06}-{secrets.token_hex(4)}.parquet"


def is_epoch(key: str) -> bool:
    """Whether a file is named as a driver names its epoch."""
    return re.fullmatch(r"e\d+\.json", key.rpartition("/")[2]) is not None


def epoch_of(key: str) -> int:
    """The epoch that the name of a file of rows, or of an epoch itself, carries."""
    found = _EPOCH.match(key.rpartition("/")[2])
    if not found:
        raise ValueError(f"{key} carries no epoch")
    return int(found[1])


def is_rows(key: str) -> bool:
    """Whether a driver of raymi's named the file: anything else in a store is somebody else's and is left alone."""
    return _ROWS.fullmatch(key) is not None


def group_of(key: str) -> tuple[str, str]:
    """(table, model slug) of a file of rows."""
    table, _, model, _ = key.split("/")
    return table, model.removeprefix("model=")
