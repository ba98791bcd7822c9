"""What a command would do, and what that would take, without loading a model or touching the store."""

import sys
import time
from collections.abc import Iterator, Mapping

from raymi.catalog import CachedModel
from raymi.cluster.agenda import Agenda, done_units, in_few_lines, settled, stored
from raymi.cluster.frozen import choose, freeze_prompts
from raymi.cluster.sweep import Order, draft, keys, worker
from raymi.cluster.tokenised import from_rows
from raymi.cluster.worker import Failed
from raymi.experiments.unit import Unit
from raymi.plan.estimate import Estimate, Rates, estimate
from raymi.prompts import TokenizedPrompt
from raymi.store import ownership
from raymi.store.reader import Store

LOAD_BYTES = 1.5e9
"""Bytes of float32 weights a second, converted from what is on disk, measured on two cores."""
START_SECONDS = 7.0
"""Of a replica's process: Python, torch, transformers, and the checks after the load."""
STEP_SECONDS = 3e-4
PROCESS_BYTES = 590 * 2**20
"""Of a replica on Ray with torch and transformers imported, measured; one in this process takes a little less."""


def rehearse(order: Order, store: Store) -> Iterator[tuple[str, list[Unit] | Failed, Estimate | None]]:
    """Per model what is left to measure, or why it cannot be, and an estimate for one replica on this machine.

    Raises:
        UserError: as `sweep` does before it starts.
    """
    rates: Rates | None = None
    for key, model, left, prompts in plans(order, store):
        if model is None or isinstance(left, Failed) or not left:
            yield key, left, None
            continue
        rates = rates or measure(order.job.device)
        yield key, left, estimate(order.job, model, left, prompts, rates)


Plan = tuple[str, CachedModel | None, list[Unit] | Failed, Mapping[str, TokenizedPrompt]]
"""What names a model, it (None where it cannot be had), what is left to measure or why not, and its prompts by id."""


def plans(order: Order, store: Store | None) -> Iterator[Plan]:
    """Per model what is left to measure, as its own tokenizer reads the prompts, or why it cannot be measured.

    Args:
        order: the command.
        store: where its run may have begun; None: as if it had not.

    Raises:
        UserError: as `sweep` does before it starts.
    """
    earlier = ownership.read(store.objects, order.run) if store else None
    manifest = draft(order, earlier)
    choice = choose(order.job, order.cache, manifest.commits)
    if store and earlier:
        store.refuse_damaged(order.run)
    done = done_units(store, order.run) if store and earlier else set[str]()
    known = stored(store, order.run) if store and earlier else {}
    former = freeze_prompts(order.job, manifest, settled(known))
    agenda = Agenda(manifest, done, known, order.job, former, keys(choice))
    for each in choice.rejected:
        if each.named:
            yield each.model_id, None, Failed(None, "Rejected", each.reason), {}
    for key, model in agenda.models.items():
        tables = worker(order.job, agenda, order.cache, model)(None).prepare()
        left = tables if isinstance(tables, Failed) else agenda.plan(key, tables)
        if isinstance(tables, Failed) or isinstance(left, Failed):
            yield key, model, left, {}
            continue
        for said in agenda.closed[key]:
            print(f"{key}: warning: {said}", file=sys.stderr)  # noqa: T201
        for message in in_few_lines([why.message for why in agenda.unfit[key]]):
            yield key, model, Failed(None, "UserError", message), {}
        read = from_rows(agenda.kept(key, tables["prompts"]).to_pylist())
        yield key, model, left, {prompt.prompt.id: prompt for prompt in read}


def measure(wanted: str = "auto") -> Rates:
    """What this machine does: the rate of matrix products is measured, in half a second, on the device of the job."""
    import torch

    from raymi.model import memory
    from raymi.model.loading import pick_device

    device = pick_device(wanted)
    matrix = torch.rand(1024, 1024, device=device)

    def multiply() -> float:
        # Reading one number waits for a GPU.
        return float(torch.mm(matrix, matrix)[0, 0])

    multiply()  # the first one wakes the threads
    started, n = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 0.5:
        multiply()
        n += 1
    return Rates(
        flops=n * 2 * 1024**3 / seconds,
        load_bytes=LOAD_BYTES,
        start_seconds=START_SECONDS,
        step_seconds=STEP_SECONDS,
        process_bytes=PROCESS_BYTES,
        device=device.type,
        free_bytes=memory.available(device),
    )
