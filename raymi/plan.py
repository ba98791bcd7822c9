"""From a job and a catalog to units: which models, then per model which ablations are leased and committed together."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from random import Random

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.knockout.spec import Ablation, KnockoutSpec, ablations, check
from raymi.job import Job
from raymi.model.sizes import METRIC_SLICE, UNEMBEDDED, Shape, row_bytes, rows_per_batch
from raymi.prompts import TokenizedPrompt

UNIT_VERSION = 1
"""Raised when rows of the same unit would mean something else, so that they are measured again."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is leased, retried and committed: a block of ablations of one experiment on one model.

    Units are cut by a pure integer rule, so the same job on the same commit gives the same units everywhere.
    """

    unit_id: str
    experiment: str
    """Name of the experiment within the job."""
    items: tuple[tuple[str, tuple[Ablation, ...]], ...]
    """(prompt id, its ablations), prompts of equal token length only."""
    flops: int
    """Arithmetic by the causal cone (by full forwards where the job asks for those), for planning and progress."""

    @property
    def n_ablations(self) -> int:
        return sum(len(ablations) for _, ablations in self.items)


@dataclass(frozen=True, slots=True)
class CutRule:
    """Where units end. Frozen in a run's manifest: another rule would give units of other names, and rows twice."""

    unit_ablations: int = 512
    """Most ablations of a unit."""
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
            check(spec, *_shape(model))
    except UserError as error:
        return Rejected(model.id, str(error), named=True)
    return None


def _shape(model: CachedModel) -> tuple[int, int]:
    if model.n_layers is None or model.n_heads is None:
        raise UserError(f"{model.id}: its config.json does not say how many layers and heads it has")
    return model.n_layers, model.n_heads


def units(
    job: Job, spec: KnockoutSpec, model: CachedModel, prompts: Sequence[TokenizedPrompt], rule: CutRule | None = None
) -> list[Unit]:
    """The units of one experiment on one model, for one generation of prompts.

    Called for every generation (prompts that came into the run together), so that later prompts leave earlier units as
    they are. A unit holds prompts of one token length, and its id covers all that its rows depend on.

    Args:
        job: for its dtype.
        spec: one of the job's experiments.
        model: the model, at one commit.
        prompts: a generation of the job's prompts as the model reads them; those that `spec` does not choose are left.
        rule: where units end; by default as the job says.

    Raises:
        UserError: a prompt is longer than the model's context, or has not what the experiment cuts.
    """
    rule = rule or CutRule(unit_ablations=job.unit_ablations)
    by_length: dict[int, list[TokenizedPrompt]] = {}
    for prompt in prompts:
        if spec.chooses(prompt.prompt.id):
            _fits(prompt, model)
            by_length.setdefault(len(prompt.token_ids), []).append(prompt)
    about = [UNIT_VERSION, model.id, model.revision, job.dtype, spec.canonical, job.top_k]
    full = job.engine == "full"
    cut: list[Unit] = []
    for n_tokens, bucket in sorted(by_length.items()):
        cost = Cost.of(model, n_tokens)
        work = ((prompt, ablations(spec, prompt, *_shape(model))) for prompt in bucket)
        cut += [_unit(about, spec.name, block, cost, full=full) for block in _blocks(work, rule, cost)]
    return cut


def _fits(prompt: TokenizedPrompt, model: CachedModel) -> None:
    if model.context is not None and len(prompt.token_ids) > model.context:
        raise UserError(
            f"{model.id}: prompt {prompt.prompt.id!r} has {len(prompt.token_ids)} tokens, "
            f"more than the model's context of {model.context}"
        )


Block = list[tuple[TokenizedPrompt, tuple[Ablation, ...]]]


def _blocks(work: Iterable[tuple[TokenizedPrompt, list[Ablation]]], rule: CutRule, cost: "Cost") -> Iterator[Block]:
    """The same ablations in the same order, as many at a time as the rule allows.

    A prompt that fits into a block is not split over two: its clean run would be made twice.
    """
    block: Block = []
    room, flops = rule.unit_ablations, rule.unit_flops
    for prompt, its in work:
        costs = [cost.cone(a) for a in its]
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


def _unit(about: Sequence[object], experiment: str, block: Block, cost: "Cost", *, full: bool) -> Unit:
    # Ids of prompts may be the user's, who may write another text under the same id: tokens tell.
    items = [
        [p.prompt.id, p.token_ids, p.answer_id, p.wrong_id, [(a.layers, a.heads, a.edges) for a in part]]
        for p, part in block
    ]
    text = json.dumps([about, items], separators=(",", ":"))
    # Every prompt is also run clean.
    measured = sum(cost.full if full else cost.cone(ablation) for _, part in block for ablation in part)
    return Unit(
        unit_id=sha256(text.encode()).hexdigest()[:16],
        experiment=experiment,
        items=tuple((prompt.prompt.id, part) for prompt, part in block),
        flops=len(block) * cost.full + measured,
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic of a model at one prompt length. What the catalog does not know counts as nothing."""

    n_layers: int
    n_tokens: int
    per_position: int
    """Of one position through one layer: its weights, and attention to the whole prompt."""
    unembedding: int

    @classmethod
    def of(cls, model: CachedModel, n_tokens: int) -> "Cost":
        hidden, vocabulary, n_layers = model.hidden_size or 0, model.vocab_size or 0, max(1, model.n_layers or 1)
        # A head of its own counts among the layers' weights: the catalog does not say whether it is tied.
        weights = max(0, (model.parameters or 0) - vocabulary * hidden) // n_layers
        return cls(n_layers, n_tokens, 2 * weights + 4 * n_tokens * hidden, 2 * vocabulary * hidden)

    @property
    def full(self) -> int:
        """One forward of the whole prompt, one position unembedded."""
        return self.n_layers * self.n_tokens * self.per_position + self.unembedding

    def cone(self, ablation: Ablation) -> int:
        """One ablation, from its first layer and its first query on."""
        layers, positions = self.n_layers - ablation.layers[0], self.n_tokens - ablation.edges[0][0]
        return layers * positions * self.per_position + self.unembedding


def full_forward_flops(model: CachedModel, n_tokens: int) -> int:
    """Arithmetic of one prompt through the whole model."""
    return Cost.of(model, n_tokens).full


def drawn(job: Job, model: CachedModel, prompts: Sequence[TokenizedPrompt]) -> list[tuple[TokenizedPrompt, Ablation]]:
    """The ablations that are measured twice, once by full forwards: `job.verify` of them, drawn by the job's seed.

    Args:
        job: the job.
        model: the model.
        prompts: as the model reads them.
    """
    random = Random(f"{job.seed} {model.id}")
    choices = [(spec, prompt) for spec in job.experiments for prompt in prompts if spec.chooses(prompt.prompt.id)]
    found: list[tuple[TokenizedPrompt, Ablation]] = []
    for spec, prompt in random.choices(choices, k=job.verify) if choices else []:
        if its := ablations(spec, prompt, *_shape(model)):
            found.append((prompt, random.choice(its)))
    return found


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
    shape = Shape(model.n_heads or 1, hidden, model.intermediate_size or 4 * hidden, vocabulary, size)
    weights = (model.parameters or model.size_on_disk // 2) * size
    full = job.engine == "full"
    forwards, widest = 0, 0
    for unit in units:
        for n_rows, computed, attended in _batches(unit, prompts, full=full):
            most = rows_per_batch(shape, computed, attended, rates.device, rates.free_bytes)
            forwards += 1 + -(-n_rows // most)
            widest = max(widest, min(n_rows, most) * row_bytes(shape, computed, attended))
    longest = max((len(prompt.token_ids) for prompt in prompts.values()), default=1)
    kept = 0 if full else n_layers * longest * size * (hidden + 2 * _key_width(model))
    processor = "cpu" if rates.device == "cpu" else "gpu"
    logits = min(UNEMBEDDED[processor], max((unit.n_ablations for unit in units), default=0) * vocabulary) * 4
    work = kept + max(widest, row_bytes(shape, longest, longest)) + 2 * logits + 6 * 4 * METRIC_SLICE[processor]
    # While it loads, a process on the CPU also holds the file that the weights are converted from.
    source = model.size_on_disk if rates.device == "cpu" else 0
    seconds = (
        rates.start_seconds
        + weights / rates.load_bytes
        + forwards * n_layers * rates.step_seconds
        + sum(unit.flops for unit in units) / (EFFICIENCY * rates.flops)
    )
    return Estimate(seconds, rates.process_bytes + weights + max(source, work), forwards)


def _batches(unit: Unit, prompts: Mapping[str, TokenizedPrompt], *, full: bool) -> Iterator[tuple[int, int, int]]:
    """(rows, positions computed, positions attended to) of what a unit's ablations go through the model in."""
    n_tokens = len(prompts[unit.items[0][0]].token_ids)
    if full:
        yield unit.n_ablations + len(unit.items), n_tokens, n_tokens
        return
    by_query = Counter(ablation.edges[0][0] for _, its in unit.items for ablation in its)
    for query, n_rows in by_query.items():
        yield n_rows + 1, n_tokens - query, n_tokens


def _key_width(model: CachedModel) -> int:
    hidden, heads = model.hidden_size or 0, model.n_heads or 1
    return (model.head_dim or hidden // heads) * (model.n_kv_heads or heads)
