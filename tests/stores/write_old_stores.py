"""Wrote the stores beside it, by the raymi of commit b1501e9: runs of every shipped job that were stopped half-way.

    RAYMI_DEMO_HUB=~/.cache/raymi/hub python -m tests.stores.write_old_stores FOLDER

`test_old_stores` goes on with copies of them. A raymi that is newer than that must not write them again: that what an
older one has left is gone on with is what they are for.
"""

import os
import signal
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from raymi.cli.main import main
from raymi.cluster.worker import Worker

GLASS = ("raymi-demo/glassllm-en",)
SMOL = ("raymi-demo/SmolLM2-135M-Instruct-Q4_1",)


class Old(NamedTuple):
    """How a shipped job was made small, and how far it came."""

    models: tuple[str, ...]
    sets: tuple[str, ...]
    units: int
    """After so many it was stopped."""

    def arguments(self, name: str, store: str, cache: str) -> list[str]:
        """Of `raymi`, from the repository's root."""
        models = [word for model in self.models for word in ("--models", model)]
        sets = [word for field in self.sets for word in ("--set", field)]
        where = ["--inline", "--store", store, "--cache-dir", cache]
        return ["run", f"jobs/{name}.yaml", *where, *models, *sets]


_CORPUS = ("corpus.context=32", "corpus.chunks=4")
OLD = {
    "knockout": Old((*GLASS, "raymi-demo/glassllm-pt"), (), 1),
    "heads": Old(GLASS, ("unit_ablations=4",), 2),
    "subject": Old(GLASS, ("unit_ablations=8",), 3),
    "demo": Old(
        (*GLASS, *SMOL), ("unit_ablations=8", "experiments.0.layers={each: [1, 3]}", "experiments.2.corpus.chunks=4"), 8
    ),
    "sae": Old(
        SMOL,
        (
            "unit_ablations=8",
            "verify=1",
            *(f"experiments.{at}.{field}" for at in (0, 1) for field in _CORPUS),
            "experiments.2.prompts=capitals/France",
            "experiments.3.prompts=capitals/France",
            "experiments.4.layers={each: [10, 20, 29]}",
        ),
        6,
    ),
}


def write(name: str, folder: Path, cache: str) -> None:
    """Runs a job until as many units are measured as it says, and then as Ctrl-C ends it."""
    measure, left = Worker._measure, OLD[name].units  # pyright: ignore[reportPrivateUsage]

    def counted(worker: Worker, unit: Any) -> Any:
        nonlocal left
        done = measure(worker, unit)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    Worker._measure = counted  # pyright: ignore[reportPrivateUsage]
    sys.argv = ["raymi", *OLD[name].arguments(name, str(folder / name), cache)]
    try:
        main()
    except SystemExit as exit:
        if exit.code != 130:
            raise
    finally:
        Worker._measure = measure  # pyright: ignore[reportPrivateUsage]


def nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without whose it was."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    socket.gethostname = lambda: "a-machine"
    for name in sys.argv[2:] or [*OLD]:
        write(name, folder, os.environ["RAYMI_DEMO_HUB"])
        with tarfile.open(folder / f"{name}.tar.xz", "w:xz") as packed:
            packed.add(folder / name, name, filter=nobody)
