"""The way out for all that raymi prints: control characters are spelt out, and a stream that fails does no harm.

Names, keys and messages come from files that strangers wrote, and a terminal obeys what it is sent. So `install` puts
an `Outlet` in the place of standard output and standard error, and no command has to think of it.
"""

import errno
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all control characters but tab and line feed
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"  # what turns the direction of a text, and other ends of a line
    "\ud800-\udfff]"  # halves of a pair: no text at all
)
_PROGRESS = re.compile("\r *\r?|(?:\x1b\\[A|\n)+\\Z")
"""How a bar of huggingface_hub's comes back to its line: before anything else that it writes, or with nothing else."""
CLOSED, FULL = 128 + 13, 1
"""Exit codes: whoever read the output went away (as a shell says of SIGPIPE); it cannot be written."""


class OutputLost(SystemExit):
    """Standard output takes nothing more. Not for `except Exception`: there is nobody to go on for."""

    def __init__(self, error: OSError) -> None:
        gone = error.errno in (errno.EPIPE, errno.ESHUTDOWN)
        super().__init__(CLOSED if gone else FULL)
        self.why = None if gone else f"standard output cannot be written: {error.strerror or error}"
        """What to tell; None where nobody asks."""


def clean(text: str) -> str:
    r"""`text` with what a terminal would obey, and not show, spelt as JSON does: `\u001b`.

    In JSON it stands in strings only, so that a document cleaned is the same document.
    """
    return _OBEYED.sub(_spelt, text)


def _spelt(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


class Outlet(io.TextIOBase):
    """A stream that is written through `clean`.

    Args:
        stream: where to.
        matters: whether a command has no purpose without it, and ends by `OutputLost` when it fails. Else what it does
            not take is dropped: no run is lost for the sake of its progress.
    """

    def __init__(self, stream: TextIO, *, matters: bool) -> None:
        self.stream = stream
        self._matters = matters

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "strict"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str, /) -> int:
        moved = None if self._matters else _PROGRESS.match(text)
        kept = moved.end() if moved else 0
        self.pass_on(text[:kept] + clean(text[kept:]))
        return len(text)

    def pass_on(self, text: str) -> None:
        """Writes what is clean, or is to be obeyed; what the stream's encoding does not have is spelt out, too."""
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = "".join(c if _fits(c, self.encoding) else _escaped(c) for c in text)
        try:
            self.stream.write(text)
        except OSError as error:
            self._lose(error)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What is in its buffer would be tried again when the interpreter ends.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), self.stream.fileno())
        if self._matters:
            raise OutputLost(error) from None


class Controls(Outlet):
    """The same for what draws by itself with the terminal's controls, and cleans the text in it."""

    def write(self, text: str, /) -> int:
        self.pass_on(text)
        return len(text)


def install() -> None:
    """Has standard output and standard error written through outlets, once each, from now on."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # it was closed before raymi began; nothing that is opened later may be taken for it
            stream = _nowhere(number)
        if not isinstance(stream, Outlet):
            setattr(sys, name, Outlet(stream, matters=name == "stdout"))


def controls() -> TextIO:
    """Standard error for a display that draws with the terminal's controls."""
    stream: Any = sys.stderr
    return cast(TextIO, Controls(stream.stream, matters=False) if isinstance(stream, Outlet) else stream)


def _nowhere(number: int) -> TextIO:
    while (opened := os.open(os.devnull, os.O_RDWR)) < number:
        pass  # a lower one was closed as well, and is now taken
    return os.fdopen(opened, "w", encoding="utf-8")


def _fits(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    pair = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{pair[at]:02x}{pair[at + 1]:02x}" for at in range(0, len(pair), 2))
