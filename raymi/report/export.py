"""A report as files and as JSON, for other programs."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl

from raymi.errors import UserError
from raymi.report.tables import Report, status

Format = Literal["csv", "parquet"]


def as_json(value: Any) -> str:
    """JSON with times in ISO 8601."""
    return json.dumps(value, indent=2, default=datetime.isoformat, ensure_ascii=False)


def as_record(report: Report) -> dict[str, Any]:
    """A report as JSON values: the run, and every table as a list of records."""
    run = report.run.model_dump(mode="json", include={"run", "created_at", "status_at", "commits", "versions"})
    return {
        **run,
        "status": status(report.run, report.driven),
        "measured": report.measured,
        "damaged": report.damaged,
        "lacking": report.lacking,
        **{name: frame.to_dicts() for name, frame in _frames(report).items()},
        "mismatches": report.mismatches.to_dicts(),
        **{name: frame.to_dicts() for name, frame in _left_out(report).items()},
        "former_prompts_in_sums": report.left_out.mixed,
        **{name: frame.to_dicts() for name, frame in report.saes.tables.items()},
    }


def write(report: Report, path: Path, kind: Format) -> list[Path]:
    """Writes the tables into the folder `path`, or the first as the file `path`.

    They are `models`, `answers`, `layers`, `heads` and `failures`, and what is not empty of `mismatches`, `superseded`,
    `former_prompts` and those of autoencoders (`sae_quality`, ...).

    Args:
        report: what to write.
        path: a file when it ends like one (`.csv`, `.parquet`), else a folder, which is made.
        kind: of the files.

    Returns:
        What was written.

    Raises:
        UserError: it cannot be written there.
    """
    suffix = f".{kind}"
    if path.suffix == suffix:
        files = {path: report.models}
    else:
        others = {"mismatches": report.mismatches, **_left_out(report), **report.saes.tables}
        frames = {**_frames(report), **{name: frame for name, frame in others.items() if not frame.is_empty()}}
        files = {path / f"{name}{suffix}": frame for name, frame in frames.items()}
    try:
        for file, frame in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            _writer(frame, kind)(file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return list(files)


def _frames(report: Report) -> dict[str, pl.DataFrame]:
    names = ("models", "answers", "layers", "heads", "failures")
    return {name: getattr(report, name) for name in names}


def _left_out(report: Report) -> dict[str, pl.DataFrame]:
    return {"superseded": report.left_out.superseded, "former_prompts": report.left_out.prompts}


def _writer(frame: pl.DataFrame, kind: Format) -> Callable[[Path], None]:
    return partial(frame.write_csv, datetime_format="%+") if kind == "csv" else frame.write_parquet
