"""How numbers are written for people."""

import os
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

from raymi.outlet import clean


def count(number: int | None) -> str:
    """A number of parameters: 134.5M."""
    return "-" if number is None else _scaled(number, ("", "K", "M", "B", "T"), digits=1)


def size(n_bytes: int) -> str:
    """A number of bytes: 257 MB."""
    return _scaled(n_bytes, (" B", " kB", " MB", " GB", " TB"), digits=0 if n_bytes < 999_500_000 else 1)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int], width: int) -> list[str]:
    """Lines of a table that is there at once: rich takes a tenth of a second for 200 rows.

    What in the first column does not fit into the width gets a line of its own, so that it can still be copied.

    Args:
        header: the names of the columns.
        rows: the cells.
        right: the columns that are aligned to the right.
        width: of the terminal in characters; 0 for as wide as it gets.
    """
    cells = [[clean(cell) for cell in row] for row in (header, *rows)]  # before they are measured
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width:
        rest = width - sum(widths[1:]) - 2 * len(widths[1:])
        widths[0] = max(len(row[0]) for row in cells if len(row[0]) <= max(rest, len(header[0])))
    lines: list[str] = []
    for first, *others in cells:
        if len(first) > widths[0]:
            lines.append(first)
            first = ""
        aligned = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip((first, *others), widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return lines


def number(value: float | None, sign: str = "") -> str:
    """A measurement: 0.0498, 1.2e-05, or - where there is none; `sign` is `+` for one that may go either way."""
    if value is None:
        return "-"
    return f"{value:{sign}.1e}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4f}"


def formatted(value: float | None, form: str) -> str:
    """A number as `format` writes it, or - where a store that somebody has changed has none."""
    return "-" if value is None else format(value, form)


def plural(n: int, noun: str) -> str:
    """1 model, 2 models."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def bars(values: Sequence[float | None]) -> list[str]:
    """Values as one character each, by their size relative to the largest; `-` stands before one below zero, and a dot
    in the place of one that is not there.
    """
    glyphs = "▁▂▃▄▅▆▇█" if (sys.stdout.encoding or "").lower().startswith("utf") else "12345678"
    none = "·" if glyphs[0] == "▁" else "."
    largest = max((abs(value) for value in values if value is not None), default=0) or 1

    def bar(value: float | None) -> str:
        if value is None:
            return none
        size = round(abs(value) / largest * (len(glyphs) - 1))
        return ("-" if value < 0 else "") + glyphs[size]

    return [bar(value) for value in values]


def terminal_width() -> int:
    """Characters in a line, or 0 where no person reads: what goes into a pipe is not folded."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 0


def _scaled(number: float, units: tuple[str, ...], *, digits: int) -> str:
    step = 0
    while round(number, digits) >= 1000 and step < len(units) - 1:
        number /= 1000
        step += 1
    return f"{number:.{digits if step else 0}f}{units[step]}"
