"""What a run still has to do: the units of its models that are not in the store."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa

from raymi.catalog import CachedModel
from raymi.cluster.feeding import holds
from raymi.cluster.reading import lacking
from raymi.cluster.superseded import StoredUnit, notices, stored_units
from raymi.cluster.tokenised import from_rows
from raymi.cluster.worker import Failed, failure, of_prompt
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import WithSaes, fed_as
from raymi.experiments.autoencoders.resolve import Record, is_current, latest, refs
from raymi.experiments.costs import full_forward_flops
from raymi.experiments.unit import Unit
from raymi.fed import Fed, fed_id, plain_id
from raymi.job import Job, Spec
from raymi.plan.unfit import check_known, why_unfit
from raymi.plan.units import CutRule, Saes, units
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.reach import closed
from raymi.store import schemas
from raymi.store.layout import slug
from raymi.store.manifest import Manifest
from raymi.store.reader import Store
from raymi.store.schemas import UNIT_TABLES


@dataclass(slots=True)
class Known:
    """What a run knows of one model before any process is started."""

    prompts: dict[str, TokenizedPrompt] = field(default_factory=dict[str, TokenizedPrompt])
    """By id; chunks of corpora among them."""
    saes: list[Record] = field(default_factory=list[Record])
    """Rows of table `saes`."""
    units: dict[str, StoredUnit] = field(default_factory=dict[str, StoredUnit])
    """What is stored, by id."""
    failed: set[str] = field(default_factory=set[str])
    """Ids of prompts that failed when this was last noted."""
    failed_units: set[str] = field(default_factory=set[str])
    """Ids of units that failed when they were last tried."""
    unread: list[Failed] = field(default_factory=list[Failed])
    """Why prompts cannot be read."""

    def suffices(self, job: Job) -> bool:
        """Whether nothing is to be tokenised, and no autoencoder to be found."""
        # The chunks of a corpus come into the store all at once, as do the autoencoders of an experiment.
        found = {row["experiment"] for row in self.saes}
        return (
            all(prompt.id in self.prompts and not lacking(job, self.prompts[prompt.id]) for prompt in job.prompts)
            and all(any(map(corpus.holds, self.prompts)) for corpus in job.corpora)
            and all(spec.name in found for spec in job.sae_experiments)
            and all(map(is_current, self.saes))
            and holds(job, self.saes, self.prompts)
        )


Stored = dict[tuple[str, str], Known]
"""By model id and revision."""


class Agenda:
    """The work of one command on one run.

    Args:
        manifest: of the run, its generations of prompts frozen.
        done: ids of the units that are in the store.
        stored: what tokenizers have said before, and which autoencoders were found (`stored`).
        job: the job.
        former: prompts that the job has no longer (`frozen.freeze_prompts`).
        models: what the job runs on, by the key that names each in this command.
    """

    def __init__(
        self,
        manifest: Manifest,
        done: Collection[str],
        stored: Stored,
        job: Job,
        former: Sequence[Prompt],
        models: Mapping[str, CachedModel],
    ) -> None:
        self.job, self.former, self.models = job, former, dict(models)
        self._generations, self._done = manifest.generations, done
        try:
            self._rule = CutRule(**manifest.cut_rule)
        except TypeError:
            raise UserError(
                f"the manifest of the run {manifest.run} says how units are cut in words that this raymi does not know",
                hint="A newer raymi wrote it, or it is damaged. Another run (--new) has a rule of its own.",
            ) from None
        self.prompts = {prompt.id: prompt for prompt in job.prompts}
        of_job = manifest.jobs[-1].resolved["prompts"] if manifest.jobs else ()
        self._issued = self.prompts.keys() | {prompt["id"] for prompt in of_job}
        """Ids of all prompts of the job, where `job` has a few of them."""
        n_experiments = len(manifest.jobs[-1].resolved["experiments"]) if manifest.jobs else len(job.experiments)
        self._whole = len(self._issued) == len(self.prompts) and n_experiments == len(job.experiments)
        self._known = dict(stored)
        self._noticed: dict[str, list[dict[str, Any]]] = {}
        self._healed: dict[str, set[str]] = {}
        self._withdrawn: dict[str, set[str]] = {}
        self.before: dict[str, int] = {}
        """Ablations that were in the store when the command began, by key."""
        self.units: dict[str, list[Unit]] = {}
        """What is left to measure, of the models whose prompts the store knows."""
        self.refused: dict[str, Failed] = {}
        """Models that their own prompts forbid."""
        self.closed: dict[str, list[str]] = {}
        """By key, what of the plan cuts edges that the model's own mask has closed (`reach.closed`)."""
        self.unfit: dict[str, list[Failed]] = {}
        """By key, prompts that a model can never measure, each with its `prompt_id`. They are in no unit, and the
        others are in the units that they would be in without them."""
        self._barred: dict[str, set[str]] = {}
        """Those that no experiment can measure."""
        for key, model in self.models.items():
            known = stored.get((model.id, model.revision), Known())
            if known.suffices(job):
                left = self._left(key, model, known)
                if isinstance(left, Failed):
                    self.refused[key] = left
                else:
                    self.units[key] = left

    @property
    def finished(self) -> bool:
        """Whether every unit of every model is in the store: there is no need to start anything."""
        return not self.refused and not any(self.unfit.values()) and not self.needs_replicas

    @property
    def needs_replicas(self) -> bool:
        """Whether there is anything to tokenise or to measure."""
        return any(self.units.get(key) != [] for key in self.models if key not in self.refused)

    @property
    def guesses(self) -> dict[str, float]:
        """Work of every model that can run, in flops, before its prompts are tokenised: only the order matters."""
        texts = len(self.job.prompts) + sum(corpus.chunks or len(corpus.documents) for corpus in self.job.corpora)
        return {
            key: float(full_forward_flops(model, 16)) * (model.n_layers or 1) * texts
            for key, model in self.models.items()
            if key not in self.refused
        }

    def slug(self, key: str) -> str:
        """Where the store keeps the rows of a model."""
        return slug(self.models[key].id)

    def pinned(self, model: CachedModel) -> Sequence[Record]:
        """Rows of table `saes`: what experiments use on a model, as far as that is known by now."""
        return self._of(model).saes

    def known(self, model: CachedModel) -> Sequence[TokenizedPrompt]:
        """What is measured on a model, as far as that is known by now: no replica is to read it otherwise."""
        return list(self._of(model).prompts.values())

    def _of(self, model: CachedModel) -> Known:
        return self._known.get((model.id, model.revision), Known())

    def plan(self, key: str, tables: Mapping[str, pa.Table]) -> list[Unit] | Failed:
        """What is left to measure of a model of which a replica has given the rows of tables `prompts` and `saes`."""
        model = self.models[key]
        prompts = {prompt.prompt.id: prompt for prompt in from_rows(tables["prompts"].to_pylist())}
        before = self._of(model)
        unread = [
            Failed(None, row["kind"], row["message"], prompt_id=row["prompt_id"])
            for row in (tables["failures"].to_pylist() if "failures" in tables else ())
        ]
        known = Known(prompts, tables["saes"].to_pylist(), before.units, before.failed, before.failed_units, unread)
        self._known[model.id, model.revision] = known
        return self._left(key, model, known)

    def kept(self, key: str, prompts: pa.Table) -> pa.Table:
        """Rows of table `prompts` without those that are not measured: they may yet be written otherwise."""
        barred = self._barred.get(key, ())
        return prompts.filter(pa.array([each not in barred for each in prompts["prompt_id"].to_pylist()], pa.bool_()))

    def noticed(self) -> list[tuple[str, str, pa.Table]]:
        """Rows that have come up since this was last asked: key, table (`superseded`, `failures`), rows."""
        found: list[tuple[str, str, pa.Table]] = []
        for key, model in self.models.items():
            about = {"model_id": model.id, "revision": model.revision}
            if rows := self._noticed.get(key):
                found.append((key, "superseded", schemas.rows("superseded", (about | each for each in rows))))
            if healed := self._healed.get(key):
                moment = {"stage": "prompt", "attempt": 1, "failed_at": datetime.now(UTC)}
                failures = (about | moment | {"prompt_id": each} for each in sorted(healed))
                found.append((key, "failures", schemas.rows("failures", failures)))
            if withdrawn := self._withdrawn.get(key):
                moment = {"stage": "unit", "attempt": 1, "failed_at": datetime.now(UTC)}
                failures = (about | moment | {"unit_id": each} for each in sorted(withdrawn))
                found.append((key, "failures", schemas.rows("failures", failures)))
        self._noticed.clear()
        self._healed.clear()
        self._withdrawn.clear()
        return found

    def _left(self, key: str, model: CachedModel, known: Known) -> list[Unit] | Failed:
        try:
            saes = refs(known.saes)
            unfit = [*known.unread, *self._find_unfit(key, model, known, saes)]
            if self.job.strict and unfit:
                raise UserError("\n".join(in_few_lines([why.message for why in unfit])))
            self.unfit[key] = unfit
            failed = {prompt_id for prompt_id in known.failed if self._is_wanted(prompt_id)}
            self._healed[key] = failed - {why.prompt_id for why in unfit}
            usable = self._usable(model, known.prompts, saes)
            generations = [*map(_all_fed, self._generations), *self._chunks(known)]
            texts = [[usable[each] for each in generation if each in usable] for generation in generations]
            every = [unit for its in texts for unit in self._cut(model, its, saes)]
            cut = [unit for unit in every if any(self._is_wanted(prompt_id) for prompt_id, _ in unit.items)]
            self._noticed[key] = notices(
                known.units,
                every,
                [spec.name for spec in self.job.experiments],
                [prompt_id for prompt_id in usable if self._is_wanted(prompt_id)],
                self._with_former_sums(model, texts, saes),
            )
            # What is of no prompt of the job is not tried again, and should not stay an open failure.
            self._withdrawn[key] = known.failed_units.difference(u.unit_id for u in cut) if self._whole else set()
            left = [unit for unit in cut if unit.unit_id not in self._done]
            lengths = {prompt_id: len(prompt.token_ids) for prompt_id, prompt in usable.items()}
            self.closed[key] = closed(model.path, model.n_layers or 0, left, lengths)
        except Exception as error:  # whatever a model's prompts do to the plan, the other models run
            return failure(error)
        self.before[key] = sum(unit.n_ablations for unit in cut) - sum(unit.n_ablations for unit in left)
        return left

    def _chunks(self, known: Known) -> list[list[str]]:
        """The chunks of each corpus, which never change: a corpus is a generation of its own."""
        found: dict[tuple[str, str], list[str]] = {}
        for prompt_id in known.prompts:
            name, bos = plain_id(prompt_id)
            corpus, _, number = name.rpartition("/")
            if self._is_chunk(prompt_id):
                found.setdefault((corpus, fed_id("", bos)), []).append(number)
        return [
            [f"{corpus}/{number}{bos}" for number in sorted(numbers, key=int)]
            for (corpus, bos), numbers in sorted(found.items())
        ]

    def _is_chunk(self, prompt_id: str) -> bool:
        return any(corpus.holds(plain_id(prompt_id)[0]) for corpus in self.job.corpora)

    def _is_wanted(self, prompt_id: str) -> bool:
        return plain_id(prompt_id)[0] in self.prompts or self._is_chunk(prompt_id)

    def _usable(
        self, model: CachedModel, prompts: Mapping[str, TokenizedPrompt], saes: Saes
    ) -> dict[str, TokenizedPrompt]:
        """Without those former prompts that forbid the plan: it never came to units that hold them."""
        usable = dict(prompts)
        for prompt_id in [each for each in prompts if not self._is_wanted(each)]:
            try:
                self._cut(model, [prompts[prompt_id]], saes)
            except UserError:
                del usable[prompt_id]
        return usable

    def _cut(
        self, model: CachedModel, prompts: Sequence[TokenizedPrompt], saes: Saes, *, sum_former: bool = False
    ) -> list[Unit]:
        """The units of some prompts. Sums over prompts are over those that the job has: out of a sum that holds others,
        too, these cannot be taken (`sum_former`: it as it once was).
        """
        issued = [each for each in prompts if plain_id(each.prompt.id)[0] in self._issued]
        sums = {spec.name for spec in self.job.experiments if spec.sums_prompts and not sum_former}
        return [
            unit
            for spec in self.job.experiments
            for unit in units(
                self.job,
                spec,
                model,
                [each for each in (issued if spec.name in sums else prompts) if not self._why_unfit(model, spec, each)],
                self._rule,
                saes.get(spec.name, ()),
            )
        ]

    def _with_former_sums(self, model: CachedModel, texts: Sequence[Sequence[TokenizedPrompt]], saes: Saes) -> set[str]:
        """Ids of the units that there would be if sums over prompts still held those that the job has no longer."""
        if not any(spec.sums_prompts for spec in self.job.experiments):
            return set()
        return {unit.unit_id for its in texts for unit in self._cut(model, its, saes, sum_former=True)}

    def _find_unfit(self, key: str, model: CachedModel, known: Known, saes: Saes) -> list[Failed]:
        """The texts that some experiment chooses and can never measure on a model."""
        found: list[Failed] = []
        self._barred[key] = set()
        measuring: list[tuple[Spec, Fed | None]] = [
            (spec, fed_as(saes.get(spec.name, ())))
            for spec in self.job.experiments
            if not isinstance(spec, WithSaes) or saes.get(spec.name)
        ]
        for prompt_id, prompt in known.prompts.items():
            if not self._is_wanted(prompt_id):
                continue
            choosing = [spec for spec, bos in measuring if self.job.chooses(spec, prompt_id, bos)]
            reasons = [why for spec in choosing if (why := self._why_unfit(model, spec, prompt))]
            if reasons:
                found.append(of_prompt(prompt_id, reasons[0]))
            if reasons and len(reasons) == len(choosing):
                self._barred[key].add(prompt_id)
        return found

    def _why_unfit(self, model: CachedModel, spec: Spec, prompt: TokenizedPrompt) -> UserError | None:
        if not self._is_chunk(prompt.prompt.id):
            return why_unfit(spec, prompt, model)
        # Chunks that do not fit into the context are the job's mistake, and all alike.
        try:
            check_known(spec, prompt, model)
        except UserError as error:
            return error
        return None


SAID = 3
"""Of many messages of one kind, so many are said in full."""


def in_few_lines(messages: Sequence[str]) -> list[str]:
    """Messages of one kind, with a count in place of those beyond the first few."""
    rest = len(messages) - SAID
    return [*messages[:SAID], *([f"... and {rest:,} more prompts that cannot be measured"] if rest > 0 else [])]


def _all_fed(generation: Sequence[str]) -> list[str]:
    """The prompts of a generation, and the same where they begin otherwise."""
    return [fed_id(each, bos) for each in generation for bos in (None, "always", "never")]


def stored(store: Store, run: str) -> Stored:
    """What a run knows of its models: tokenised prompts, and autoencoders."""
    found: Stored = {}
    rows = store.scan("prompts", run).select(pl.exclude("run", "model")).collect()
    for row, prompt in zip(rows.iter_rows(named=True), from_rows(rows.iter_rows(named=True)), strict=True):
        # The first row wins: what was measured first is what is measured.
        found.setdefault((row["model_id"], row["revision"]), Known()).prompts.setdefault(prompt.prompt.id, prompt)
    for row in store.scan("saes", run).select(pl.exclude("run", "model")).collect().iter_rows(named=True):
        found.setdefault((row["model_id"], row["revision"]), Known()).saes.append(row)
    for known in found.values():
        known.saes = latest(known.saes)
    failed = store.scan("failures", run).filter(pl.col("prompt_id").is_not_null()).sort("failed_at").collect()
    for row in failed.unique(["model_id", "revision", "prompt_id"], keep="last").iter_rows(named=True):
        if row["kind"] is not None:
            found.setdefault((row["model_id"], row["revision"]), Known()).failed.add(row["prompt_id"])
    failed = store.scan("failures", run).filter(pl.col("unit_id").is_not_null()).sort("failed_at").collect()
    for row in failed.unique(["model_id", "revision", "unit_id"], keep="last").iter_rows(named=True):
        if row["kind"] is not None:
            found.setdefault((row["model_id"], row["revision"]), Known()).failed_units.add(row["unit_id"])
    for key, its in stored_units(store, run).items():
        found.setdefault(key, Known()).units = its
    return found


def settled(known: Stored) -> dict[str, Prompt]:
    """By id, the prompts that some model of the run measures: they stay what they are."""
    found: dict[str, Prompt] = {}
    for its in known.values():
        for prompt_id, read in its.prompts.items():
            name, _ = plain_id(prompt_id)
            found[name] = replace(read.prompt, id=name)
    return found


def done_units(store: Store, run: str) -> set[str]:
    """Ids of the units whose rows are in the store."""
    tables = [store.scan(table, run).select(pl.col("unit_id").unique()) for table in UNIT_TABLES]
    return set(pl.concat(tables).collect()["unit_id"])
