"""What of a model's work is measured twice, drawn at random and never twice."""

from collections.abc import Iterator, Sequence
from random import Random

from raymi.catalog import CachedModel
from raymi.experiments.sae.spec import SaeRef, SaeSpec
from raymi.job import Job, Spec
from raymi.plan import Saes, Work, work_of
from raymi.prompts import TokenizedPrompt
from raymi.unfit import fit


def drawn(
    job: Job, model: CachedModel, prompts: Sequence[TokenizedPrompt], saes: Saes | None = None
) -> list[tuple[Spec, TokenizedPrompt, Work]]:
    """What is measured twice, once by full forwards: `job.verify` pieces of work, drawn by the job's seed, none twice.

    Every experiment that has something to measure on the model has its turn, however many texts the others have. Where
    there is less work than that, it is all of it.

    Args:
        job: the job.
        model: the model.
        prompts: as the model reads them; those that it can never measure are left out.
        saes: the autoencoders of its experiments.
    """
    random, of = Random(f"{job.seed} {model.id}"), saes or {}
    turns = [
        _shuffled(spec, fit(job, spec, model, prompts, of.get(spec.name, ())), model, of.get(spec.name, ()), random)
        for spec in job.experiments
        if not isinstance(spec, SaeSpec) or of.get(spec.name)
    ]
    random.shuffle(turns)
    found: list[tuple[Spec, TokenizedPrompt, Work]] = []
    while turns:
        for turn in list(turns):
            if len(found) >= job.verify:
                return found
            if (each := next(turn, None)) is None:
                turns.remove(turn)
            else:
                found.append(each)
    return found


def _shuffled(
    spec: Spec, prompts: Sequence[TokenizedPrompt], model: CachedModel, saes: Sequence[SaeRef], random: Random
) -> Iterator[tuple[Spec, TokenizedPrompt, Work]]:
    """All that an experiment measures, in random order: of every text a piece before any text has its next."""
    rest: dict[int, list[Work]] = {}
    order = random.sample(range(len(prompts)), len(prompts))
    while order:
        for index in list(order):
            if index not in rest:
                work = work_of(spec, prompts[index], model, saes)
                rest[index] = random.sample(work, len(work))
            if rest[index]:
                yield spec, prompts[index], rest[index].pop()
            else:
                order.remove(index)
