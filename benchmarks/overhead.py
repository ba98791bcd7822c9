"""What a whole `raymi run` takes beside measuring: planning, rows, the store, and Ray.

`python -m benchmarks.overhead` measures the same ablations three times: by the engine with its metrics alone, by a run
in this process, and by a run on a local Ray. Start-up apart: a run's clock starts when its model is loaded.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

import raymi.store
from benchmarks.cases import DEMO
from benchmarks.report import append_tables, print_tables, setting
from demo.models import cache_directory
from raymi import catalog
from raymi.cluster.frozen import Cache
from raymi.cluster.sweep import Order, sweep
from raymi.experiments.effects import answers, effects
from raymi.experiments.knockout.run import masks
from raymi.experiments.unit import Unit
from raymi.job import Job, make_job
from raymi.model.engine import Engine
from raymi.model.hooked import Cell
from raymi.model.loading import load
from raymi.model.metrics import Comparison
from raymi.plan.units import units
from raymi.prompts import TokenizedPrompt, tokenize
from raymi.tokenizer import load_tokenizer

NOTES = """\
The same ablations each time; seconds from the moment when the model is loaded. What a run adds is its plan, rows, files
and, on Ray, a second process that takes them in while the first one measures on all cores.\
"""
MOST = 0.1
"""What a run may add."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=30, help="each gives 3,510 ablations; at least 2")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append a section to this file")
    options = parser.parse_args(arguments)
    job = _job(options.prompts)
    n, alone, head = _engine_and_metrics(job)
    found = [("engine and metrics alone", alone)]
    found += [(name, _whole_run(job, inline=inline)) for name, inline in WAYS.items()]
    made = {f"a whole run of {n:,} ablations": _table(n, found)}
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print("\n".join(head), markup=False, highlight=False)
    print_tables(made, NOTES, console)
    if options.markdown:
        append_tables(options.markdown, head, "", made, NOTES)


WAYS = {"raymi run --inline": True, "raymi run, a local Ray": False}


def _table(n: int, found: Sequence[tuple[str, float]]) -> list[list[str]]:
    (first, alone), *others = found
    rows = [["", "seconds", "ms an ablation", "added", f"aim: at most +{MOST:.0%}"]]
    rows.append([first, f"{alone:.1f}", f"{1e3 * alone / n:.3f}", "", ""])
    for name, seconds in others:
        added = seconds / alone - 1
        judged = "met" if added <= MOST else "NOT MET"
        rows.append([name, f"{seconds:.1f}", f"{1e3 * seconds / n:.3f}", f"{added:+.1%}", judged])
    return rows


def _job(n_prompts: int) -> Job:
    texts = [f"In the year {1900 + i} the capital of France was" for i in range(n_prompts)]
    experiment = {"kind": "knockout", "layers": "all", "heads": {"each": "all"}, "keys": {"each": "all"}}
    return make_job(
        {
            "name": "overhead",
            "models": DEMO.id,
            "prompts": [{"text": text, "answer": " Paris", "wrong": " London"} for text in texts],
            "experiments": [experiment],
        }
    )


def _engine_and_metrics(job: Job) -> tuple[int, float, list[str]]:
    """How many ablations the job has, the seconds that they take without a run around them, and where that was."""
    model = catalog.find(DEMO.id, cache_directory() / "hub")
    read = tokenize(job.prompts, load_tokenizer(model), bos=job.bos, chat_template=False)
    prompts = {prompt.prompt.id: prompt for prompt in read}
    work = [unit for spec in job.experiments for unit in units(job, spec, model, read)]
    engine = load(model.path, name=model.id, longest=max(len(prompt.token_ids) for prompt in read)).engine
    head = setting(DEMO.id, engine.model, engine.way, {}, quick=False)
    _measure(engine, work[0], prompts)  # warm-up
    started = time.perf_counter()
    for unit in work:
        _measure(engine, unit, prompts)
    return sum(unit.n_ablations for unit in work), time.perf_counter() - started, head


def _measure(engine: Engine, unit: Unit, prompts: dict[str, TokenizedPrompt]) -> None:
    of_unit = [prompts[prompt_id] for prompt_id, _ in unit.items]
    cells = [Cell(p, masks(ablation)) for p, (_, its) in enumerate(unit.items) for ablation in its]
    for batch in engine.ablations(torch.tensor([prompt.token_ids for prompt in of_unit]), cells):
        compared = Comparison(batch.clean_PV, batch.ablated_AV, batch.prompt_A)
        effects(compared, 10)
        answers(compared, [of_unit[cells[i].prompt] for i in batch.cells])


def _whole_run(job: Job, *, inline: bool) -> float:
    """Seconds from the moment when the model is loaded until the command would end."""
    with tempfile.TemporaryDirectory() as folder:
        store = raymi.store.open(folder)
        order = Order(job, "benchmark", job.run_name, Cache(cache_directory() / "hub"), inline=inline)
        result = sweep(order, store)
        ended = datetime.now(UTC)
        assert not result.failed, result
        loaded = store.scan("models", job.run_name).select("loaded_at").collect().item()
    return (ended - loaded).total_seconds()


if __name__ == "__main__":
    main()
