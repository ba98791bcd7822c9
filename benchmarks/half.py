"""What half precision does to knockouts, and how surely a wrong one is refused there.

Every head of every layer, the last query cut from all keys, by the cone in half precision; beside the same weights in
float32 (`raymi.model.truth`) and the family's own forward in half precision. Needs torch and transformers alone:

    PYTHONPATH=. python -m benchmarks.half                                 # the demo models, bfloat16 and float16
    PYTHONPATH=. python -m benchmarks.half --shape 1b --device cuda        # random weights; float32 beside them
    PYTHONPATH=. python -m benchmarks.half FOLDER --dtype bfloat16         # a snapshot

It ends with status 1 where a bar is missed.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import SHAPES, make_shape
from demo.models import DEMO_MODELS, cache_directory
from raymi.model.engine import Capability, Engine, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.model.loading import DTYPES, load, pick_device
from raymi.model.proof import Precision, Truth, is_half, precision, spread_of, truths

LEAST_REFUSED, TIMES, N_TOKENS, N_RIGHT = 0.95, 3.0, 12, 200


@dataclass(frozen=True)
class Found:
    """Of one model in one dtype."""

    model: str
    dtype: str
    capability: Capability
    n_right: int
    right_refused: int
    n_pairs: int
    """(head, other head of its layer) whose effects in float32 differ by more than `TIMES` the family's own error."""
    pairs_refused: int
    n_below: int
    """Those that differ by less: whether they are told apart is left to chance."""
    effect: float
    """Median over heads of the largest change of a logit, in float32."""
    off: dict[str, tuple[float, float, float, float]]
    """`cone` and `own`, from float32: median and largest error of an effect on logits; of KL(clean || ablated)."""

    @property
    def share(self) -> float:
        return self.pairs_refused / self.n_pairs if self.n_pairs else 1.0

    @property
    def met(self) -> bool:
        return self.share >= LEAST_REFUSED and not self.right_refused


def measure(model: HookedModel, name: str, dtype: str, n_right: int = N_RIGHT) -> Found:
    """Prove every head of a model.

    Args:
        model: in half precision.
        name: of the model, for the table.
        dtype: of the model, for the table.
        n_right: heads to measure at least, so of so many prompts; less: of layers evenly spread.
    """
    capability, at = measure_capability(model, N_TOKENS), N_TOKENS - 1
    heads = {layer: model.heads(layer) for layer in model.attention_layers}
    most = max(2, n_right // max(heads.values()) + 1)
    layers = list(heads)[:: -(-len(heads) // most)]
    n_prompts = -(-n_right // sum(heads[layer] for layer in layers))
    edges = tuple((at, key) for key in range(N_TOKENS))
    groups = [(prompt, layer) for prompt in range(n_prompts) for layer in layers]
    cells = [Cell(p, (Mask(layer, (head,), edges),)) for p, layer in groups for head in range(heads[layer])]
    ids_PT = model.probe_ids(N_TOKENS, n_prompts)
    found = truths(model, ids_PT, cells, rows=16)
    measured = _measured(Engine(model, capability, capability.way), ids_PT, cells)
    judge = _judge(capability, found, is_half(model))
    effects = [ablated_V - clean_V for ablated_V, clean_V in measured]
    right = [judge.passes(truth, effect_V) for truth, effect_V in zip(found, effects, strict=True)]
    n_pairs = refused = below = 0
    for one, other in _pairs([heads[layer] for _, layer in groups]):
        if judge.differ(found[one], found[other]):
            n_pairs += 1
            refused += not judge.passes(found[one], effects[other])
        else:
            below += 1
    return Found(
        name,
        dtype,
        capability,
        len(right),
        right.count(False),
        n_pairs,
        refused,
        below,
        float(torch.stack([truth.effect.abs().max() for truth in found]).median()),
        {
            "cone": _off(found, measured),
            "own": _off(found, [(truth.own, truth.own_clean) for truth in found]),
        },
    )


class _Half:
    """As raymi judges in half precision."""

    def __init__(self, capability: Capability, found: Sequence[Truth]) -> None:
        self.typical, self.capped = capability.precision or precision(found), capability.way != "full"

    def passes(self, truth: Truth, effect_V: Tensor) -> bool:
        return truth.judge(effect_V, self.typical, capped=self.capped).passed

    def differ(self, one: Truth, other: Truth) -> bool:
        own = max(self.typical.spread, spread_of(one.error))
        return spread_of(other.effect - one.effect) > TIMES * own


class _Full:
    """As raymi judges in float32: by one tolerance, which is what pairs have to differ by three times, too."""

    def __init__(self, capability: Capability) -> None:
        self.tolerance = capability.tolerance

    def passes(self, truth: Truth, effect_V: Tensor) -> bool:
        return float((effect_V - truth.effect).abs().max()) <= self.tolerance

    def differ(self, one: Truth, other: Truth) -> bool:
        return float((other.effect - one.effect).abs().max()) > TIMES * self.tolerance


def _judge(capability: Capability, found: Sequence[Truth], half: bool) -> _Half | _Full:
    return _Half(capability, found) if half else _Full(capability)


def _pairs(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Two of a group each, either way round."""
    begin = 0
    for size in sizes:
        yield from permutations(range(begin, begin + size), 2)
        begin += size


def _measured(engine: Engine, ids_PT: Tensor, cells: Sequence[Cell]) -> list[tuple[Tensor, Tensor]]:
    """Ablated and clean logits of the same batch, [V] each."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in engine.ablations(ids_PT, cells):
        found.update(zip(batch.cells, zip(batch.ablated_AV, batch.clean_PV[batch.prompt_A], strict=True), strict=True))
    return [found[i] for i in range(len(cells))]


def _off(found: Sequence[Truth], measured: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float, float, float]:
    logits, kls = list[float](), list[float]()
    for truth, (ablated_V, clean_V) in zip(found, measured, strict=True):
        logits.append(float((ablated_V - clean_V - truth.effect).abs().max()))
        kls.append(abs(_kl(clean_V, ablated_V) - _kl(truth.clean, truth.ablated)))
    return (*_median_and_largest(logits), *_median_and_largest(kls))


def _median_and_largest(values: Sequence[float]) -> tuple[float, float]:
    return float(torch.tensor(values).median()), max(values)


def _kl(clean_V: Tensor, ablated_V: Tensor) -> float:
    p_V, q_V = clean_V.double().log_softmax(-1), ablated_V.double().log_softmax(-1)
    return float((p_V.exp() * (p_V - q_V)).sum())


# ---- tables ----------------------------------------------------------------------------------------------------------


def proofs(found: Sequence[Found]) -> str:
    """How surely a wrong head is refused, as Markdown."""
    header = (
        "| model | dtype | way | right ones refused | wrong ones refused | pairs below the bar | own error | flips |  |"
    )
    lines = [header, "|" + " --- |" * 9]
    for each in found:
        of = each.capability.precision
        lines.append(
            f"| {each.model} | {each.dtype} | {each.capability.way} | {each.right_refused} of {each.n_right} "
            f"| {each.pairs_refused:,} of {each.n_pairs:,} ({each.share:.1%}) "
            f"| {each.n_below:,} ({each.n_below / max(1, each.n_below + each.n_pairs):.1%}) "
            f"| {_spread(of)} | {of.flips if of else '-'} "
            f"| {'met' if each.met else 'NOT MET'} |"
        )
    return "\n".join(lines)


def _spread(of: Precision | None) -> str:
    return f"{of.spread:.2g}" if of else "-"


def differences(found: Sequence[Found]) -> str:
    """Differences of half precision from float32, as Markdown."""
    lines = [
        "| model | dtype | effect | by | off on a logit: median, largest | off in KL: median, largest |",
        "|" + " --- |" * 6,
    ]
    for each in found:
        for by, (logit, most, kl, most_kl) in each.off.items():
            what = each.capability.way if by == "cone" else "the family's own forward"
            lines.append(
                f"| {each.model} | {each.dtype} | {each.effect:.2g} | {what} | {logit:.2g}, {most:.2g} "
                f"| {kl:.1e}, {most_kl:.1e} |"
            )
    return "\n".join(lines)


# ---- models ----------------------------------------------------------------------------------------------------------


def _models(args: argparse.Namespace) -> Iterator[tuple[str, str, HookedModel]]:
    """Name, dtype and model, one at a time."""
    dtypes: list[str] = args.dtype or (["float32"] if args.shape else []) + ["bfloat16", "float16"]
    if args.shape:
        name, raw, _ = make_shape(args.shape, torch.float32, str(pick_device(args.device)))
        for dtype in dtypes:
            made = copy.deepcopy(raw)
            for parameter in made.parameters():  # and no buffers: what is loaded from files has these in float32, too
                parameter.data = parameter.data.to(DTYPES[dtype])
            yield name, dtype, HookedModel(made, name)
        return
    demo = [(each.id.split("/")[-1], each.snapshot(cache_directory())) for each in DEMO_MODELS]
    for name, path in [(each.name, each) for each in args.folders] or demo:
        for dtype in dtypes:
            yield name, dtype, load(path, name=name, dtype=dtype, device=args.device, allow_pickle=True).model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="snapshots; the demo models where there are none")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--heads", type=int, default=N_RIGHT, help="how many heads to measure at least")
    args = parser.parse_args(argv)
    found = [measure(model, name, dtype, args.heads) for name, dtype, model in _models(args)]
    print(proofs(found), differences(found), sep="\n\n")
    return 0 if all(each.met for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
