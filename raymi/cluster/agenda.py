"""What a run still has to do: the units of its models that are not in the store."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl

from raymi.catalog import CachedModel
from raymi.cluster.tokenised import from_rows
from raymi.cluster.worker import Failed, failure
from raymi.errors import UserError
from raymi.job import Job
from raymi.plan import CutRule, Unit, full_forward_flops, units
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.store.layout import slug
from raymi.store.manifest import Manifest
from raymi.store.reader import Store

if TYPE_CHECKING:
    import pyarrow as pa


Stored = dict[tuple[str, str], dict[str, TokenizedPrompt]]
"""Prompt id -> prompt, by model id and revision."""


class Agenda:
    """The work of one command on one run.

    Args:
        manifest: of the run, its generations of prompts frozen.
        done: ids of the units that are in the store.
        stored: what tokenizers have said before (`stored_prompts`).
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
        self._generations, self._rule, self._done = manifest.generations, CutRule(**manifest.cut_rule), done
        self._wanted = {prompt.id for prompt in job.prompts}
        self.before: dict[str, int] = {}
        """Ablations that were in the store when the command began, by key."""
        self.units: dict[str, list[Unit]] = {}
        """What is left to measure, of the models whose prompts the store knows."""
        self.refused: dict[str, Failed] = {}
        """Models that their own prompts forbid."""
        for key, model in self.models.items():
            prompts = stored.get((model.id, model.revision), {})
            if all(prompt.id in prompts for prompt in job.prompts):
                left = self._left(key, model, prompts)
                if isinstance(left, Failed):
                    self.refused[key] = left
                else:
                    self.units[key] = left

    @property
    def finished(self) -> bool:
        """Whether every unit of every model is in the store: there is no need to start anything."""
        return not self.refused and not self.needs_replicas

    @property
    def needs_replicas(self) -> bool:
        """Whether there is anything to tokenise or to measure."""
        return any(self.units.get(key) != [] for key in self.models if key not in self.refused)

    @property
    def guesses(self) -> dict[str, float]:
        """Work of every model that can run, in flops, before its prompts are tokenised: only the order matters."""
        return {
            key: float(full_forward_flops(model, 16)) * (model.n_layers or 1) * len(self.job.prompts)
            for key, model in self.models.items()
            if key not in self.refused
        }

    def slug(self, key: str) -> str:
        """Where the store keeps the rows of a model."""
        return slug(self.models[key].id)

    def plan(self, key: str, rows: "pa.Table") -> list[Unit] | Failed:
        """What is left to measure of a model whose tokenizer has spoken: rows of table `prompts`."""
        prompts = {prompt.prompt.id: prompt for prompt in from_rows(rows.to_pylist())}
        return self._left(key, self.models[key], prompts)

    def _left(self, key: str, model: CachedModel, prompts: Mapping[str, TokenizedPrompt]) -> list[Unit] | Failed:
        try:
            usable = self._usable(model, prompts)
            cut = [
                unit
                for generation in self._generations
                for unit in self._cut(model, [usable[each] for each in generation if each in usable])
                if any(prompt_id in self._wanted for prompt_id, _ in unit.items)
            ]
        except Exception as error:  # whatever a model's prompts do to the plan, the other models run
            return failure(error)
        left = [unit for unit in cut if unit.unit_id not in self._done]
        self.before[key] = sum(unit.n_ablations for unit in cut) - sum(unit.n_ablations for unit in left)
        return left

    def _usable(self, model: CachedModel, prompts: Mapping[str, TokenizedPrompt]) -> dict[str, TokenizedPrompt]:
        """Without those former prompts that forbid the plan: it never came to units that hold them."""
        usable = dict(prompts)
        for prompt_id in prompts.keys() - self._wanted:
            try:
                self._cut(model, [prompts[prompt_id]])
            except UserError:
                del usable[prompt_id]
        return usable

    def _cut(self, model: CachedModel, prompts: Sequence[TokenizedPrompt]) -> list[Unit]:
        return [unit for spec in self.job.experiments for unit in units(self.job, spec, model, prompts, self._rule)]


def stored_prompts(store: Store, run: str) -> Stored:
    """The tokenised prompts of a run."""
    rows = store.scan("prompts", run).select(pl.exclude("run", "model")).collect()
    found: Stored = {}
    for row, prompt in zip(rows.iter_rows(named=True), from_rows(rows.iter_rows(named=True)), strict=True):
        found.setdefault((row["model_id"], row["revision"]), {})[prompt.prompt.id] = prompt
    return found
