"""raymi's `quality` of autoencoders beside SAELens's evaluation of them, in one process, on the same tokens.

Both sides measure everything that SAELens can: reconstruction, sparsity and norms, densities, losses and divergences of
the spliced and of the zero-ablated model. `python -m benchmarks.autoencoders --help` says how.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.arithmetic import PeakMemory, timed
from benchmarks.cases import DEMO, load_demo, twin
from benchmarks.report import append_tables, print_tables, setting
from benchmarks.results import Aim
from demo.models import DEMO_SAE, cache_directory
from raymi import catalog
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.run import run
from raymi.job import Job
from raymi.model import memory
from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import HookedModel
from raymi.plan.units import units
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.sae import SAE, Description, load
from raymi.sae.formats.base import straight
from raymi.sae.metrics import merged, metrics
from raymi.tokenizer import special_ids

Metrics = Mapping[str, float | None]

CPU = torch.device("cpu")
CONTEXT = 128
BATCH = 16
"""Texts that SAELens takes at a time: its own command's default."""
KEYS = (
    *("l0", "l1", "mse", "explained_variance", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio"),
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_with_sae", "kl_div_with_ablation"),
)
"""What is compared; the scores are ratios of these. SAELens averages the bias over batches, raymi over tokens."""
ONE, EIGHT = 1.5, 4.0
"""How many times as fast as SAELens raymi is to be: with one autoencoder at mid-depth, with eight."""
AGREE = 1e-4
WIDE, ROWS, NARROW = 1 << 20, 1024, 64
"""Features, rows and input width of the encoder whose memory is measured."""


@dataclass(frozen=True)
class Result:
    """One way of measuring some autoencoders."""

    name: str
    n_saes: int
    n_tokens: int
    ours: float
    """Seconds, of all autoencoders."""
    theirs: float
    differences: Mapping[str, float]
    """Of each metric, the largest of any autoencoder, relative to SAELens's."""

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


# ---- the two sides ---------------------------------------------------------------------------------------------------


def spread(n_layers: int, n: int) -> list[int]:
    """Evenly spread layers; one of them is the middle one."""
    return [(2 * i + 1) * n_layers // (2 * n) for i in range(n)]


class Ours:
    """raymi, from units that the plan has cut to metrics: what a replica and a report do, without the store between."""

    def __init__(self, model: PreTrainedModel, ids_PT: Tensor, special: frozenset[int]) -> None:
        memory.keep_what_is_freed()  # as `raymi.model.loading.load` does
        self.hooked = HookedModel(model, DEMO.id)
        self.capability = measure_capability(self.hooked, 12)
        self.special = special
        names = [f"text-{row:04}" for row in range(len(ids_PT))]
        self.texts = {
            name: TokenizedPrompt(Prompt(name, name), tuple(ids), tuple(map(str, ids)), False, None, None, {})
            for name, ids in zip(names, ids_PT.tolist(), strict=True)
        }
        self.job = Job.model_validate(
            {
                "name": "benchmark",
                "models": DEMO.id,
                "prompts": [{"id": name, "text": name} for name in names],
                "experiments": [{"kind": "sae", "measure": "quality"}],
            }
        )
        self.model = catalog.find(DEMO.id, cache_directory() / "hub")
        self.saes: dict[SaeRef, SAE] = {}

    def ref(self, layer: int) -> SaeRef:
        """The demo's autoencoder, standing at some layer: what it says there is poor, but costs the same."""
        site = f"blocks.{layer}.hook_resid_post"
        ref = SaeRef(site, str(DEMO_SAE.source), DEMO_SAE.revision, site, None, 0)
        self.saes.setdefault(ref, load(DEMO_SAE.source, site=site))
        return ref

    def __call__(self, layers: Sequence[int]) -> dict[int, Metrics]:
        """The metrics by layer."""
        engine = Engine(self.hooked, self.capability, self.capability.way)  # a new one remembers no zero ablation
        spec, refs = self.job.sae_experiments[0], {layer: self.ref(layer) for layer in layers}
        about = {"model_id": DEMO.id, "revision": self.model.revision, "dtype": "float32"}
        tables = [
            run(engine, spec, unit, self.texts, self.saes.__getitem__, special=self.special, **about)
            for unit in units(self.job, spec, self.model, list(self.texts.values()), saes=list(refs.values()))
        ]
        rows = sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["sae"])
        found = {name: metrics(merged(of_sae)) for name, of_sae in groupby(rows, lambda row: row["sae"])}
        return {layer: found[ref.name] for layer, ref in refs.items()}


class Theirs:
    """SAELens: its loader's own wrapper of a transformers model, and both parts of its evaluation."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, ids_PT: Tensor, layers: Sequence[int]) -> None:
        from sae_lens import SAE as Autoencoder
        from sae_lens.load_model import HookedProxyLM

        mine = twin(model)
        mine.set_attn_implementation("sdpa")  # the fastest that transformers has, and its default
        self.model = HookedProxyLM(mine, tokenizer, hook_names=[f"model.layers.{layer}" for layer in layers])
        self.sae = Autoencoder.load_from_disk(DEMO_SAE.source)
        self.ids_PT, self.special = ids_PT, sorted(special_ids(tokenizer))

    def __call__(self, layer: int) -> Metrics:
        from sae_lens import evals
        from sae_lens.training.activation_scaler import ActivationScaler

        self.sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        parts = self.ids_PT.split(BATCH)
        common: dict[str, Any] = {
            "n_batches": len(parts),
            "eval_batch_size_prompts": BATCH,
            "ignore_tokens": self.special,
            "model_kwargs": {},
        }
        flags = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
        with torch.no_grad():
            downstream = evals.get_downstream_reconstruction_metrics(
                self.sae, self.model, _Batches(parts), ActivationScaler(),
                compute_kl=True, compute_ce_loss=True, **common,
            )  # fmt: skip
            found, _ = evals.get_sparsity_and_variance_metrics(
                self.sae, self.model, _Batches(parts), ActivationScaler(),
                **{f"compute_{flag}": True for flag in flags}, **common,
            )  # fmt: skip
        return found | downstream


class _Batches:
    """In place of SAELens's store of activations, of which its evaluation wants only tokens."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = iter(parts)

    def get_batch_tokens(self, size: int) -> Tensor:
        return next(self.parts)


# ---- what is measured ------------------------------------------------------------------------------------------------


def contest(name: str, ours: Ours, theirs: Theirs, layers: Sequence[int], rounds: int) -> Result:
    """The same autoencoders by both sides, in turns, after one of each that does not count."""
    found, expected = ours(layers), {layer: theirs(layer) for layer in layers[:1]}
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        mine = timed(CPU, lambda: found.update(ours(layers)))
        others = timed(CPU, lambda: expected.update({layer: theirs(layer) for layer in layers}))
        times.append((mine, others))
    seconds = [statistics.median(side) for side in zip(*times, strict=True)]
    differences = {key: max(_off(found[layer], expected[layer], key) for layer in layers) for key in KEYS}
    return Result(name, len(layers), theirs.ids_PT.numel(), seconds[0], seconds[1], differences)


def _off(found: Metrics, expected: Metrics, key: str) -> float:
    mine, other = found[key], expected[key]
    assert mine is not None
    assert other is not None
    return abs(mine - other) / abs(other)


def encoding_memory() -> tuple[int, int]:
    """Bytes that `encode_sparse` of a very wide autoencoder takes beside the weights, and those of all activations."""
    random = torch.Generator().manual_seed(0)
    encoder = torch.randn(NARROW, WIDE, generator=random)
    zeros = torch.zeros(1).expand(WIDE, NARROW)  # a decoder without memory: it is not used
    tensors = {"W_enc": encoder, "W_dec": zeros, "b_enc": torch.zeros(WIDE), "b_dec": torch.zeros(NARROW)}
    about = Description(
        format="made", file=Path("made"), architecture="topk", activation="topk", d_in=NARROW, d_sae=WIDE,
        d_out=NARROW, dtype="float32", tensors=straight(*tensors), k=64,
    )  # fmt: skip
    sae, x = SAE(about, tensors), torch.randn(ROWS, NARROW, generator=random)
    sae.encode_sparse(x[:1])  # weights are made ready when they are first used
    with PeakMemory(CPU) as peak:
        sae.encode_sparse(x)
    return peak.bytes, ROWS * WIDE * 4


# ---- the tables ------------------------------------------------------------------------------------------------------

NOTES = f"""\
Tokens a second of an autoencoder: tokens x autoencoders / seconds; of one the medians of rounds in turns, of eight one
round. Autoencoders are the demo's, at each of the layers. SAELens evaluates one after the other, {BATCH} texts at a
time, by the wrapper that its loader puts around a transformers model, with SDPA attention. Off by: the largest relative
difference of a metric.\
"""


def aims(results: Sequence[Result]) -> list[Aim]:
    """What raymi is to reach on a quiet machine, and what it did."""
    found = [Aim(f"{r.name}: times as fast as SAELens", EIGHT if r.n_saes > 1 else ONE, r.ratio, True) for r in results]
    worst = max(difference for r in results for difference in r.differences.values())
    return [*found, Aim("largest relative difference of a metric", AGREE, worst, False)]


def tables(results: Sequence[Result], bytes_taken: tuple[int, int]) -> dict[str, list[list[str]]]:
    """Title -> head and rows."""
    speed = [["autoencoders", "tokens", "raymi, s", "SAELens, s", "raymi, tokens/s", "SAELens, tokens/s", "ratio"]]
    for r in results:
        rates = [f"{r.n_tokens * r.n_saes / seconds:,.0f}" for seconds in (r.ours, r.theirs)]
        speed.append([r.name, f"{r.n_tokens:,}", f"{r.ours:.2f}", f"{r.theirs:.2f}", *rates, f"{r.ratio:.2f}x"])
    off = [["metric, off by", *(r.name for r in results)]]
    off += [[key, *(f"{r.differences[key]:.0e}" for r in results)] for key in KEYS]
    peak, dense = bytes_taken
    wide = [
        ["encode_sparse", "peak beside the weights, MiB", "all activations, MiB", "share"],
        [f"{ROWS:,} rows, {WIDE:,} features", f"{peak / 2**20:,.0f}", f"{dense / 2**20:,.0f}", f"{peak / dense:.1%}"],
    ]
    wanted = [["aim", "wanted", "found", ""]]
    for aim in aims(results):
        sign = "≥" if aim.at_least else "≤"
        wanted.append([aim.what, f"{sign} {aim.wanted:g}", f"{aim.found:.3g}", "met" if aim.met else "NOT MET"])
    return {"quality against SAELens": speed, "agreement": off, "memory": wide, "aims, on a quiet machine": wanted}


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.autoencoders", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="few texts, one round: does it run and agree?")
    made.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="append a section to this file")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    n_texts, rounds = (4, 1) if options.quick else (16, 3)
    bytes_taken = encoding_memory()  # before the heap has room from other things
    name, model, stream = load_demo(torch.float32, "cpu")
    ids_PT = stream[: n_texts * CONTEXT].view(n_texts, CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(DEMO.snapshot(cache_directory()), local_files_only=True)
    n_layers = model.config.num_hidden_layers
    middle, eight = [n_layers // 2], spread(n_layers, 8)
    theirs = Theirs(model, tokenizer, ids_PT, sorted({*middle, *eight}))
    ours = Ours(model, ids_PT, special_ids(tokenizer))
    head = setting(name, ours.hooked, ours.capability.way, {}, quick=options.quick)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print("\n".join(head), markup=False, highlight=False)
    results = [
        contest("one, at mid-depth", ours, theirs, middle, rounds),
        contest("eight, evenly spread", ours, theirs, eight, 1),
    ]
    made = tables(results, bytes_taken)
    print_tables(made, NOTES, console)
    if options.markdown:
        append_tables(options.markdown, head, "", made, NOTES)


if __name__ == "__main__":
    main()
