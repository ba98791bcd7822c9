"""What half precision proves: effects of ablations beside their truth, by the family's own error as the measure.

In half precision two right ways of computing the same differ by a lot in their logits: a tolerance that lets them pass
lets a wrong head pass, too. So what is compared are effects (ablated - clean, in which much of the error is the same),
with what the same weights give in float32 (`raymi.model.truth`). The family's own forward in half precision is off by
some error, too, for this very ablation. A measured effect passes when its error is not much more:

- its spread, the root of the mean square over the vocabulary, by at most `SPREAD` times. All of the vocabulary tells
  together, so this is what finds a wrong head (`benchmarks/half.py` measures how surely);
- its largest, by at most `LARGEST` times, and never by more than `CAP` of the largest logit.

A shift of all logits alike is taken off first: no probability sees it, and it varies most from one right way to
another. It may be `SHIFT` of the largest logit, which is no proof, but finds what is grossly wrong.

Where experts are chosen, the family's own forward is measured with the choices of the truth, so that a jump to another
expert does not pass for rounding. What is off when it chooses freely and is not with those choices has jumped, and is
counted: that is no mistake.

Legend: P prompts, T positions, A ablations, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Intervention
from raymi.model.routing import Choices, flips, routing
from raymi.model.truth import HALF, in_float32

SPREAD, LARGEST, CAP, SHIFT = 2.5, 4.0, 0.05, 0.1

FULL = 2.0
"""So many times more may full forwards be off before a model is refused: there is no slower way to go by."""

CLEAN = 3.0
"""So many times the family's own error (its spread) may a clean row of a sweep differ from the clean run."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What half precision makes of a model, from some ablations; in logits. The quadratic means of their errors."""

    error: float
    """Largest error of an effect by the family's own forward, a shift of all logits aside."""
    spread: float
    """Root of the mean square of the same."""
    clean: float
    """Spread of the error of clean logits by the family's own forward."""
    scale: float
    """Largest logit."""
    n_truths: int
    """Ablations that were measured in float32."""
    flips: int
    """Choices of experts, a token and layer, that the family's own forward makes otherwise than in float32."""
    routes: bool
    """Whether experts are chosen."""

    @property
    def tolerance(self) -> float:
        """Of a clean row of a sweep: the spread of its difference."""
        return min(CLEAN * self.clean, CAP * self.scale)


class Verdict(NamedTuple):
    """A measured effect beside its truth, in logits; a shift of all logits aside."""

    off: float
    """Largest error."""
    tolerance: float
    """What may be noise of it."""
    spread: float
    """Root of the mean square."""
    spread_tolerance: float
    shift: float
    """Of all logits alike."""
    shift_tolerance: float

    @property
    def passed(self) -> bool:
        return (
            self.off <= self.tolerance and self.spread <= self.spread_tolerance and self.shift <= self.shift_tolerance
        )

    def __str__(self) -> str:
        if not self.off <= self.tolerance:
            return f"off by {self.off:.1e} in the logits, where {self.tolerance:.1e} would be noise"
        if not self.shift <= self.shift_tolerance:
            return f"all logits shifted by {self.shift:.1e}, where {self.shift_tolerance:.1e} would be noise"
        return f"off by {self.spread:.1e} over all logits, where {self.spread_tolerance:.1e} would be noise"


@dataclass(frozen=True, slots=True)
class Truth:
    """An ablation in float32, and by the family's own forward in half precision. Logits: [V], or [N, V] of N tokens."""

    clean: Tensor
    ablated: Tensor
    own_clean: Tensor
    own: Tensor
    choices: tuple[Choices, Choices] = ({}, {})
    """Of experts, in float32: in the clean forward and in the ablated one."""
    flips: int = 0
    """How many of the ablated one's the family's own forward makes otherwise, when it is free."""

    @property
    def effect(self) -> Tensor:
        return self.ablated - self.clean

    @property
    def error(self) -> Tensor:
        """Of the family's own effect."""
        return (self.own - self.own_clean) - self.effect

    def judge(self, effect: Tensor, typical: Precision | None = None, *, capped: bool = True) -> Verdict:
        """A measured effect; of several tokens, that of the one that is off the most for its own error.

        Args:
            effect: ablated - clean, of one batch.
            typical: of this model: an ablation that the family's own forward happens to hit well is measured as it is.
            capped: whether no tolerance is above the cap; else it is `FULL` times as wide.
        """
        off, own, largest = effect - self.effect, self.error, self.clean.abs().maximum(self.ablated.abs())
        if off.dim() > 1:
            of_own, of_off = (_centred(x).square().mean(-1).sqrt() for x in (own, off))
            # A token that the family's own forward happens to hit well is as noisy as the others.
            usual = of_own.square().mean().sqrt()
            worst = int((of_off / of_own.maximum(usual)).argmax())
            again = Truth(self.clean[worst], self.ablated[worst], self.own_clean[worst], self.own[worst])
            return again.judge(effect[worst], _at_least(own, typical), capped=capped)
        error, spread = float(_centred(own).abs().max()), spread_of(own)
        if typical is not None:
            error, spread = max(error, typical.error), max(spread, typical.spread)
        cap = CAP * float(largest.max()) if capped else torch.inf
        times = 1.0 if capped else FULL
        return Verdict(
            float(_centred(off).abs().max()),
            min(times * LARGEST * error, cap),
            spread_of(off),
            min(times * SPREAD * spread, cap),
            abs(float(off.mean())),
            cap * SHIFT / CAP,
        )


def _at_least(error_NV: Tensor, typical: Precision | None) -> Precision | None:
    """What is typical of a model, or of these tokens, whichever is more."""
    if typical is None:
        return None
    largest_N = _centred(error_NV).abs().amax(-1)
    return replace(
        typical,
        error=max(typical.error, float(largest_N.square().mean().sqrt())),
        spread=max(typical.spread, spread_of(error_NV)),
    )


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def spread_of(x: Tensor) -> float:
    """Root of the mean square over the vocabulary, a shift of all logits alike aside."""
    return float(_centred(x).square().mean().sqrt())


def is_half(model: HookedModel) -> bool:
    """Whether a model needs such a proof."""
    return model.dtype in HALF


def truths(model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell], *, rows: int = 1) -> list[Truth]:
    """Ablations in float32, and by the family's own eager attention in half precision.

    Args:
        model: of half precision.
        ids_PT: prompts.
        cells: what to do to which of them.
        rows: how many float32 forwards may share a batch.

    Raises:
        NoTruth: where the model cannot be run in float32 part by part.
    """
    prompts = sorted({cell.prompt for cell in cells})
    wanted: list[tuple[int, tuple[Intervention, ...]]] = [(prompt, ()) for prompt in prompts]
    wanted += [(cell.prompt, cell.interventions) for cell in cells]
    true: list[tuple[Tensor, Choices]] = []
    with in_float32(model):
        for begin in range(0, len(wanted), rows):
            part = wanted[begin : begin + rows]
            with routing(model) as watched:
                out = model.forward(ids_PT[[p for p, _ in part]], [its for _, its in part], own_attention=True)
            true += [(logits_V, watched.of_row(row)) for row, logits_V in enumerate(out.logits_BV)]
    own: list[Tensor] = []
    flipped: list[int] = []
    for (prompt, interventions), (_, choices) in zip(wanted, true, strict=True):
        ids_1T = ids_PT[prompt][None]
        with routing(model) as watched:
            logits_V = model.forward(ids_1T, [interventions], own_attention=True).logits_BV[0]
        flipped.append(flips(choices, watched.of_row(0)))
        if flipped[-1]:
            with routing(model, [choices]):
                logits_V = model.forward(ids_1T, [interventions], own_attention=True).logits_BV[0]
        own.append(logits_V)
    found: list[Truth] = []
    for i, cell in enumerate(cells, start=len(prompts)):
        clean = prompts.index(cell.prompt)
        (clean_V, clean_choices), (ablated_V, choices) = true[clean], true[i]
        found.append(Truth(clean_V, ablated_V, own[clean], own[i], (clean_choices, choices), flipped[i]))
    return found


def precision(found: Sequence[Truth]) -> Precision:
    """What some ablations say of a model."""

    def quadratic_mean(values: Sequence[float]) -> float:
        return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())

    return Precision(
        error=quadratic_mean([float(_centred(each.error).abs().max()) for each in found]),
        spread=quadratic_mean([spread_of(each.error) for each in found]),
        clean=max(spread_of(each.own_clean - each.clean) for each in found),
        scale=max(float(each.ablated.abs().max()) for each in found),
        n_truths=len(found),
        flips=sum(each.flips for each in found),
        routes=any(each.choices[0] for each in found),
    )


Held = Callable[[int], Tensor]
"""The effect of an ablation, measured anew by itself, with the truth's choices of experts."""


def first_wrong(
    found: Sequence[Truth], effects: Sequence[Tensor | None], held: Held, typical: Precision, *, capped: bool
) -> tuple[float, int, str]:
    """Judge measured effects.

    Args:
        found: the truth of each.
        effects: as they were measured; None where that failed for a reason that jumps to other experts may have.
        held: measures one again with the truth's choices of experts.
        typical: of the model.
        capped: whether no tolerance is above the cap.

    Returns:
        The largest error in logits of those that passed, how many passed only when experts were chosen alike, and what
        is wrong with the first that has not passed; empty when all have.
    """
    largest, jumped = 0.0, 0
    for i, (truth, effect) in enumerate(zip(found, effects, strict=True)):
        verdict = None if effect is None else truth.judge(effect, typical, capped=capped)
        if (verdict is None or not verdict.passed) and typical.routes:
            verdict, jumped = truth.judge(held(i), typical, capped=capped), jumped + 1
        if verdict is None or not verdict.passed:
            return largest, jumped, str(verdict)
        largest = max(largest, verdict.off)
    return largest, jumped, ""
