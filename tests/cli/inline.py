"""The command line in this process: quick, and what it finds can be looked at."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest

import raymi.store
from raymi.cli.main import main


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """A folder to work in, with `cache` for models and `store` for results."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._captured = folder, monkeypatch, capfd
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "80")

    def __call__(self, *arguments: str) -> Said:
        """`raymi` with these arguments."""
        self._patch.setattr(sys, "argv", ["raymi", *arguments])
        self._captured.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = self._captured.readouterr()
        return Said(int(exit.value.code or 0), out, err)

    def run(self, *arguments: str, job: str = "job.yaml") -> Said:
        """`raymi run` on the job, without Ray."""
        return self("run", job, "--inline", "--store", "store", "--cache-dir", "cache", *arguments)

    def rows(self, table: str = "ablations") -> pl.DataFrame:
        return raymi.store.open("store").scan(table).collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small take longer by two threads, and much longer on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
