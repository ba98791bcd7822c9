"""raymi and its peers side by side: what an ablation costs, in one process, with the same weights and threads.

`python -m benchmarks.ablations --help` says how; on a GPU: `--device cuda --dtype bfloat16 --shape 8b`.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.arithmetic import Arithmetic, PeakMemory, matmul_rate, timed
from benchmarks.cases import SHAPES, Case, Part, cases, load_demo, make_shape, twin
from benchmarks.peers import PEERS, Peer
from benchmarks.report import append_markdown, print_report, setting
from benchmarks.results import FULL, FULL_EACH, Measured, PeerResult
from raymi.model import memory
from raymi.model.cone import Cone
from raymi.model.engine import Engine, measure_capability
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.linear import lay_out
from raymi.model.loading import DTYPES, pick_device
from raymi.model.metrics import Comparison
from raymi.model.sizes import POSITIONS_PER_BATCH

At = tuple[int, int]
"""An ablation of a case: which part, and which of its cells."""


@dataclass(frozen=True)
class Budget:
    """How long a measurement may go on once it has its least."""

    rounds: int
    """Of raymi, at least."""
    seconds: float
    cells: int
    """Of a peer, at least, and at most ten times as many."""


WIDTH = 190
"""Of the tables in a file or a pipe."""

THOROUGH, QUICK = Budget(3, 10.0, 3), Budget(1, 1.0, 2)


@dataclass
class Contest:
    """raymi and every peer that can be imported, each around its own modules with the same weights.

    Peers share theirs. raymi's are a copy, since it stores them in an order of its own on some processors.
    """

    engine: Engine
    peers: dict[str, Peer]
    missing: dict[str, str]
    budget: Budget
    arithmetic: Arithmetic = field(init=False)

    @classmethod
    def of(cls, model: PreTrainedModel, budget: Budget) -> "Contest":
        peers: dict[str, Peer] = {}
        missing: dict[str, str] = {}
        for name, make in PEERS.items():
            try:
                peers[name] = make(twin(model))
            except ImportError as error:
                missing[name] = str(error)
        # As `raymi.model.loading.load` does. What is freed is kept for the peers, too: it is the process's.
        memory.keep_what_is_freed()
        ours = copy.deepcopy(model)
        lay_out(ours)
        hooked = HookedModel(ours, "the benchmark's model")
        capability = measure_capability(hooked, 12)
        peers[FULL_EACH] = lambda ids_1T, cuts: hooked.forward(ids_1T, [cuts]).logits_BV[0]
        return cls(Engine(hooked, capability, capability.way), peers, missing, budget)

    def __post_init__(self) -> None:
        self.arithmetic = Arithmetic(self.engine.model)

    @property
    def device(self) -> torch.device:
        return self.engine.model.device

    # -- one case ----------------------------------------------------------------------------------------------------

    def run(self, case: Case) -> Measured:
        sample = _spread(case, 10 * self.budget.cells)
        with PeakMemory(self.device) as peak:
            found = self._logits(case, sample)  # this is the warm-up, too
            rates = [self._rate()]
            rounds = list(self._rounds(case))
            rates.append(self._rate())
        n = case.n_cells
        sweep, metrics = (statistics.median(times) / n for times in zip(*rounds, strict=True))
        clean = 0.0 if case.clean_counts else statistics.median(self._clean_runs(case))
        peers, differences, effect = self._peers(case, sample, found)
        peers[FULL] = self._full(case)
        return Measured(
            name=case.name,
            about=case.about,
            n_cells=n,
            seconds=sweep,
            seconds_with_metrics=sweep + metrics,
            clean_seconds=clean,
            flops=self._needed(case) / n,
            matmul_rates=(rates[0], rates[1]),
            peak_bytes=peak.bytes,
            peers=peers,
            difference=differences,
            effect=effect,
        )

    def _needed(self, case: Case) -> int:
        needed = 0
        for ids_PT, cells in case.parts:
            n_prompts, n_tokens = ids_PT.shape
            needed += self.arithmetic.cone(n_tokens, cells)
            needed += n_prompts * self.arithmetic.clean(n_tokens) if case.clean_counts else 0
        return needed

    def _rate(self) -> float:
        return matmul_rate(self.device, self.engine.model.dtype)

    def _enough(self, done: int, least: int, most: int, started: float) -> bool:
        return done >= most or (done >= least and time.perf_counter() - started > self.budget.seconds)

    # -- raymi -------------------------------------------------------------------------------------------------------

    def _logits(self, case: Case, sample: Sequence[At]) -> dict[At, Tensor]:
        """Logits of the sample, found while measuring all of the case."""
        wanted, found = set(sample), dict[At, Tensor]()
        for p, part in enumerate(case.parts):
            for batch in self.engine.ablations(*part):
                for i, logits_V in zip(batch.cells, batch.ablated_AV, strict=True):
                    if (p, i) in wanted:
                        found[p, i] = logits_V.clone()
        return found

    def _rounds(self, case: Case) -> Iterator[tuple[float, float]]:
        """Seconds of all ablations of a case, without metrics, and of the metrics."""
        started, done = time.perf_counter(), 0
        while not self._enough(done, min(self.budget.rounds, case.rounds), case.rounds, started):
            yield self._round(case)
            done += 1

    def _round(self, case: Case) -> tuple[float, float]:
        metrics = 0.0

        def work() -> None:
            nonlocal metrics
            if case.clean_counts:
                self.engine.cones.clear()
            for part in case.parts:
                for batch in self.engine.ablations(*part):
                    metrics += timed(self.device, lambda batch=batch: _metrics(batch))

        total = timed(self.device, work)
        return total - metrics, metrics

    def _clean_runs(self, case: Case) -> Iterator[float]:
        """Seconds of what comes before the first ablation of a prompt."""
        ids_PT, cells = case.parts[0]
        first = min(cell.first_query for cell in cells)
        for _ in range(self.budget.rounds):
            yield timed(self.device, lambda: Cone(self.engine.model, ids_PT, first))

    def _full(self, case: Case) -> PeerResult:
        """raymi's own full forwards, in batches as large as it makes them."""
        ids_PT, cells = case.parts[len(case.parts) // 2]
        engine = Engine(self.engine.model, self.engine.capability, "full")
        rows = POSITIONS_PER_BATCH[self.device.type] // ids_PT.shape[1]
        each = 2 if case.clean_counts else 1  # every prompt has its clean row there
        chosen = _apart(cells, max(1, rows // each - 1))
        ids_PT = ids_PT[sorted({cell.prompt for cell in chosen})] if case.clean_counts else ids_PT
        chosen = [Cell(p, cell.interventions) for p, cell in enumerate(chosen)] if case.clean_counts else chosen
        started, times = time.perf_counter(), list[float]()
        while not self._enough(len(times), 1, 5, started):
            times.append(timed(self.device, lambda: list(engine.ablations(ids_PT, chosen))))
        return PeerResult(statistics.median(times) / len(chosen), len(chosen), None)

    # -- peers -------------------------------------------------------------------------------------------------------

    def _peers(
        self, case: Case, sample: Sequence[At], found: dict[At, Tensor]
    ) -> tuple[dict[str, PeerResult], float, float]:
        """What peers took, how far raymi is off the plain loop, and its largest effect. All in logits."""
        truth: dict[At, Tensor] = {}
        results: dict[str, PeerResult] = {}
        for name, peer in self.peers.items():
            seconds, logits = self._peer(case, sample, peer)
            truth = truth or logits  # the plain loop is the first
            results[name] = PeerResult(seconds, len(logits), _largest(logits, truth))
        return results, _largest(found, truth), self._effect(case, truth)

    def _effect(self, case: Case, ablated: dict[At, Tensor]) -> float:
        clean: dict[tuple[int, int], Tensor] = {}
        largest = 0.0
        for (p, i), logits_V in ablated.items():
            ids_1T, cell = _at(case.parts[p], i)
            if (p, cell.prompt) not in clean:
                clean[p, cell.prompt] = self.peers["plain loop"](ids_1T.to(self.device), ())
            largest = max(largest, float((logits_V - clean[p, cell.prompt]).abs().max()))
        return largest

    def _peer(self, case: Case, sample: Sequence[At], peer: Peer) -> tuple[float, dict[At, Tensor]]:
        """Seconds of an ablation, and the logits."""
        logits, times = dict[At, Tensor](), list[float]()
        self._measure(case, sample[0], peer)  # warm-up
        started = time.perf_counter()
        for at in sample:
            if self._enough(len(times), self.budget.cells, len(sample), started):
                break
            seconds, logits[at] = self._measure(case, at, peer)
            times.append(seconds)
        return statistics.median(times), logits

    def _measure(self, case: Case, at: At, peer: Peer) -> tuple[float, Tensor]:
        ids_1T, cell = _at(case.parts[at[0]], at[1])
        ids_1T, logits = ids_1T.to(self.device), list[Tensor]()

        def work() -> None:
            if case.clean_counts:
                peer(ids_1T, ())
            logits.append(peer(ids_1T, cell.interventions).float().clone())

        return timed(self.device, work), logits[0]


def _at(part: Part, index: int) -> tuple[Tensor, Cell]:
    cell = part.cells[index]
    return part.ids_PT[cell.prompt : cell.prompt + 1], cell


def _metrics(batch: Batch) -> None:
    """What a row of results needs: distances, most changed tokens, an answer and a wrong answer."""
    compared = Comparison(batch.clean_PV, batch.ablated_AV, batch.prompt_A)
    compared.effects(10)
    answer, wrong = (torch.full_like(batch.prompt_A, token) for token in (11, 42))
    compared.token(answer)
    compared.token(wrong)
    compared.ranks(answer)


def _largest(logits: dict[At, Tensor], truth: dict[At, Tensor]) -> float:
    return max(float((logits[at] - truth[at]).abs().max()) for at in logits.keys() & truth.keys())


def _apart(cells: Sequence[Cell], n: int) -> list[Cell]:
    """At most `n`, evenly spread."""
    n = min(n, len(cells))
    return [cells[(2 * i + 1) * len(cells) // (2 * n)] for i in range(n)]


def _spread(case: Case, n: int) -> list[At]:
    """(part, cell) of at most `n` ablations, every beginning of which is spread over all of the case."""
    every = [(p, i) for p, part in enumerate(case.parts) for i in range(len(part.cells))]
    golden = 0.6180339887498949
    return list(dict.fromkeys(every[int((0.5 + i * golden) % 1 * len(every))] for i in range(n)))


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="few repetitions: does it run, and is it right?")
    made.add_argument("--only", action="append", metavar="CASE", help="only the cases whose name begins so; repeatable")
    made.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", choices=DTYPES)
    made.add_argument("--shape", choices=SHAPES, help="random weights of this shape in place of the demo model")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="append a section to this file")
    return made


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device, dtype = str(pick_device(options.device)), DTYPES[options.dtype]
    name, model, stream = make_shape(options.shape, dtype, device) if options.shape else load_demo(dtype, device)
    contest = Contest.of(model, QUICK if options.quick else THOROUGH)
    hooked = contest.engine.model
    head = setting(name, hooked, contest.engine.way, contest.missing, quick=options.quick)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print("\n".join(head), markup=False, highlight=False)
    results: list[Measured] = []
    for case in cases(stream, hooked.n_layers, hooked.n_heads, options.quick):
        if options.only and not case.name.startswith(tuple(options.only)):
            continue
        console.print(f"{case.name}: {case.about} ({case.n_cells} ablations) ...", markup=False, highlight=False)
        results.append(contest.run(case))
    if not results:
        raise SystemExit(f"no case begins with {' or '.join(options.only)}")
    print_report(results, options.dtype, console)
    if options.markdown:
        append_markdown(options.markdown, head, results, options.dtype)


if __name__ == "__main__":
    main()
