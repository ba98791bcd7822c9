"""A measured ablation beside a second opinion: what a record of table `verifications` says of the two.

In float32 the second opinion is a full forward of the family's own eager attention. In half precision two right
forwards differ by too much for that to prove anything, so the measured effect is held to the effect in float32 of the
same weights, by the error that the family's own forward makes of this very ablation (`raymi.model.proof`).
"""

from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from raymi.model.engine import Engine
from raymi.model.full import Batch, Way
from raymi.model.hooked import Cell
from raymi.model.proof import Truth, Verdict, truths


def is_beside_truth(engine: Engine) -> bool:
    """Whether effects are held to float32's: in half precision, where the model could be run so."""
    return engine.capability.precision is not None


def beside_truth(engine: Engine, ids_1T: Tensor, cell: Cell, batch: Batch, row: int) -> dict[str, Any]:
    """Of an ablation in half precision.

    Args:
        engine: the model, and the way it is measured.
        ids_1T: its prompt.
        cell: the ablation, of prompt 0.
        batch: where it was measured.
        row: the ablation's row of it.
    """
    [truth] = truths(engine.model, ids_1T.to(engine.model.device), [cell], rows=2)
    effect_V = batch.ablated_AV[row] - batch.clean_PV[batch.prompt_A[row]]
    verdict, jumped = judge(engine, truth, effect_V, batch.way), False
    if not verdict.passed and truth.choices[0]:
        # A router's near-tie may have jumped: if that is all, the same choices give the same effect.
        verdict = judge(engine, truth, engine.held(ids_1T.to(engine.model.device), cell, truth, batch.way), batch.way)
        jumped = True
    return of_verdict(verdict, truth, batch.way) | {"flips": truth.flips, "jumped": jumped}


def judge(engine: Engine, truth: Truth, effect: Tensor, way: Way) -> Verdict:
    """A full forward is the slowest way there is: what is off as much as the family's own is all that can be had."""
    return truth.judge(effect, engine.capability.precision, capped=way != "full")


def of_verdict(verdict: Verdict, truth: Truth, way: str) -> dict[str, Any]:
    """Fields of a record."""
    shifted = verdict.off <= verdict.tolerance and not verdict.shift <= verdict.shift_tolerance
    return {
        "engine": way,
        "max_logit_diff": verdict.shift if shifted else verdict.off,
        "effect": float(truth.effect.abs().max()),
        "tolerance": verdict.shift_tolerance if shifted else verdict.tolerance,
        "spread": verdict.spread,
        "spread_tolerance": verdict.spread_tolerance,
        "passed": verdict.passed,
        "measured_at": datetime.now(UTC),
    }


def beside_full(engine: Engine, measured: Tensor, full: Tensor, clean: Tensor, way: str) -> dict[str, Any]:
    """Of logits beside those of a full forward of the family's own attention."""
    difference, tolerance = float((measured - full).abs().max()), engine.capability.tolerance
    return {
        "engine": way,
        "max_logit_diff": difference,
        "effect": float((full - clean).abs().max()),
        "tolerance": tolerance,
        "passed": difference <= tolerance,
        "measured_at": datetime.now(UTC),
    }
