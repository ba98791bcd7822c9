"""One command on one run, from the job to the last row."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from raymi.catalog import CachedModel
from raymi.cluster.agenda import Agenda, done_units, settled, stored
from raymi.cluster.frozen import Cache, Choice, choose, freeze_prompts
from raymi.cluster.inline import InlineBackend
from raymi.cluster.messages import Backend
from raymi.cluster.progress import Words, display
from raymi.cluster.runner import Ending, Interrupts, drive
from raymi.cluster.worker import Worker
from raymi.job import Job
from raymi.plan.selection import Rejected
from raymi.plan.units import CutRule
from raymi.store import ownership, schemas
from raymi.store.layout import slug
from raymi.store.manifest import Driver, Issue, Manifest
from raymi.store.reader import Store
from raymi.store.writer import Run

if TYPE_CHECKING:
    from raymi.cluster.inventory import Node


@dataclass(frozen=True, slots=True)
class Order:
    """What a command asks for.

    Args:
        job: the job.
        written: text of its file.
        run: name of the run.
        cache: where the models are, and what is allowed with them.
        address: of a Ray cluster to join; None: one of our own.
        inline: measure in this process, without Ray.
    """

    job: Job
    written: str
    run: str
    cache: Cache = field(default_factory=Cache)
    address: str | None = None
    inline: bool = False
    whole: Job | None = None
    """The job as it was issued, where `job` has a few of its prompts (`raymi.few`)."""

    words: Words = "usual"
    """How much is said while it goes on."""

    @property
    def issued(self) -> Job:
        """What the manifest keeps: prompts that were not taken this time are no former ones."""
        return self.whole or self.job


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    ending: Ending
    rejected: list[Rejected]
    """Models that the job does not run on."""
    started: bool
    """Whether there was anything to do."""

    @property
    def failed(self) -> bool:
        return bool(self.ending.failures) or any(each.named for each in self.rejected)


def sweep(order: Order, store: Store) -> Result:
    """Does what is left of a run. Nothing is written before all that can be refused has been looked at.

    Raises:
        UserError: bad input, a run that another process drives, a store that cannot be written.
        SystemExit: a second signal.
    """
    with ExitStack() as stack:
        earlier = ownership.read(store.objects, order.run)
        if earlier and store.is_driven(earlier):
            raise ownership.refused(earlier)
        commits = earlier.commits if earlier else {}
        nodes: list[Node] | None = None
        if order.address and not order.inline:
            nodes = _join(stack, order.address)
            choice = _choose_everywhere(nodes, order, commits)
        else:
            choice = choose(order.job, order.cache, commits)
        models = keys(choice)
        if earlier:
            store.refuse_damaged(order.run)
        done = done_units(store, order.run) if earlier else set[str]()
        planned = draft(order, earlier)
        agenda = _agenda(order, store, planned, done, models)
        if agenda.needs_replicas and nodes is None and not order.inline:
            nodes = _start(stack, choice)
        run = stack.enter_context(
            store.take(
                order.run,
                written=order.written,
                resolved=order.issued.model_dump(mode="json"),
                cut_rule=cut_rule(order),
            )
        )
        if run.manifest.epoch == planned.epoch + 1 and run.done_units() == done:
            run.manifest.generations = planned.generations
        else:  # another command has written meanwhile
            agenda = _agenda(order, store, run.manifest, run.done_units(), models)
        run.manifest.freeze_commits(choice.commits)
        run.manifest.taken = len(order.job.prompts) if order.whole else None
        run.save()
        _note_rejected(run, choice)
        for key, table, rows in agenda.noticed():
            run.add(table, agenda.slug(key), rows)
        if agenda.finished:
            if order.whole and earlier and earlier.status == "done" and len(earlier.jobs) == len(run.manifest.jobs):
                run.manifest.taken = earlier.taken  # there was nothing to do, so it is still as done as it was
            return _close(run, Result(Ending(), choice.rejected, started=False))
        if nodes is None and agenda.needs_replicas and not order.inline:
            nodes = _start(stack, choice)
        backend = _backend(order, agenda, nodes)
        # Ray installs handlers of its own when it starts: ours come after.
        with Interrupts() as interrupts, display(agenda.before, order.words) as shown:
            ending = drive(run, agenda, backend, shown, interrupts)
            return _close(run, Result(ending, choice.rejected, started=True))


def draft(order: Order, earlier: Manifest | None) -> Manifest:
    """The manifest of a run as a command would have it, which is not written."""
    manifest = Manifest(run=order.run, epoch=0, driver=Driver(heartbeat=1))
    if earlier:
        manifest = earlier.model_copy(deep=True)
    manifest.follow(Issue(written=order.written, resolved=order.issued.model_dump(mode="json")), cut_rule(order))
    return manifest


def _agenda(
    order: Order, store: Store, manifest: Manifest, done: Collection[str], models: Mapping[str, CachedModel]
) -> Agenda:
    """What is left to do; the prompts become part of the manifest."""
    known = stored(store, order.run)
    former = freeze_prompts(order.job, manifest, settled(known))
    return Agenda(manifest, done, known, order.job, former, models)


def keys(choice: Choice) -> dict[str, CachedModel]:
    """What each model is called in this command: its id, with the commit where an id has several."""
    ids = [model.id for model in choice.models]
    return {m.id if ids.count(m.id) == 1 else f"{m.id}@{m.revision[:12]}": m for m in choice.models}


def cut_rule(order: Order) -> dict[str, int]:
    """How the units of a new run are cut."""
    return dataclasses.asdict(CutRule(unit_ablations=order.job.unit_ablations))


def _note_rejected(run: Run, choice: Choice) -> None:
    for each in choice.rejected:
        if each.named:
            record = {"model_id": each.model_id, "stage": "select", "kind": "Rejected", "message": each.reason}
            rows = schemas.rows("failures", [{**record, "attempt": 1, "failed_at": datetime.now(UTC)}])
            run.add("failures", slug(each.model_id), rows)


def _close(run: Run, result: Result) -> Result:
    if result.ending.interrupted:
        run.close("interrupted")
    else:
        run.close("failed" if result.failed else "done")
    return result


def _backend(order: Order, agenda: Agenda, nodes: "list[Node] | None") -> Backend:
    if order.inline or not agenda.needs_replicas or nodes is None:
        make = partial(worker, order.job, agenda, order.cache)
        return InlineBackend(lambda key: make(agenda.models[key])(None))
    from raymi.cluster.ray_backend import RayBackend

    # Ray says which device a replica sees, and it always sees it as the first.
    job = order.job.model_copy(update={"device": order.job.device.partition(":")[0]})
    return RayBackend(nodes, job, agenda.models, partial(worker, job, agenda, order.cache))


def worker(job: Job, agenda: Agenda, cache: Cache, model: CachedModel) -> Callable[[int | None], Worker]:
    """What makes the worker of a model in its own process, given the number of its threads."""
    make = partial(
        Worker,
        model,
        job,
        former=agenda.former,
        known=agenda.known(model),
        pinned=agenda.pinned(model),
        cache_dir=cache.folder,
        trust_remote_code=model.id in cache.remote_code,
        allow_pickle=model.id in cache.pickle,
        allow_unused=model.id in cache.unused,
    )
    return partial(_with_threads, make)


def _with_threads(make: Callable[..., Worker], threads: int | None) -> Worker:
    return make(threads=threads)


def _start(stack: ExitStack, choice: Choice) -> "list[Node]":
    from raymi.cluster.session import session

    stack.enter_context(session())
    from raymi.cluster import inventory

    nodes = inventory.survey()
    inventory.choose_here(nodes, choice)
    return nodes


def _join(stack: ExitStack, address: str) -> "list[Node]":
    from raymi.cluster.session import session

    stack.enter_context(session(address))
    from raymi.cluster import inventory

    return inventory.survey()


def _choose_everywhere(nodes: "list[Node]", order: Order, commits: Mapping[str, str]) -> Choice:
    from raymi.cluster import inventory

    return inventory.choose_everywhere(nodes, order.job, order.cache, dict(commits))
