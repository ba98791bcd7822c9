"""Many types at a time, each in a process of its own."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

from tests.conformance import table
from tests.conformance.table import Line


def check_all(types: Sequence[str], processes: int, seconds: float, recorded: Mapping[str, Line]) -> dict[str, Line]:
    """One that crashes, or takes longer than `seconds`, ends nothing but itself."""
    context, found = multiprocessing.get_context("forkserver"), dict[str, Line]()
    context.set_forkserver_preload(["tests.conformance.checking"])
    with ThreadPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(_alone, context, of, seconds) for of in types]):
            line = done.result()
            found[line.type] = line
            worse, better = table.changes(recorded[line.type], line) if line.type in recorded else ([], ["new"])
            wrong = f"; known wrong: {' '.join(sorted(line.wrong))}" if line.wrong and not worse else ""
            told = "".join(f"\n    WORSE {one}" for one in worse) + "".join(f"\n    better: {one}" for one in better)
            print(f"{line.type:28} {line.outcome:9} {len(line.exact):2} exact{wrong}{told}", flush=True)
    return found


def _alone(context: Any, model_type: str, seconds: float) -> Line:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, there), daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            return here.recv()
        return Line(model_type, "crash", why=f"did not end within {seconds:.0f} s")
    except EOFError:
        process.join()
        return Line(model_type, "crash", why=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        here.close()


def _work(model_type: str, answer: Connection) -> None:
    from tests.conformance.checking import check

    answer.send(check(model_type))
