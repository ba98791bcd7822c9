"""Which cached models a job runs on, and why it does not run on others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.job import Job


@dataclass(frozen=True, slots=True)
class Rejected:
    """A model that the job does not run on."""

    model_id: str
    reason: str
    named: bool
    """Whether that is a failure: the job names just this model, or asks for a layer or head that it does not have.
    Otherwise a pattern happened to match what cannot run."""


def selected(
    job: Job, catalog: Sequence[CachedModel], find: Callable[[str], CachedModel]
) -> tuple[list[CachedModel], list[Rejected]]:
    """The models to run, in the job's order and then the catalog's, and those that are not run with their reasons.

    Args:
        job: the job.
        catalog: the cached models that patterns are matched against.
        find: gives the model of an `id` or `id@revision`, or raises UserError (`raymi.catalog.find`).

    Raises:
        UserError: no model is left, or one that is named is not there.
    """
    chosen: dict[tuple[str, str], CachedModel] = {}
    rejected: dict[str, Rejected] = {}
    refused = mendable = False
    for reference in job.models.include:
        named = not any(character in reference for character in "*?[")
        matches = [find(reference)] if named else [m for m in catalog if fnmatchcase(m.id, reference)]
        if not matches:
            reason = "matches no cached model" if catalog else "the cache is empty"
            rejected[reference] = Rejected(reference, reason, named=False)
            mendable = True
        for model in matches:
            if any(_means(pattern, model) for pattern in job.models.exclude):
                continue
            refusal = _refusal(job, model, named=named)
            refused = refused or (refusal is not None and model.runnable)
            mendable = mendable or model.damaged
            if refusal is None:
                chosen[model.id, model.revision] = model
            elif named or model.id not in rejected:
                rejected[model.id] = refusal
    if not chosen:
        reasons = "".join(f"\n  {each.model_id}: {each.reason}" for each in rejected.values())
        # Models that could be loaded are refused by the job itself: more of them would not help.
        fetch = ", `raymi fetch ID` adds to it." if mendable else ", and says what of it can run."
        hint = None if refused else f"`raymi models` lists the cache{fetch}"
        raise UserError(f"no model to run{reasons}", hint=hint)
    return list(chosen.values()), list(rejected.values())


def _means(pattern: str, model: CachedModel) -> bool:
    name, at, revision = pattern.partition("@")
    return fnmatchcase(model.id, name) and (not at or model.revision.startswith(revision))


def _refusal(job: Job, model: CachedModel, *, named: bool) -> Rejected | None:
    if model.refused is not None:
        return Rejected(model.id, model.refused, named)
    limit = job.models.max_parameters
    if limit is not None and (model.parameters is None or model.parameters > limit):
        size = "an unknown number of" if model.parameters is None else f"{model.parameters:,}"
        return Rejected(model.id, f"{size} parameters, where the job allows {limit:,}", named=False)
    try:
        for spec in job.experiments:
            spec.check(model)
    except UserError as error:
        return Rejected(model.id, str(error), named=True)
    return None
