"""What is shown to people when something is their mistake, or the machine's, rather than raymi's."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

MOST_QUOTED = 300
"""Characters of a value that an error quotes; the rest of it is not even looked at."""
MOST_SAID = 8_000
"""Characters of an error, whatever it is made of: nobody reads more, and a log should not have to keep it."""


class UserError(Exception):
    """A mistake its maker can mend. The command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: what is wrong and where (file, line, field, model).
        hint: what to do next; printed on its own line.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        self.what = shortened(what, MOST_SAID)
        super().__init__(self.what)
        self.hint = hint and shortened(hint, MOST_SAID)

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which is no text: it can be written neither to a file nor to a terminal."""


def quoted(value: object) -> str:
    """`repr(value)`, or how it begins: values from files may be of any size, and come to more than was written."""
    if isinstance(value, str) and len(value) > MOST_QUOTED:
        return f"{value[:MOST_QUOTED]!r}… ({len(value):,} characters)"
    said = ""
    for piece in _pieces(value):
        said += piece
        if len(said) > MOST_QUOTED:
            return said[:MOST_QUOTED] + "…"
    return said


def shortened(text: str, most: int) -> str:
    """`text`, or how it begins and how much there is of it."""
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]}… ({left:,} more characters)"


def _pieces(value: object) -> Iterator[str]:
    match value:
        case dict():
            yield "{"
            for at, (key, each) in enumerate(cast(dict[Any, Any], value).items()):
                yield ", " if at else ""
                yield from _pieces(key)
                yield ": "
                yield from _pieces(each)
            yield "}"
        case list() | tuple():
            yield "[" if isinstance(value, list) else "("
            for at, each in enumerate(cast(list[Any], value)):
                yield ", " if at else ""
                yield from _pieces(each)
            yield "]" if isinstance(value, list) else ",)" if len(cast(tuple[Any, ...], value)) == 1 else ")"
        case str():
            yield repr(value[: MOST_QUOTED + 1])
        case bytes() | bytearray():
            yield repr(bytes(islice(value, MOST_QUOTED + 1)))
        case int() if value.bit_length() > 1_000:  # Python refuses to write the largest ones
            yield hex(value >> (value.bit_length() - 1_000)) + "…"
        case _:
            yield repr(value)


_IN_WORDS = frozenset({"UserError", "Rejected", "Mismatch", "Impossible", "BadWeights", "RunLost", "DamagedError"})
"""Kinds of failures whose message says all: their names tell a user nothing more."""


def told(model: str, stage: str, kind: str | None, message: str | None) -> str:
    """A failure in one line, in which nothing is said twice.

    Args:
        model: what failed.
        stage: where: plan, load, 2 units, ...
        kind: of the error.
        message: of the error, which may begin with the model, and have a hint in a line of its own.
    """
    first, *hints = (message or "").removeprefix(f"{model}: ").splitlines() or [""]
    for hint in hints:
        first = (
            f"{first}{'' if first.endswith(('.', '!', '?', ':')) else '.'} {hint.strip()}" if hint.strip() else first
        )
    said = [model, stage, kind or "", first]
    if kind in _IN_WORDS:
        said = [model, "" if stage in ("plan", "select", "prompt") else stage, first]
    return ": ".join(part for part in said if part)
