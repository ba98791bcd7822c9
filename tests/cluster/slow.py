"""`raymi` with something slow in it, for the tests of signals: `python slow.py PHASE SECONDS -- run job.yaml ...`.

PHASE is where so much time is spent (`PLACES`); in `stuck`, weights are read by code that hears of no signal. Once it
is there, it says `in PHASE` on standard error.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

from raymi.cli.main import main

PLACES = {
    "read": ("raymi.cluster.worker", "read"),
    "weights": ("raymi.model.loading", "_read"),
    "stuck": ("raymi.model.loading", "_read"),
    "sites": ("raymi.model.hooked", "blocks"),
    "verify": ("raymi.cluster.worker", "Worker._verify"),
    "unit": ("raymi.cluster.worker", "Worker._measure"),
    "plan": ("raymi.cluster.agenda", "notices"),
}


def slowly(whole: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        print(f"in {PHASE}", file=sys.stderr, flush=True)
        if PHASE == "stuck":
            ctypes.CDLL(None).sleep(int(SECONDS))  # it lets others run, and hears nothing itself
        else:
            until = time.monotonic() + float(SECONDS)
            while time.monotonic() < until:
                time.sleep(0.01)
        return whole(*args, **kwargs)

    return slow


if __name__ == "__main__":
    from importlib import import_module

    PHASE, SECONDS = sys.argv[1:3]
    sys.argv = ["raymi", *sys.argv[4:]]
    module, place = PLACES[PHASE]
    *within, name = place.split(".")
    owner: Any = import_module(module)
    for each in within:
        owner = getattr(owner, each)
    setattr(owner, name, slowly(getattr(owner, name)))
    main()
