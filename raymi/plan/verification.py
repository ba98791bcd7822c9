"""What is measured a second time, and among what: in a batch other mistakes are possible than alone."""

from collections.abc import Iterator, Sequence
from random import Random

from raymi.catalog import CachedModel
from raymi.experiments.autoencoders.refs import SaeRef, WithSaes
from raymi.experiments.costs import Cost
from raymi.experiments.kind import Company, Spec, Work
from raymi.job import Job
from raymi.plan.unfit import fit
from raymi.plan.units import CutRule, Price, Saes, blocks
from raymi.prompts import TokenizedPrompt


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
        if not isinstance(spec, WithSaes) or of.get(spec.name)
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
                work = spec.work(prompts[index], model, saes)
                rest[index] = random.sample(work, len(work))
            if rest[index]:
                yield spec, prompts[index], rest[index].pop()
            else:
                order.remove(index)


COMPANY_FORWARDS, COMPANY_PROMPTS = 2, 4
"""Full forwards that may be spent on the company of an ablation that is verified, and prompts that it may be of: each
has a clean run."""


def company(
    job: Job,
    spec: Spec,
    model: CachedModel,
    prompts: Sequence[TokenizedPrompt],
    prompt: TokenizedPrompt,
    work: Work,
    saes: Sequence[SaeRef] = (),
) -> Company:
    """What a piece of work is measured among when it is verified, as in a unit: in a batch other mistakes are possible.

    Args:
        job: the job.
        spec: the experiment that it is of.
        model: the model.
        prompts: as the model reads them.
        prompt: one of them.
        work: one that the experiment makes of it.
        saes: the autoencoders that it uses on the model.
    """
    cost = Cost.of(model, len(prompt.token_ids))
    alike = fit(job, spec, model, [p for p in prompts if len(p.token_ids) == cost.n_tokens], saes)
    first = alike.index(prompt)
    rule = CutRule(unit_flops=COMPANY_FORWARDS * cost.full)
    near = (*alike[first:], *alike[:first])[:COMPANY_PROMPTS]
    every = ((p, spec.work(p, model, saes)) for p in near)
    for block in blocks(every, rule, Price(spec, cost, full=False)):
        if any(p is prompt and work in part for p, part in block):
            return block
    raise ValueError(f"{spec.name!r} does not measure {work} of prompt {prompt.prompt.id!r}")
