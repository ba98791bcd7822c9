"""The causal cone equals full forwards of an untouched model, whatever is changed, wherever, and however many at once.

float32 to 20 times the noise that the shape of a batch makes (and never beyond 5e-4), float64 to 1e-10.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given

from raymi.model.engine import Capability, Engine, measure_capability
from raymi.model.full import Full
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Edit, Mask, add, mean, scale, zero
from raymi.model.interventions import replace as patch
from tests import families, oracles
from tests.families import CONFIGS, ODD, PROMPT, WINDOW, Build, build, prompt
from tests.model import cells as drawn
from tests.model.cells import Request, Space, Widened
from tests.model.measuring import Measured, by_engine

pytestmark = pytest.mark.oracle

WORST, EXACT, EFFECT = 5e-4, 1e-10, 1e-3

_OWN, _STATE = "computes its attention itself", "Cannot get conv state"
BELOW_ONLY = {
    **dict.fromkeys(("codegen", "falcon", "gpt_neo", "gptj", "mpt"), _OWN),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2"), _STATE),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid", "qwen3_next"), _STATE),
    "minimax": "uses cache of its own",
    "recurrent_gemma": "the clean row of a batch differs from the clean run",
}
"""Families where only the layers below are left out, and a part of the reason."""
NOT_AT_ALL = {
    "bloom": _OWN,
    "gemma3n_text": "not one residual stream",
    "gemma4_text": "size of tensor",  # its upper layers read the keys of lower ones, which know of fewer rows
    "gpt_bigcode": "shape",  # gives its output the shape of the ids
}
"""Families that are measured by full forwards, and a part of the reason."""

WITH_ATTENTION = {
    **dict.fromkeys(("bamba", "granitemoehybrid", "jamba", "lfm2", "minimax", "nemotron_h"), (1, 4)),
    **dict.fromkeys(("olmo_hybrid", "qwen3_next"), (1, 4)),
    "recurrent_gemma": (2, 5),
}
"""The layers that have attention, where not all have."""

Hooked = Callable[[str], HookedModel]


def expected_way(family: str) -> str:
    return "full" if family in NOT_AT_ALL else "layers" if family in BELOW_ONLY else "cone"


@pytest.fixture(scope="module")
def capability(hooked: Hooked) -> Callable[[str], Capability]:
    return cache(lambda family: measure_capability(hooked(family), PROMPT))


@pytest.fixture(scope="module")
def wide() -> Callable[[str], tuple[HookedModel, Any, Capability]]:
    """raymi's model, an untouched one, and what was measured, in float64; made and used inside `Widened`."""

    def built(family: str) -> Any:
        model = build(family).double()
        model.set_experts_implementation("eager")  # torch's grouped matrix product knows no float64
        return model

    def make(family: str) -> tuple[HookedModel, Any, Capability]:
        model = HookedModel(built(family), family)
        return model, built(family), replace(measure_capability(model, PROMPT), tolerance=EXACT)

    return cache(make)


class AtATime(dict[Any, int]):
    """So many rows at a time, whatever is asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __contains__(self, _: object) -> bool:
        return True

    def __missing__(self, _: object) -> int:
        return self.rows


def space_of(model: HookedModel, family: str) -> Space:
    layers, sites, width = tuple(model.attention_layers), drawn.sites(family), 0
    if "attn.hook_z" in sites:
        z = drawn.module(model.model, family, layers[0], "attn.hook_z").get_parameter("weight")
        width = z.numel() // model.hidden_size // model.n_heads
    return Space(model.n_layers, model.n_heads, width, model.hidden_size, layers, sites)


def compare(
    ours: Measured, request: Request, plain: Any, family: str, layers: Sequence[int], atol: float
) -> list[float]:
    """Against plain hooks on an untouched model, one forward an ablation; returns the effects."""
    effects: list[float] = []
    clean_PV = torch.stack([oracles.last_logits(plain, ids_T) for ids_T in request.ids_PT])
    for i, cell in enumerate(request.cells):
        theirs_V, fired, empty = drawn.by_plain_hooks(plain, family, request.ids_PT, cell, layers)
        off = float((ours.ablated_AV[i] - theirs_V).abs().max())
        assert off <= atol, f"{cell} is off by {off:.1e}"
        assert (int(ours.fired_A[i]), int(ours.empty_A[i])) == (fired, empty), cell
        effects.append(float((theirs_V - clean_PV[cell.prompt]).abs().max()))
    for p in {cell.prompt for cell in request.cells}:
        assert float((ours.clean_PV[p] - clean_PV[p]).abs().max()) <= atol
    return effects


def measure(engine: Engine, request: Request) -> Measured:
    found: dict[int, list[Any]] = {}
    for batch in engine.ablations(request.ids_PT, request.cells):
        assert 0 <= batch.clean_error <= engine.capability.tolerance
        clean_AV = batch.clean_PV[batch.prompt_A]
        for i, *row in zip(batch.cells, clean_AV, batch.ablated_AV, batch.fired_A, batch.empty_A, strict=True):
            assert i not in found, "measured twice"
            found[i] = row
    assert sorted(found) == list(range(len(request.cells)))
    columns = [torch.stack([found[i][column] for i in range(len(found))]) for column in range(4)]
    clean_PV = torch.full((len(request.ids_PT), engine.model.vocab_size), torch.nan, dtype=columns[0].dtype)
    clean_PV[[cell.prompt for cell in request.cells]] = columns[0]
    return Measured(clean_PV, *columns[1:])


def tolerance(capability: Capability) -> float:
    return min(WORST, capability.tolerance)


# ---- which way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CONFIGS, *ODD])
def test_the_fastest_exact_way_is_found(family: str, hooked: Hooked, capability: Callable[[str], Capability]):
    found = capability(family)
    n_layers = hooked(family).n_layers
    assert hooked(family).attention_layers == [*WITH_ATTENTION.get(family, range(n_layers))]
    assert found.way == expected_way(family)
    assert {**BELOW_ONLY, **NOT_AT_ALL}.get(family, "") in found.why
    assert bool(found.why) == (found.way != "cone")
    assert found.together


# ---- every family, random interventions ----------------------------------------------------------------------------


def run_examples(examples: int, space: Space, lengths: Sequence[int], check: Callable[[Request], None]) -> None:
    @hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(drawn.requests(space, families.VOCABULARY, lengths))
    def example(request: Request) -> None:
        check(request)

    example()


@pytest.mark.parametrize("family", [*CONFIGS, *ODD])
def test_random_interventions(family: str, hooked: Hooked, plain: Build, capability: Callable[[str], Capability]):
    model, effects = hooked(family), list[float]()

    def check(request: Request) -> None:
        engine = Engine(model, capability(family), expected_way(family), AtATime(request.rows))  # type: ignore[arg-type]
        ours = measure(engine, request)
        effects.extend(
            compare(ours, request, plain(family), family, model.attention_layers, tolerance(capability(family)))
        )

    run_examples(8 if family in CONFIGS else 5, space_of(model, family), (2, WINDOW + 2, PROMPT), check)
    assert sum(effect > EFFECT for effect in effects) >= max(5, 0.4 * len(effects)), effects


@pytest.mark.parametrize("family", [*CONFIGS, *ODD])
def test_in_float64_only_rounding_is_left(family: str, wide: Any):
    with Widened():
        model, plain, capability = wide(family)
        effects = list[float]()

        def check(request: Request) -> None:
            engine = Engine(model, capability, expected_way(family), AtATime(request.rows))  # type: ignore[arg-type]
            ours = measure(engine, request)
            effects.extend(compare(ours, request, plain, family, model.attention_layers, EXACT))

        run_examples(6 if family in CONFIGS else 3, space_of(model, family), (WINDOW + 3, PROMPT), check)
    assert sum(effect > EFFECT for effect in effects) >= max(3, 0.4 * len(effects)), effects
