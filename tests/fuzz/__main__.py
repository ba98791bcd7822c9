"""Feeds raymi spoilt files: `python -m tests.fuzz --help`, and CONTRIBUTING.md."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # tables of a few rows

from tests.fuzz.guard import Fault, bounded, run
from tests.fuzz.targets import targets

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets())}; default: all")
    parser.add_argument("-n", type=int, default=1_000, help="inputs of each target (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10**9, help="end after so long")
    parser.add_argument("--keep", action="store_true", help=f"add what finds a fault to {CORPUS.name}/")
    given = parser.parse_args()
    quiet()
    bounded(6)
    faults: dict[tuple[str, str], Fault] = {}
    for name in given.targets or targets():
        target, counts, since = targets()[name], Counter[str](), time.monotonic()
        for number in range(given.first, given.first + given.n):
            if time.monotonic() - since > given.seconds:
                break
            input = target.draw(given.seed, number)
            result = run(input, dict(target.bases()[input.base]), target.check)
            counts["inputs"] += 1
            counts["structured"] += input.structured
            counts["accepted"] += result.accepted and result.fault is None
            if result.fault:
                counts["faults"] += 1
                if (name, result.fault.what) not in faults:
                    faults[name, result.fault.what] = result.fault
                    print(f"{name} {given.seed}/{number}: {result.fault.what}\n{result.fault.trace}", flush=True)
        took = time.monotonic() - since
        print(f"{name}: {', '.join(f'{n:,} {what}' for what, n in counts.items())}; {took:.0f} s", flush=True)
    if given.keep:
        for (name, what), fault in faults.items():
            keep(name, what, fault)
    return 1 if faults else 0


def keep(name: str, what: str, fault: Fault) -> None:
    """Adds an input to the corpus."""
    from dataclasses import replace

    with (CORPUS / f"{name}.jsonl").open("a") as file:
        file.write(replace(fault.input, about=what).line + "\n")


def quiet() -> None:
    """Has libraries say nothing of what they are given."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
