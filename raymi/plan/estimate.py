"""What a model's units will take: time, and peak memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymi.catalog import CachedModel
from raymi.experiments.costs import full_forward_flops
from raymi.experiments.unit import Unit
from raymi.job import Job
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
from raymi.plan.verification import COMPANY_FORWARDS
from raymi.prompts import TokenizedPrompt

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
        n_tokens = len(prompts[unit.items[0][0]].token_ids)
        for n_rows, computed, attended in spec.batches(unit.items, n_tokens, full=full):
            most = rows_per_batch(shape, computed, attended, rates.device, rates.free_bytes, sliced=not full)
            forwards += -(-n_rows // most) + (not spec.reads_texts)  # the clean run, which other rows stand beside
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


SAE_ROWS, SAE_FEATURES = 1024, 8192
"""What autoencoders encode at one time: tokens, and features of each."""


def _sae_bytes(units: Sequence[Unit], hidden: int) -> int:
    """Memory that the autoencoders of these units take: encoders and decoders, and what is encoded at one time."""
    used = {sae for unit in units for _, its in unit.items for work in its for sae in work.autoencoders()}
    return sum(2 * hidden * sae.d_sae * 4 for sae in used) + (2 * SAE_ROWS * SAE_FEATURES * 4 if used else 0)


def _key_width(model: CachedModel) -> int:
    hidden, heads = model.hidden_size or 0, model.n_heads or 1
    return (model.head_dim or hidden // heads) * (model.n_kv_heads or heads)
