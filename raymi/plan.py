"""From a job and a catalog to units: which models, then per model which ablations are leased and committed together."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.knockout.spec import Ablation, KnockoutSpec, ablations, check
from raymi.job import Job
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
    """Estimate of the arithmetic of the unit by full forwards, for planning and progress."""

    @property
    def n_ablations(self) -> int:
        return sum(len(ablations) for _, ablations in self.items)


@dataclass(frozen=True, slots=True)
class CutRule:
    """Where units end. Frozen in a run's manifest: another rule would give units of other names, and rows twice."""

    unit_ablations: int = 512
    """Most ablations of a unit."""
    unit_flops: int = 4_000_000_000_000
    """Most arithmetic of a unit by full forwards, as long as it holds one ablation."""


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
    for reference in job.models.include:
        named = not any(character in reference for character in "*?[")
        matches = [find(reference)] if named else [m for m in catalog if fnmatchcase(m.id, reference)]
        if not matches:
            rejected[reference] = Rejected(reference, "matches no cached model", named=False)
        for model in matches:
            if any(_means(pattern, model) for pattern in job.models.exclude):
                continue
            refusal = _refusal(job, model, named=named)
            if refusal is None:
                chosen[model.id, model.revision] = model
            elif named or model.id not in rejected:
                rejected[model.id] = refusal
    if not chosen:
        reasons = "".join(f"\n  {each.model_id}: {each.reason}" for each in rejected.values())
        raise UserError(
            f"no model to run{reasons}", hint="`raymi models` lists the cache, `raymi fetch ID` adds to it."
        )
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
    cut: list[Unit] = []
    for n_tokens, bucket in sorted(by_length.items()):
        flops = full_forward_flops(model, n_tokens)
        size = max(1, min(rule.unit_ablations, rule.unit_flops // max(1, flops)))
        work = ((prompt, ablations(spec, prompt, *_shape(model))) for prompt in bucket)
        cut += [_unit(about, spec.name, block, flops) for block in _blocks(work, size)]
    return cut


def _fits(prompt: TokenizedPrompt, model: CachedModel) -> None:
    if model.context is not None and len(prompt.token_ids) > model.context:
        raise UserError(
            f"{model.id}: prompt {prompt.prompt.id!r} has {len(prompt.token_ids)} tokens, "
            f"more than the model's context of {model.context}"
        )


Block = list[tuple[TokenizedPrompt, tuple[Ablation, ...]]]


def _blocks(work: Iterable[tuple[TokenizedPrompt, list[Ablation]]], size: int) -> Iterator[Block]:
    """The same ablations in the same order, `size` at a time."""
    block: Block = []
    room = size
    for prompt, its in work:
        start = 0
        while start < len(its):
            part = tuple(its[start : start + room])
            block.append((prompt, part))
            start += len(part)
            room -= len(part)
            if room == 0:
                yield block
                block, room = [], size
    if block:
        yield block


def _unit(about: Sequence[object], experiment: str, block: Block, flops: int) -> Unit:
    # Ids of prompts may be the user's, who may write another text under the same id: tokens tell.
    items = [
        [p.prompt.id, p.token_ids, p.answer_id, p.wrong_id, [(a.layers, a.heads, a.edges) for a in part]]
        for p, part in block
    ]
    text = json.dumps([about, items], separators=(",", ":"))
    n_forwards = sum(len(part) + 1 for _, part in block)  # every prompt is also run clean
    return Unit(
        unit_id=sha256(text.encode()).hexdigest()[:16],
        experiment=experiment,
        items=tuple((prompt.prompt.id, part) for prompt, part in block),
        flops=n_forwards * flops,
    )


def full_forward_flops(model: CachedModel, n_tokens: int) -> int:
    """Arithmetic of one prompt through the whole model: every weight, the attention, one position unembedded.

    What the catalog does not know counts as nothing; a head of its own counts as if every position were unembedded.
    """
    hidden, vocabulary = model.hidden_size or 0, model.vocab_size or 0
    weights = max(0, (model.parameters or 0) - vocabulary * hidden)
    attention = 4 * n_tokens * n_tokens * hidden * (model.n_layers or 0)
    return 2 * weights * n_tokens + attention + 2 * vocabulary * hidden


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does, as measured on it."""

    flops: float
    """Arithmetic a second in matrix products of the size of a layer's."""
    load_bytes: float
    """Bytes of weights loaded a second."""
    start_seconds: float
    """From the start of a process until it can load."""
    process_bytes: int
    """What a process takes before a model is loaded."""
    batch_rows: int
    """Ablations run as one batch."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model's units will take on one replica."""

    seconds: float
    peak_bytes: int
    """Of the replica's process, on the CPU; on a GPU, the share beyond `process_bytes` is the GPU's."""


def estimate(model: CachedModel, dtype: str, units: Sequence[Unit], longest: int, rates: Rates) -> Estimate:
    """Time and peak memory of a model's units by full forwards.

    Args:
        model: the model.
        dtype: what it computes in.
        units: its units.
        longest: tokens of their longest prompt.
        rates: of the machine.
    """
    size = _BYTES[dtype]
    weights = (model.parameters or model.size_on_disk // 2) * size
    hidden, heads, vocabulary = model.hidden_size or 0, model.n_heads or 0, model.vocab_size or 0
    # A layer's widest moment: the MLP's inner states beside the residual stream, then scores and their softmax.
    row = longest * hidden * 12 * size + 2 * heads * longest * longest * max(size, 4) + 4 * vocabulary * 4
    rows = min(rates.batch_rows, max((unit.n_ablations for unit in units), default=0) + 1)
    seconds = rates.start_seconds + weights / rates.load_bytes + sum(unit.flops for unit in units) / rates.flops
    return Estimate(seconds=seconds, peak_bytes=rates.process_bytes + weights + rows * row)
