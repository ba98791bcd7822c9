"""From a job and a model to units: which of its measurements are leased, retried and committed together."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from raymi.catalog import CachedModel
from raymi.experiments.autoencoders.refs import SaeRef, WithSaes, fed_as
from raymi.experiments.costs import Cost
from raymi.experiments.kind import Spec, Work
from raymi.experiments.unit import Unit
from raymi.heads import Heads
from raymi.job import Job
from raymi.plan.unfit import check_length
from raymi.prompts import TokenizedPrompt, fingerprint

UNIT_VERSION = 1
"""Raised when rows of the same unit would mean something else, so that they are measured again."""

Saes = Mapping[str, Sequence[SaeRef]]
"""The autoencoders that a model's experiments use, by the name of the experiment."""


@dataclass(frozen=True, slots=True)
class CutRule:
    """Where units end. Frozen in a run's manifest: another rule would give units of other names, and rows twice."""

    unit_ablations: int = 512
    """Most ablations of a unit, or of what else it holds."""
    unit_flops: int = 4_000_000_000_000
    """Most arithmetic of a unit by the causal cone, as long as it holds one ablation."""


@dataclass(frozen=True, slots=True)
class Price:
    """What an experiment's work costs on a model, at one prompt length."""

    spec: Spec
    cost: Cost
    full: bool
    """Whether all is measured by full forwards."""

    @property
    def clean(self) -> int:
        """The clean run of a prompt."""
        return self.spec.clean_price(self.cost)

    def cut(self, work: Work) -> int:
        """What decides where units end, whatever the engine."""
        return self.spec.price(work, self.cost, full=False)

    def measured(self, work: Work) -> int:
        """What it takes with the job's engine."""
        return self.spec.price(work, self.cost, full=self.full)


def units(
    job: Job,
    spec: Spec,
    model: CachedModel,
    prompts: Sequence[TokenizedPrompt],
    rule: CutRule | None = None,
    saes: Sequence[SaeRef] = (),
) -> list[Unit]:
    """The units of one experiment on one model, for one generation of prompts.

    Called for every generation (prompts that came into the run together, or the chunks of a corpus), so that later
    prompts leave earlier units as they are. A unit holds prompts of one token length, and its id covers all that its
    rows depend on.

    Args:
        job: for its dtype.
        spec: one of the job's experiments.
        model: the model, at one commit.
        prompts: a generation of the job's prompts as the model reads them; those that `spec` does not choose are left.
        rule: where units end; by default as the job says.
        saes: the autoencoders that `spec` uses on the model (`experiments.autoencoders.resolve`).

    Raises:
        UserError: a prompt is longer than the model's context, or has not what the experiment cuts.
    """
    if isinstance(spec, WithSaes) and not saes:
        return []  # nor does it matter then whether the model could read the texts
    rule = rule or CutRule(unit_ablations=job.unit_ablations)
    by_length: dict[int, list[TokenizedPrompt]] = {}
    for prompt in prompts:
        if job.chooses(spec, prompt.prompt.id, fed_as(saes)):
            check_length(prompt, model)
            by_length.setdefault(len(prompt.token_ids), []).append(prompt)
    about = [UNIT_VERSION, model.id, model.revision, job.dtype, spec.canonical]
    if spec.asks_for_answers:
        about.append(job.top_k)
    cut: list[Unit] = []
    for n_tokens, bucket in sorted(by_length.items()):
        cost = Cost.of(model, n_tokens)
        price = Price(spec, cost, full=job.engine == "full")
        work = ((prompt, spec.work(prompt, model, saes)) for prompt in bucket)
        cut += [_unit(about, spec.name, block, price, model.heads) for block in blocks(work, rule, price)]
    return cut


Block = list[tuple[TokenizedPrompt, tuple[Work, ...]]]


def blocks(work: Iterable[tuple[TokenizedPrompt, Sequence[Work]]], rule: CutRule, price: Price) -> Iterator[Block]:
    """The same work in the same order, as much at a time as the rule allows.

    A prompt that fits into a block is not split over two: its clean run would be made twice.
    """
    block: Block = []
    room, flops = rule.unit_ablations, rule.unit_flops
    for prompt, its in work:
        costs = [price.cut(each) for each in its]
        if block and (len(its) > room or sum(costs) > flops):
            yield block
            block, room, flops = [], rule.unit_ablations, rule.unit_flops
        start = 0
        while start < len(its):
            stop = start
            while stop < len(its) and room and (costs[stop] <= flops or not (block or stop > start)):
                room, flops, stop = room - 1, flops - costs[stop], stop + 1
            if stop > start:
                block.append((prompt, tuple(its[start:stop])))
            start = stop
            if start < len(its):
                yield block
                block, room, flops = [], rule.unit_ablations, rule.unit_flops
    if block:
        yield block


def _unit(about: Sequence[object], experiment: str, block: Block, price: Price, heads: Heads | None) -> Unit:
    # Ids of prompts may be the user's, who may write another text under the same id: tokens tell.
    items = [
        [p.prompt.id, p.token_ids, p.answer_id, p.wrong_id, [each.said(heads) for each in part]] for p, part in block
    ]
    text = json.dumps([about, items], separators=(",", ":"))
    # Every prompt is also run clean.
    return Unit(
        unit_id=sha256(text.encode()).hexdigest()[:16],
        experiment=experiment,
        items=tuple((prompt.prompt.id, part) for prompt, part in block),
        flops=len(block) * price.clean + sum(price.measured(each) for _, part in block for each in part),
        tokens=fingerprint(prompt for prompt, _ in block),
    )
