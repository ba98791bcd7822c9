"""Leaving the process while a thread of it is still computing, which nobody waits for any more."""

import os
import sys
import threading
from typing import NoReturn

_abandoned: list[threading.Thread] = []


def abandon(thread: threading.Thread) -> None:
    """What the thread is computing is not wanted any more, and it cannot be told so."""
    _abandoned.append(thread)


def leave(code: int | str | None) -> NoReturn:
    """Exits; what was printed has been flushed.

    An orderly exit would take away from under an abandoned thread what it computes with, which crashes.
    """
    if any(thread.is_alive() for thread in _abandoned):
        os._exit(code if isinstance(code, int) else code is not None)
    sys.exit(code)
