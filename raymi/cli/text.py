"""How numbers are written for people."""

import os
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from textwrap import wrap


def count(number: int | None) -> str:
    """A number of parameters: 134.5M."""
    return "-" if number is None else _scaled(number, ("", "K", "M", "B", "T"), digits=1)


def size(n_bytes: int) -> str:
    """A number of bytes: 257 MB."""
    return _scaled(n_bytes, (" B", " kB", " MB", " GB", " TB"), digits=0 if n_bytes < 999_500_000 else 1)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int], width: int) -> list[str]:
    """Lines of a table whose first column is folded so that it fits into `width` characters, if it can.

    For tables that must be there at once: rich takes a tenth of a second for 200 rows.

    Args:
        header: the names of the columns.
        rows: the cells.
        right: the columns that are aligned to the right.
        width: of the terminal; 0 folds nothing.
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rest = sum(widths[1:]) + 2 * len(widths[1:])
    widths[0] = min(widths[0], max(20, width - rest)) if width else widths[0]
    lines: list[str] = []
    for row in cells:
        first, *more = wrap(row[0], widths[0], subsequent_indent="  ") or [""]
        aligned = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines += ["  ".join([first.ljust(widths[0]), *aligned[1:]]).rstrip(), *more]
    return lines


def terminal_width() -> int:
    """Characters in a line, or 0 where no person reads: what goes into a pipe is not folded."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 0


def _scaled(number: float, units: tuple[str, ...], *, digits: int) -> str:
    step = 0
    while round(number, digits) >= 1000 and step < len(units) - 1:
        number /= 1000
        step += 1
    return f"{number:.{digits if step else 0}f}{units[step]}"
