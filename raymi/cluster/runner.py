"""The driver's loop: what the scheduler says goes to the store and to the display, and signals end it in good order."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from raymi.answers import Answer, warning
from raymi.cluster.agenda import Agenda, in_few_lines
from raymi.cluster.messages import Backend, Note, Outcome, Rows, Trouble
from raymi.cluster.progress import Display
from raymi.cluster.scheduler import Scheduler
from raymi.cluster.worker import Failed
from raymi.errors import told
from raymi.experiments.unit import Unit
from raymi.fed import plain_id
from raymi.store import schemas
from raymi.store.writer import Run

if TYPE_CHECKING:
    import pyarrow as pa

POLL_SECONDS = 0.5
GRACE = {signal.SIGINT: 10.0, signal.SIGTERM: 1.5}
"""Seconds that units in hand are waited for after a first signal. `ray job stop` kills 3 s after its SIGTERM."""


class Stopped(BaseException):
    """A first signal, where what is going on is not worth being waited for."""


class Interrupts:
    """Turns a first SIGINT or SIGTERM into a flag; a second exits. To be entered after Ray has set its own handlers."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._abandons = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in GRACE}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = signal.Signals(number)
        if self._abandons:
            raise Stopped

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Within, a first signal raises Stopped: for what may take long and leaves nothing behind."""
        self._abandons = True
        try:
            yield
        finally:
            self._abandons = False


@dataclass(slots=True)
class Ending:
    """What became of a command."""

    failures: list[Trouble] = field(default_factory=list[Trouble])
    """Models and units that failed for good, each with its reason."""
    interrupted: signal.Signals | None = None
    ablations: int = 0
    """Measured and stored."""


def drive(
    run: Run,
    agenda: Agenda,
    backend: Backend,
    display: Display,
    interrupts: Interrupts,
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    """Measures what is left of a run, until it is done, has failed, or is interrupted.

    Raises:
        RunLost: another driver has the run.
        UserError: the store cannot be written.
        SystemExit: a second signal. What was delivered up to the first is in the store.
    """
    record = _Record(run, agenda, display, interrupts)
    scheduler = Scheduler(backend, clock, record.plan, agenda.guesses, agenda.units)
    record.take(Trouble(key, "plan", why, final=True) for key, why in agenda.refused.items())
    for key in agenda.units:
        record.unfit(key)
    deadline: float | None = None
    try:
        outcomes: Sequence[Outcome] = scheduler.step([])
        while not scheduler.finished and (deadline is None or clock() < deadline):
            record.take(outcomes)
            run.maybe_flush()
            display.update(scheduler.status())
            if interrupts.received and deadline is None:
                deadline = clock() + GRACE[interrupts.received]
                display.say("stopping after the units in hand; once more stops at once")
                run.flush()
                scheduler.stop()
            outcomes = scheduler.step(backend.poll(POLL_SECONDS))
        record.take(outcomes)
        display.update(scheduler.status())
    except Stopped:
        scheduler.stop()
        record.take(scheduler.step([]))
    finally:
        scheduler.close()
    record.doubt_answers()
    record.ending.interrupted = interrupts.received
    return record.ending


class _Record:
    """Writes what happens into the store's tables, and shows what a person wants to know."""

    def __init__(self, run: Run, agenda: Agenda, display: Display, interrupts: Interrupts) -> None:
        self.ending = Ending()
        self._run, self._agenda, self._display, self._interrupts = run, agenda, display, interrupts
        self._texts: dict[str, set[int]] = {}
        """Token ids, by model, whose text is in the store or on its way there."""
        self._answers: dict[str, dict[str, Answer]] = {}
        """By model and prompt."""

    def plan(self, key: str, tables: "Mapping[str, pa.Table]") -> Sequence[Unit] | Failed:
        """Keeps what a tokenizer has said and which autoencoders there are, and gives what is left to measure."""
        with self._interrupts.abandoning():
            left = self._agenda.plan(key, tables)
        self._run.add("prompts", self._agenda.slug(key), self._agenda.kept(key, tables["prompts"]))
        self._run.add("saes", self._agenda.slug(key), tables["saes"])
        self.notice()
        self.unfit(key)
        return left

    def notice(self) -> None:
        """Notes what is stored and not planned any more, and which prompts have failed and are measured now."""
        for key, table, rows in self._agenda.noticed():
            self._run.add(table, self._agenda.slug(key), rows)

    def unfit(self, key: str) -> None:
        """Keeps why a model can never measure some of its prompts, and says so, in few lines however many they are; and
        says what of the plan cuts nothing.
        """
        for said in self._agenda.closed.get(key, ()):
            self._display.say(f"{key}: warning: {said}")
        unfit = self._agenda.unfit.get(key, ())
        for why in unfit:
            self._keep(Trouble(key, "prompt", why, final=True))
        for line in in_few_lines([why.message for why in unfit]):
            self._display.say(line)

    def take(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Rows():
                    self._rows(outcome)
                case Trouble():
                    self._trouble(outcome)
                case Note():
                    self._note(outcome)

    def _rows(self, rows: Rows) -> None:
        for table, data in rows.tables.items():
            kept = self._new_texts(rows.model, data) if table == "vocabulary" else data
            if kept.num_rows:
                self._run.add(table, self._agenda.slug(rows.model), kept)
        if rows.unit:
            self.ending.ablations += rows.unit.n_ablations
            self._look_at_answers(rows.model, rows.tables)

    def _look_at_answers(self, key: str, tables: "Mapping[str, pa.Table]") -> None:
        known, prompts = self._answers.setdefault(key, {}), self._agenda.prompts
        for data in tables.values():
            if _ANSWERS.issubset(data.column_names):
                columns = (data[name].to_pylist() for name in ("prompt_id", "answer_rank_clean", "answer_prob_clean"))
                for text_id, rank, prob in zip(*columns, strict=True):
                    prompt = prompts.get(plain_id(text_id)[0])
                    if rank is not None and prompt and text_id not in known:
                        known[text_id] = Answer(replace(prompt, id=text_id), rank, prob)

    def doubt_answers(self) -> None:
        """Says and keeps which answers each model would hardly give."""
        for key, answers in self._answers.items():
            if said := warning(list(answers.values())):
                self._event(key, "answers", said)
                self._display.say(f"{key}: warning: {said}")

    def _new_texts(self, key: str, data: "pa.Table") -> "pa.Table":
        """What the store need not be asked about: most units name tokens that others have named."""
        known = self._texts.setdefault(key, set())
        ids: list[int] = data["token_id"].to_pylist()
        mask = [token not in known for token in ids]
        known.update(ids)
        return data if all(mask) else data.filter(mask)  # Arrow takes no empty list for a mask

    def _trouble(self, trouble: Trouble) -> None:
        self._keep(trouble)
        failure = trouble.failure
        what = f"unit {failure.unit_id}" if failure.unit_id else trouble.stage
        again = "" if trouble.final else "; it is tried again"
        self._display.say(told(trouble.model, what, failure.kind, _first_line(failure.message)) + again)
        if failure.traceback:
            self._display.detail(failure.traceback.rstrip())

    def _keep(self, trouble: Trouble) -> None:
        failure, model = trouble.failure, self._agenda.models[trouble.model]
        record = {
            "model_id": model.id,
            "revision": model.revision,
            "unit_id": failure.unit_id,
            "stage": trouble.stage,
            "kind": failure.kind,
            "message": failure.message,
            "traceback": failure.traceback or None,
            "attempt": trouble.attempt,
            "failed_at": datetime.now(UTC),
            "prompt_id": failure.prompt_id,
        }
        self._run.add("failures", self._agenda.slug(trouble.model), schemas.rows("failures", [record]))
        if trouble.final:
            self.ending.failures.append(trouble)

    def _note(self, note: Note) -> None:
        self._event(note.model, note.what, " ".join(filter(None, [_replica(note), note.detail])))
        if note.what != "lost":
            self._display.detail(f"{note.model}: " + " ".join(filter(None, [note.what, _replica(note), note.detail])))
        if note.what == "lost":
            self._display.say(f"{note.model}: replica lost: {note.detail}")
        elif note.what == "done":
            self._run.flush()

    def _event(self, key: str, kind: str, message: str) -> None:
        model = self._agenda.models[key]
        event = {
            "model_id": model.id,
            "revision": model.revision,
            "kind": kind,
            "message": message,
            "happened_at": datetime.now(UTC),
        }
        self._run.add("events", self._agenda.slug(key), schemas.rows("events", [event]))


_ANSWERS = {"prompt_id", "answer_rank_clean", "answer_prob_clean"}


def _replica(note: Note) -> str:
    return "" if note.replica is None else f"replica {note.replica}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
