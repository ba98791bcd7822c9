"""From a job and a catalog to units: which models, then per model which ablations are leased and committed together."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TypeGuard, TypeVar

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.knockout.spec import (
    Ablation,
    Company,
    KnockoutSpec,
    ablations,
    check,
    confirm_heads,
    confirm_layers,
)
from raymi.experiments.sae.spec import Injection, SaeRef, SaeSpec, fed_as
from raymi.experiments.sae.spec import work as sae_work
from raymi.heads import Heads
from raymi.job import Job, Spec
from raymi.model.sizes import (
    KEPT_BYTES,
    METRIC_SLICE,
    POSITIONS_PER_BATCH,
    UNEMBEDDED,
    Shape,
    kept_bytes,
    pays_together,
    prompts_kept,
    reference_bytes,
    row_bytes,
    rows_per_batch,
)
from raymi.prompts import TokenizedPrompt, fingerprint
from raymi.unfit import asks_for_answers, check_length, fit

UNIT_VERSION = 1
"""Raised when rows of the same unit would mean something else, so that they are measured again."""

Work = Ablation | SaeRef | Injection
"""What is measured of one text: an ablation, an injection, or whatever one autoencoder makes of all of it."""

Saes = Mapping[str, Sequence[SaeRef]]
"""The autoencoders that a model's experiments use, by the name of the experiment."""

W = TypeVar("W", Ablation, SaeRef, Injection)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is leased, retried and committed: a block of work of one experiment on one model.

    Units are cut by a pure integer rule, so the same job on the same commit gives the same units everywhere.
    """

    unit_id: str
    experiment: str
    """Name of the experiment within the job."""
    items: tuple[tuple[str, tuple[Work, ...]], ...]
    """(prompt id, what is measured of it), prompts of equal token length only; work of one kind only."""
    flops: int
    """Arithmetic by the causal cone (by full forwards where the job asks for those), for planning and progress."""
    tokens: str = ""
    """Hash of what its prompts were when it was planned (`prompts.fingerprint`); empty: not compared."""

    @property
    def n_ablations(self) -> int:
        """How much is measured: ablations, injections, and texts by each autoencoder that reads them."""
        return sum(len(work) for _, work in self.items)

    def of(self, kind: type[W]) -> list[tuple[str, tuple[W, ...]]]:
        """Its items, whose work is all of this kind."""
        found = [(prompt_id, tuple(each for each in work if isinstance(each, kind))) for prompt_id, work in self.items]
        assert all(len(kept) == len(work) for (_, kept), (_, work) in zip(found, self.items, strict=True))
        return found


@dataclass(frozen=True, slots=True)
class CutRule:
    """Where units end. Frozen in a run's manifest: another rule would give units of other names, and rows twice."""

    unit_ablations: int = 512
    """Most ablations of a unit, or of what else it holds."""
    unit_flops: int = 4_000_000_000_000
    """Most arithmetic of a unit by the causal cone, as long as it holds one ablation."""


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
    refused = False
    for reference in job.models.include:
        named = not any(character in reference for character in "*?[")
        matches = [find(reference)] if named else [m for m in catalog if fnmatchcase(m.id, reference)]
        if not matches:
            reason = "matches no cached model" if catalog else "the cache is empty"
            rejected[reference] = Rejected(reference, reason, named=False)
        for model in matches:
            if any(_means(pattern, model) for pattern in job.models.exclude):
                continue
            refusal = _refusal(job, model, named=named)
            refused = refused or (refusal is not None and model.runnable)
            if refusal is None:
                chosen[model.id, model.revision] = model
            elif named or model.id not in rejected:
                rejected[model.id] = refusal
    if not chosen:
        reasons = "".join(f"\n  {each.model_id}: {each.reason}" for each in rejected.values())
        # Models that could be loaded are refused by the job itself: more of them would not help.
        hint = None if refused else "`raymi models` lists the cache, `raymi fetch ID` adds to it."
        raise UserError(f"no model to run{reasons}", hint=hint)
    return list(chosen.values()), list(rejected.values())


def _means(pattern: str, model: CachedModel) -> bool:
    name, at, revision = pattern.partition("@")
    return fnmatchcase(model.id, name) and (not at or model.revision.startswith(revision))


def _refusal(job: Job, model: CachedModel, *, named: bool) -> Rejected | None:
    if model.reason is not None:
        return Rejected(model.id, model.reason, named)
    limit = job.models.max_parameters
    if limit is not None and (model.parameters is None or model.parameters > limit):
        size = "an unknown number of" if model.parameters is None else f"{model.parameters:,}"
        return Rejected(model.id, f"{size} parameters, where the job allows {limit:,}", named=False)
    try:
        for spec in job.experiments:
            if isinstance(spec, KnockoutSpec):
                check(spec, *_shape(model))
    except UserError as error:
        return Rejected(model.id, str(error), named=True)
    return None


def _shape(model: CachedModel) -> tuple[int, Heads, tuple[int, ...] | None]:
    """Its layers, their heads, and which layers have attention (None: all)."""
    if model.n_layers is None or model.heads is None:
        raise UserError(f"{model.id}: its config.json does not say how many layers and heads it has")
    return model.n_layers, model.heads, model.attention_layers


def confirm(job: Job, model: CachedModel, attention_layers: Sequence[int], heads: Heads | None = None) -> None:
    """Whether units that were planned by a model's config.json cut what the job says, now that the model is loaded.

    Args:
        job: the job.
        model: as it was planned for.
        attention_layers: the layers that have attention, ascending, as the loaded model shows them.
        heads: the heads of its layers, as its attention is called with them; None: not looked at.

    Raises:
        UserError: an experiment would cut other layers, or other heads.
    """
    for spec in job.experiments:
        if isinstance(spec, KnockoutSpec):
            confirm_layers(spec, model.n_layers or 0, model.attention_layers, attention_layers)
            if heads is not None and model.heads is not None:
                confirm_heads(spec, model.n_layers or 0, attention_layers, model.heads, heads)


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
        saes: the autoencoders that `spec` uses on the model (`experiments.sae.resolve`).

    Raises:
        UserError: a prompt is longer than the model's context, or has not what the experiment cuts.
    """
    if isinstance(spec, SaeSpec) and not saes:
        return []  # nor does it matter then whether the model could read the texts
    rule = rule or CutRule(unit_ablations=job.unit_ablations)
    by_length: dict[int, list[TokenizedPrompt]] = {}
    for prompt in prompts:
        if job.chooses(spec, prompt.prompt.id, fed_as(saes)):
            check_length(prompt, model)
            by_length.setdefault(len(prompt.token_ids), []).append(prompt)
    about = [UNIT_VERSION, model.id, model.revision, job.dtype, spec.canonical]
    if asks_for_answers(spec):
        about.append(job.top_k)
    cut: list[Unit] = []
    for n_tokens, bucket in sorted(by_length.items()):
        cost = Cost.of(model, n_tokens)
        price = _Price(spec, cost, full=job.engine == "full")
        work = ((prompt, work_of(spec, prompt, model, saes)) for prompt in bucket)
        cut += [_unit(about, spec.name, block, price, model.heads) for block in _blocks(work, rule, price)]
    return cut


def work_of(spec: Spec, prompt: TokenizedPrompt, model: CachedModel, saes: Sequence[SaeRef]) -> Sequence[Work]:
    """All that an experiment measures of one prompt."""
    if isinstance(spec, SaeSpec):
        return sae_work(spec, prompt, saes)
    return ablations(spec, prompt, *_shape(model))


Block = list[tuple[TokenizedPrompt, tuple[Work, ...]]]


def _blocks(work: Iterable[tuple[TokenizedPrompt, Sequence[Work]]], rule: CutRule, price: "_Price") -> Iterator[Block]:
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


def _unit(about: Sequence[object], experiment: str, block: Block, price: "_Price", heads: Heads | None) -> Unit:
    # Ids of prompts may be the user's, who may write another text under the same id: tokens tell.
    items = [
        [p.prompt.id, p.token_ids, p.answer_id, p.wrong_id, [_said(each, heads) for each in part]] for p, part in block
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


def _said(work: Work, heads: Heads | None) -> Sequence[object]:
    """What the name of a unit depends on."""
    match work:
        case Ablation():
            # All heads, where layers have a number of their own, have another name than where that was not known.
            named = heads.named(work.layers, None) if heads is not None and work.heads is None else work.heads
            return work.layers, named, work.edges
        case SaeRef():
            return work.identity
        case Injection():
            return [work.sae.identity, work.feature, work.strength, work.positions]


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic of a model at one prompt length. What the catalog does not know counts as nothing."""

    n_layers: int
    n_tokens: int
    per_position: int
    """Of one position through one layer: its weights, and attention to the whole prompt."""
    unembedding: int
    hidden: int

    @classmethod
    def of(cls, model: CachedModel, n_tokens: int) -> "Cost":
        hidden, vocabulary, n_layers = model.hidden_size or 0, model.vocab_size or 0, max(1, model.n_layers or 1)
        # A head of its own counts among the layers' weights: the catalog does not say whether it is tied.
        weights = max(0, (model.parameters or 0) - vocabulary * hidden) // n_layers
        return cls(n_layers, n_tokens, 2 * weights + 4 * n_tokens * hidden, 2 * vocabulary * hidden, hidden)

    @property
    def full(self) -> int:
        """One forward of the whole prompt, one position unembedded."""
        return self.n_layers * self.n_tokens * self.per_position + self.unembedding

    def cone(self, ablation: Ablation) -> int:
        """One ablation, from its first layer and its first query on."""
        return self.restarted(ablation.layers[0], ablation.edges[0][0])

    def restarted(self, layer: int, position: int) -> int:
        """From a layer and a position on, one position unembedded."""
        layers, positions = max(0, self.n_layers - layer), self.n_tokens - position
        return layers * positions * self.per_position + self.unembedding


ACTIVE = 32
"""Features that are taken for active at one token: plans are made before anything is encoded."""


@dataclass(frozen=True, slots=True)
class _Price:
    """What an experiment's work costs on a model, at one prompt length.

    Args:
        spec: the experiment.
        cost: of the model.
        full: whether all is measured by full forwards.
    """

    spec: Spec
    cost: Cost
    full: bool

    @property
    def clean(self) -> int:
        """The clean run of a prompt."""
        everywhere = isinstance(self.spec, SaeSpec) and self.spec.measure == "quality"
        return self.cost.full + everywhere * self._elsewhere

    def cut(self, work: Work) -> int:
        """What decides where units end, whatever the engine."""
        match work:
            case Ablation():
                return self.cost.cone(work)
            case Injection():
                return self.cost.restarted(work.sae.layer, work.positions[0])
            case SaeRef():
                return self._of_sae(work, self.cost.restarted(work.layer, 0))

    def measured(self, work: Work) -> int:
        """What it takes with the job's engine."""
        if not self.full:
            return self.cut(work)
        return self._of_sae(work, self.cost.full) if isinstance(work, SaeRef) else self.cost.full

    def _of_sae(self, sae: SaeRef, forward: int) -> int:
        """All that is made of one text with an autoencoder, given what one forward takes that starts at its site."""
        assert isinstance(self.spec, SaeSpec)
        encoded = 2 * self.cost.n_tokens * self.cost.hidden * sae.d_sae
        match self.spec.measure:
            case "features":
                return encoded
            case "ablation":
                return encoded + min(sae.d_sae, ACTIVE * self.cost.n_tokens) * forward
            case _:  # with its output, and with zeros in the place
                return encoded + 2 * (forward + self._elsewhere)

    @property
    def _elsewhere(self) -> int:
        """Unembedding all positions but one."""
        return (self.cost.n_tokens - 1) * self.cost.unembedding


def full_forward_flops(model: CachedModel, n_tokens: int) -> int:
    """Arithmetic of one prompt through the whole model."""
    return Cost.of(model, n_tokens).full


COMPANY_FORWARDS, COMPANY_PROMPTS = 2, 4
"""Full forwards that may be spent on the company of an ablation that is verified, and prompts that it may be of: each
has a clean run."""


def company(
    job: Job,
    spec: KnockoutSpec,
    model: CachedModel,
    prompts: Sequence[TokenizedPrompt],
    prompt: TokenizedPrompt,
    ablation: Ablation,
) -> Company:
    """What an ablation is measured among when it is verified, as in a unit: in a batch other mistakes are possible.

    Args:
        job: the job.
        spec: the experiment that it is of.
        model: the model.
        prompts: as the model reads them.
        prompt: one of them.
        ablation: one that the experiment makes of it.
    """
    cost = Cost.of(model, len(prompt.token_ids))
    alike = fit(job, spec, model, [p for p in prompts if len(p.token_ids) == cost.n_tokens], ())
    first = alike.index(prompt)
    rule = CutRule(unit_flops=COMPANY_FORWARDS * cost.full)
    near = (*alike[first:], *alike[:first])[:COMPANY_PROMPTS]
    work = ((p, work_of(spec, p, model, ())) for p in near)
    for block in _blocks(work, rule, _Price(spec, cost, full=False)):
        found = [(p, tuple(each for each in part if isinstance(each, Ablation))) for p, part in block]
        if any(p is prompt and ablation in part for p, part in found):
            return found
    raise ValueError(f"{spec.name!r} does not measure {ablation} of prompt {prompt.prompt.id!r}")


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does, as measured on it."""

    flops: float
    """Arithmetic a second in large matrix products."""
    load_bytes: float
    """Bytes of weights loaded a second."""
    start_seconds: float
    """From the start of a process until it can load, and of the checks behind the load."""
    step_seconds: float
    """What one layer of one forward takes however small the batch is."""
    process_bytes: int
    """What a process takes before a model is loaded."""
    device: str
    """cpu, cuda or mps."""
    free_bytes: int
    """Memory of the device that batches may be cut to."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model's units will take on one replica."""

    seconds: float
    peak_bytes: int
    """Of the replica's process, on the CPU; on a GPU, the share beyond `process_bytes` is the GPU's."""
    forwards: int
    """Clean runs, and sweeps or batches of ablations."""


EFFICIENCY = 0.6
"""Share of the rate of large matrix products that a model's reach, over short and long prompts."""


def estimate(
    job: Job, model: CachedModel, units: Sequence[Unit], prompts: Mapping[str, TokenizedPrompt], rates: Rates
) -> Estimate:
    """Time and peak memory of a model's units, measured by the causal cone (or as the job says).

    Args:
        job: the job.
        model: the model.
        units: its units.
        prompts: prompt id -> prompt.
        rates: of the machine.
    """
    size, n_layers = _BYTES[job.dtype], model.n_layers or 1
    hidden, vocabulary = model.hidden_size or 0, model.vocab_size or 0
    shape = Shape(
        n_heads=max(model.heads_by_layer or (model.n_heads or 1,)),
        hidden_size=hidden,
        intermediate_size=model.intermediate_size or 4 * hidden,
        vocab_size=vocabulary,
        itemsize=size,
        n_layers=n_layers,
        key_width=_key_width(model),
    )
    weights = (model.parameters or model.size_on_disk // 2) * size
    full = job.engine == "full"
    specs = {spec.name: spec for spec in job.experiments}
    forwards, widest = 0, 0
    for unit in units:
        spec = specs[unit.experiment]
        for n_rows, computed, attended in _batches(spec, unit, prompts, full=full):
            most = rows_per_batch(shape, computed, attended, rates.device, rates.free_bytes, sliced=not full)
            forwards += -(-n_rows // most) + (not _reads_texts(spec))  # the clean run, which other rows stand beside
            widest = max(widest, min(n_rows, most) * row_bytes(shape, computed, attended, sliced=not full))
    longest = max((len(prompt.token_ids) for prompt in prompts.values()), default=1)
    kept = 0 if full else _kept_bytes(units, prompts, shape, rates)
    processor = "cpu" if rates.device == "cpu" else "gpu"
    logits = min(UNEMBEDDED[processor], max((unit.n_ablations for unit in units), default=0) * vocabulary) * 4
    # The check at load, and the clean run of the longest prompt, go through whole forwards whatever the rest needs.
    whole = reference_bytes(shape, longest) if job.verify else row_bytes(shape, longest, longest)
    largest = max(widest, whole)
    work = kept + largest + (0 if full else 2 * logits) + 6 * 4 * METRIC_SLICE[processor]
    autoencoders = _sae_bytes(units, hidden)
    # While it loads, a process on the CPU also holds the file that the weights are converted from.
    source = model.size_on_disk if rates.device == "cpu" else 0
    seconds = (
        rates.start_seconds
        + weights / rates.load_bytes
        + forwards * n_layers * rates.step_seconds
        + (sum(unit.flops for unit in units) + _verifying(job, model, prompts, units)) / (EFFICIENCY * rates.flops)
    )
    return Estimate(seconds, rates.process_bytes + weights + max(source, work + autoencoders), forwards)


def _verifying(job: Job, model: CachedModel, prompts: Mapping[str, TokenizedPrompt], units: Sequence[Unit]) -> int:
    """Arithmetic of what is measured twice: two full forwards of a usual prompt, a clean run, and the company."""
    usual = sum(full_forward_flops(model, len(p.token_ids)) for p in prompts.values()) // max(1, len(prompts))
    twice = min(job.verify, sum(unit.n_ablations for unit in units))
    return twice * (2 + 1 + COMPANY_FORWARDS) * usual


def _kept_bytes(units: Sequence[Unit], prompts: Mapping[str, TokenizedPrompt], shape: Shape, rates: Rates) -> int:
    """Memory of clean runs: of the largest, and of others as long as there is room."""
    largest, seen = 0, dict[tuple[str, ...], int]()
    for unit in units:
        ids = tuple(prompt_id for prompt_id, _ in unit.items)
        n_tokens = len(prompts[ids[0]].token_ids)
        at_once = 1
        if len(ids) > 1 and pays_together(shape, len(ids), unit.n_ablations, n_tokens):
            at_once = min(len(ids), POSITIONS_PER_BATCH[rates.device] // n_tokens)
            at_once = min(at_once, prompts_kept(shape, n_tokens, rates.free_bytes))
        largest = max(largest, kept_bytes(shape, at_once, n_tokens))
        seen[ids] = kept_bytes(shape, len(ids), n_tokens)
    return max(largest, min(KEPT_BYTES + largest, sum(seen.values())))


def _batches(
    spec: Spec, unit: Unit, prompts: Mapping[str, TokenizedPrompt], *, full: bool
) -> Iterator[tuple[int, int, int]]:
    """(rows, positions computed, positions attended to) of what a unit's work goes through the model in."""
    n_tokens = len(prompts[unit.items[0][0]].token_ids)
    if _reads_texts(spec):
        # Clean; for quality also with each autoencoder's output, and with zeros in the place.
        for _ in range(1 if spec.measure == "features" else 1 + 2 * len(unit.items[0][1])):
            yield len(unit.items), n_tokens, n_tokens
        return
    by_start: Counter[int] = Counter()
    for _, its in unit.items:
        for work in its:
            rows = min(work.d_sae, ACTIVE * n_tokens) if isinstance(work, SaeRef) else 1
            by_start[_first_position(work)] += rows
    if full:
        yield by_start.total() + len(unit.items), n_tokens, n_tokens
        return
    for start, n_rows in by_start.items():
        yield n_rows + 1, n_tokens - start, n_tokens


def _reads_texts(spec: Spec) -> TypeGuard[SaeSpec]:
    """Whether whole texts are measured, and not changes at places of them."""
    return isinstance(spec, SaeSpec) and spec.measure in ("features", "quality")


def _first_position(work: Work) -> int:
    """The first that is computed again."""
    match work:
        case Ablation():
            return work.edges[0][0]
        case Injection():
            return work.positions[0]
        case SaeRef():
            return 0


SAE_ROWS, SAE_FEATURES = 1024, 8192
"""What autoencoders encode at one time: tokens, and features of each."""


def _sae_bytes(units: Sequence[Unit], hidden: int) -> int:
    """Memory that the autoencoders of these units take: encoders and decoders, and what is encoded at one time."""
    used = {
        work.sae if isinstance(work, Injection) else work
        for unit in units
        for _, its in unit.items
        for work in its
        if not isinstance(work, Ablation)
    }
    return sum(2 * hidden * sae.d_sae * 4 for sae in used) + (2 * SAE_ROWS * SAE_FEATURES * 4 if used else 0)


def _key_width(model: CachedModel) -> int:
    hidden, heads = model.hidden_size or 0, model.n_heads or 1
    return (model.head_dim or hidden // heads) * (model.n_kv_heads or heads)
