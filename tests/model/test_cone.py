"""The causal cone equals full forwards of an untouched model, whatever is changed, wherever, and however many at once.

float32 to the tolerance that follows from measured noise (`Capability.tolerance`) and never beyond 5e-4, float64 to
1e-10.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given

from raymi.model import cone
from raymi.model.engine import Capability, Engine, OutOfMemory, measure_capability
from raymi.model.hooked import Cell, HookedModel, NotFinite, NotFired
from raymi.model.interventions import Edit, Mask, add, mean, scale, zero
from raymi.model.interventions import replace as patch
from raymi.model.loading import Loaded
from raymi.model.sites import NoSuchPlace
from tests import families, oracles
from tests.families import CONFIGS, ODD, PROMPT, WINDOW, Build, build, prompt
from tests.model import cells as drawn
from tests.model.cells import Request, Space, Widened
from tests.model.measuring import Measured

pytestmark = pytest.mark.oracle

WORST, EXACT, EFFECT = 5e-4, 1e-10, 1e-3

_OWN, _STATE = "computes its attention itself", "Cannot get conv state"
BELOW_ONLY = {
    **dict.fromkeys(("codegen", "falcon", "gpt_neo", "gptj", "mpt"), _OWN),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2"), _STATE),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid", "qwen3_next"), _STATE),
    "minimax": "uses cache of its own",
    "recurrent_gemma": "a clean row of a batch differs from the clean run",
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
        theirs_V, *counts = drawn.by_plain_hooks(plain, family, request.ids_PT, cell, layers)
        off = float((ours.ablated_AV[i] - theirs_V).abs().max())
        assert off <= atol, f"{cell} is off by {off:.1e}"
        assert [int(of[i]) for of in (ours.fired_A, ours.empty_A, ours.closed_A)] == counts, cell
        effects.append(float((theirs_V - clean_PV[cell.prompt]).abs().max()))
    for p in {cell.prompt for cell in request.cells}:
        assert float((ours.clean_PV[p] - clean_PV[p]).abs().max()) <= atol
    return effects


def measure(engine: Engine, request: Request) -> Measured:
    found: dict[int, list[Any]] = {}
    for batch in engine.ablations(request.ids_PT, request.cells):
        assert 0 <= batch.clean_error <= engine.capability.tolerance
        clean_AV = batch.clean_PV[batch.prompt_A]
        counts = batch.fired_A, batch.empty_A, batch.closed_A
        for i, *row in zip(batch.cells, clean_AV, batch.ablated_AV, *counts, strict=True):
            assert i not in found, "measured twice"
            found[i] = row
    assert sorted(found) == list(range(len(request.cells)))
    columns = [torch.stack([found[i][column] for i in range(len(found))]) for column in range(5)]
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


# ---- every site and operation, with an effect ----------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_every_site_and_operation(family: str, hooked: Hooked, plain: Build, capability: Callable[[str], Capability]):
    """Together in one request of two prompts, at the last position and at one in the middle, each of them felt."""
    model, ids_PT, found = hooked(family), prompt(rows=2), capability(family)
    changes: list[tuple[Mask | Edit, ...]] = [(Mask(layer, (1,), ((PROMPT - 1, PROMPT - 2),)),) for layer in (0, 3)]
    changes.append(tuple(Mask(layer, None, ((8, 7), (8, 6), (PROMPT - 1, 12))) for layer in range(4)))
    for at, layer in ((PROMPT - 1, 2), (10, 0)):
        for site in drawn.sites(family):
            name = f"blocks.{layer}.{site}"
            of_others = model.mean(name, prompt(rows=3, seed=8))
            of_another = model.forward(prompt(seed=9), capture=[name]).cache[name][0, at]
            heads = (1, 3) if site == "attn.hook_z" else None
            some = of_others[[1, 3]] if heads else of_others
            changes += [
                (zero(layer, site, (at,), heads),),
                (mean(layer, site, (at - 1, at), some, heads),),
                (patch(layer, site, (at,), of_another[None]),),
                (add(layer, site, (at,), some, heads),),
            ]
            if not (family in drawn.ITSELF and site.endswith(".hook_out")):  # a norm undoes it
                changes.append((scale(layer, site, (at,), 2.5, heads),))
    request = Request(ids_PT, [Cell(i % 2, change) for i, change in enumerate(changes)], 0)
    ours = measure(Engine(model, found, found.way), request)
    effects = compare(ours, request, plain(family), family, model.attention_layers, tolerance(found))
    assert min(effects) > 4 * tolerance(found)
    assert sum(effect > EFFECT for effect in effects) >= 0.9 * len(effects)


# ---- what the staircase does, told by a few cells -------------------------------------------------------------------

LAST = PROMPT - 1
STEPS = [
    Cell(p, (Mask(layer, heads, ((query, query - 1), (query, 0))),))
    for p in (0, 2, 1)
    for layer in (3, 0, 2)
    for heads in ((0,), None)
    for query in (LAST, 6)
]


@pytest.fixture
def engine(capability: Callable[[str], Capability]) -> Callable[..., Engine]:
    """A fresh model each time: these tests change it."""

    def make(family: str = "llama", **changed: Any) -> Engine:
        return Engine(HookedModel(build(family), family), replace(capability(family), **changed), expected_way(family))  # type: ignore[arg-type]

    return make


def same(ours: Measured, others: Measured) -> None:
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mpt"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_slices_of_logits_give_the_same(
    prompts: int, family: str, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    request = Request(prompt(rows=prompts), [Cell(of.prompt % prompts, of.interventions) for of in STEPS], 0)
    at_once = measure(engine(family), request)
    monkeypatch.setattr(cone, "UNEMBEDDED", {"cpu": 3 * families.VOCABULARY + 1})
    batches = list(engine(family).ablations(request.ids_PT, request.cells))
    assert {len(batch.cells) for batch in batches} <= {1, 2, 3}
    assert all(len(batch.ablated_AV) == len(batch.cells) == len(batch.fired_A) for batch in batches)
    same(measure(engine(family), request), at_once)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_memory_that_runs_out_between_two_slices_loses_nothing(
    nth: int, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """What was handed out before is not measured again, what was not is."""
    request, its = Request(prompt(), [Cell(0, of.interventions) for of in STEPS], 0), engine()
    plenty = measure(its, request)
    monkeypatch.setattr(cone, "UNEMBEDDED", {"cpu": 4 * families.VOCABULARY})
    unembed, calls = cone.Cone._unembed, list[int]()

    def scarce(self: cone.Cone, hidden_AD: Any, returned: Any) -> Any:
        calls.append(len(hidden_AD))
        if len(calls) == nth:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unembed(self, hidden_AD, returned)

    monkeypatch.setattr(cone.Cone, "_unembed", scarce)
    same(measure(its, request), plenty)
    assert len(calls) > nth
    assert min(its.limits.values()) < max(2, len(STEPS))


@pytest.mark.parametrize("way", ["cone", "layers"])
def test_prompts_that_may_not_share_a_sweep_have_their_own(way: Any, engine: Callable[..., Engine]):
    request = Request(prompt(rows=3), STEPS, 0)
    together, alone = engine(), engine(together=False)
    together.way = alone.way = way
    ran: list[int] = []
    run = alone.model.run
    alone.model.run = lambda ids, *args, **kwargs: ran.append(len(ids)) or run(ids, *args, **kwargs)  # type: ignore[method-assign]
    same(measure(alone, request), measure(together, request))
    assert set(ran) == {1}


@pytest.mark.parametrize("way", ["cone", "layers"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_clean_runs_of_many_prompts_are_cut_up_too(limit: int, way: Any, engine: Callable[..., Engine]):
    """By what is thought to fit (five prompts at a time), and where that is too much, by what does."""
    its, ids_PT = engine(), prompt(rows=7)
    its.way = way
    cells = [Cell((i * 5) % 7, STEPS[i % len(STEPS)].interventions) for i in range(14)]
    request, run, cleaned = Request(ids_PT, cells, 0), its.model.run, list[int]()
    plenty = measure(its, request)
    its.cones.clear()

    def scarce(ids: torch.Tensor, n_rows: int | None = None, **given: Any) -> torch.Tensor:
        if n_rows is None and ids.shape[1] == PROMPT:
            cleaned.append(len(ids))
            if len(ids) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return run(ids, n_rows, **given)

    its.model.run = scarce  # type: ignore[method-assign]
    its.limits[way, PROMPT, PROMPT] = 5
    same(measure(its, request), plenty)
    assert max(cleaned) == min(5, 7 // 2 + 1)
    assert sum(n for n in cleaned if n <= limit) == 7


def test_clean_runs_serve_all_that_is_measured_of_their_prompts(engine: Callable[..., Engine], monkeypatch: Any):
    """As units of several experiments come: prompt by prompt, and then once more."""
    its, cleaned = engine(), list[int]()
    run = its.model.run

    def counted(ids: torch.Tensor, n_rows: int | None = None, **given: Any) -> torch.Tensor:
        cleaned.extend([len(ids)] if n_rows is None and ids.shape[1] == PROMPT else [])
        return run(ids, n_rows, **given)

    its.model.run = counted  # type: ignore[method-assign]
    prompts_3T = prompt(rows=3)
    cells = [Cell(0, of.interventions) for of in STEPS]
    for _ in range(2):
        for ids_T in prompts_3T:
            measure(its, Request(ids_T[None], cells, 0))
    assert len(cleaned) == 3
    # The least recently used goes when there is room for two beside the next.
    monkeypatch.setattr("raymi.model.engine.KEPT_BYTES", 2 * its.cones[0].bytes)
    for row in (0, 2, 1, 2):
        measure(its, Request(prompts_3T[row][None], cells, 0))
    assert len(cleaned) == 3
    measure(its, Request(prompt(rows=4)[3:], cells, 0))
    assert [int(cone.ids_PT[0, 0]) for cone in its.cones[:2]] == [int(prompts_3T[row, 0]) for row in (1, 2)]
    # A short one is of all positions, and so serves a query that comes before those that it was made for.
    measure(its, Request(prompts_3T[1:2], [Cell(0, (Mask(0, None, ((0, 0),)),))], 0))
    assert len(cleaned) == 4
    # One of several prompts serves each by itself, in any order.
    measure(its, Request(prompt(rows=7)[4:], STEPS, 0))
    assert len(cleaned) == 5
    for rows in ([6], [5, 4]):
        request = Request(
            prompt(rows=7)[rows], [Cell(i % len(rows), of.interventions) for i, of in enumerate(STEPS)], 0
        )
        ours = measure(its, request)
        assert len(cleaned) == 5
        same(ours, measure(Engine(its.model, its.capability, "full"), request))
        del cleaned[5:]


def test_a_long_clean_run_keeps_what_is_asked_for(engine: Callable[..., Engine], monkeypatch: Any):
    its = engine()
    monkeypatch.setattr("raymi.model.engine.KEPT_BYTES", 0)
    late, early = (Request(prompt(), [Cell(0, (Mask(2, None, ((query, 0),)),))], 0) for query in (LAST, 6))
    for request, first in ((late, LAST), (early, 6), (late, 6)):
        same(measure(its, request), measure(Engine(its.model, its.capability, "full"), request))
        assert its.cones[-1].first == first


def test_what_a_failed_clean_run_made_is_gone_before_the_next(engine: Callable[..., Engine]):
    """The memory that ran out is not held while it is tried again."""
    its, made = engine(), list[weakref.ref[Any]]()
    measure(its, Request(prompt(seed=5), [Cell(0, STEPS[0].interventions)], 0))
    run, alive = its.model.run, list[int]()

    def scarce(ids: torch.Tensor, n_rows: int | None = None, **given: Any) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        if not made:
            tensor = torch.zeros(3)
            made.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(ids, n_rows, **given)

    its.model.run = scarce  # type: ignore[method-assign]
    measure(its, Request(prompt(), [Cell(0, STEPS[0].interventions)], 0))
    assert alive[:2] == [0, 0]
    assert len(its.cones) == 1


# ---- what rows start from and are compared with ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("prompts", [1, 4])
def test_in_half_precision_nothing_done_is_no_effect(prompts: int, family: str):
    """Rows start from clean rows of their own batch: other shapes of a batch round, and route near-ties, otherwise."""
    model = HookedModel(build(family).to(torch.bfloat16), family)
    found = measure_capability(model, PROMPT)
    engine = Engine(model, found, "cone")
    for seed in range(5):
        nothing = [
            Cell(p, (scale(layer, "hook_resid_pre", (LAST,), 1.0),)) for p in range(prompts) for layer in (1, 0, 3, 2)
        ]
        for batch in engine.ablations(prompt(rows=prompts, seed=seed), nothing):
            assert batch.way == "cone"
            assert torch.equal(batch.ablated_AV, batch.clean_PV[batch.prompt_A])


def test_few_ablations_of_many_prompts_have_one_clean_row(engine: Callable[..., Engine]):
    """In float32, where that is proof enough; but one each where they are many, or few prompts."""
    its, rows = engine(), list[int]()
    run = its.model.run
    its.model.run = lambda ids, n_rows=None, **given: rows.append(n_rows or 0) or run(ids, n_rows, **given)  # type: ignore[method-assign]
    cut = (Mask(2, None, ((LAST, 0),)),)
    for each, expected in ((1, 4), (4, 15)):
        list(its.ablations(prompt(rows=3), [Cell(p, cut) for p in range(3) for _ in range(each)]))
        assert max(rows) == expected
        rows.clear()


def test_a_clean_run_that_does_not_fit_alone(engine: Callable[..., Engine]):
    its = engine()

    def none_left(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    its.model.run = none_left  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match=f"llama: one ablation of a prompt of {PROMPT} tokens"):
        list(its.ablations(prompt(rows=3), STEPS))


def test_counts_are_those_of_each_row(engine: Callable[..., Engine]):
    every_key = tuple((LAST, key) for key in range(PROMPT))
    cells = [
        Cell(0, (Mask(3, (2,), ((LAST, 0),)),)),
        Cell(0, (Mask(0, None, every_key), Mask(2, (1, 2), every_key))),
        Cell(0, (Mask(1, (0,), ((LAST, 3), (LAST, 4))), Mask(1, None, ((LAST, 4),)), zero(2, "hook_mlp_out", (LAST,)))),
        Cell(0, (scale(1, "attn.hook_z", (LAST,), 2.0, (0, 3)),)),
    ]
    ours = measure(engine(), Request(prompt(), cells, 0))
    assert ours.fired_A.tolist() == [1, 4 * PROMPT + 2 * PROMPT, 1 + 4 + 1, 2]
    assert ours.empty_A.tolist() == [0, 4 + 2, 0, 0]


# ---- what must not become a number ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_a_model_that_changed_since_its_clean_run_is_found_out(family: str, engine: Callable[..., Engine]):
    """In a layer that the sweep goes through; whoever changes weights clears the clean runs."""
    its, request = engine(family), Request(prompt(), [Cell(0, of.interventions) for of in STEPS], 0)
    before = measure(its, request)
    with torch.no_grad():
        drawn.module(its.model.model, family, 3, "attn.hook_z").get_parameter("weight")[0].zero_()
    after = measure(its, request)
    assert (after.ablated_AV - before.ablated_AV).abs().max() > EFFECT
    assert all(f"NotClean: {family}: a clean row of a batch differs from the clean run by" in e for e in its.gave_up)
    assert its.gave_up
    its.cones.clear()
    same(after, measure(its, request))


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the family's code does not bear it")


@pytest.mark.parametrize("why", ["not clean", "fails"])
@pytest.mark.parametrize("way", ["cone", "layers"])
def test_what_the_cone_cannot_serve_takes_full_forwards_and_says_so(
    way: Any, why: str, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    its, request = engine(), Request(prompt(rows=3), STEPS, 0)
    its.way = way
    plenty = measure(its, request)
    if why == "fails":
        monkeypatch.setattr(cone.Cone, "_unembed", fails)
    else:
        its.cones[-1].clean_PV += 1
    batches = list(its.ablations(request.ids_PT, request.cells))
    assert {batch.way for batch in batches} == {"full"}
    assert its.gave_up
    said = "a clean row of a batch differs" if why == "not clean" else "does not bear it"
    assert all(said in each for each in its.gave_up)
    same(measure(its, request), plenty)
    assert its.way == way


def test_a_mistake_of_raymis_or_of_the_caller_is_not_mended_by_a_full_forward(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    its = engine()
    with pytest.raises(NoSuchPlace, match="head 9"):
        list(its.ablations(prompt(), [Cell(0, (Mask(1, (9,), ((LAST, 0),)),))]))
    monkeypatch.delattr(cone, "UNEMBEDDED")
    with pytest.raises(NameError, match="UNEMBEDDED"):
        list(its.ablations(prompt(), [Cell(0, STEPS[0].interventions)]))
    assert not its.gave_up


def test_a_clean_row_that_is_not_a_number_is_an_error(engine: Callable[..., Engine]):
    its, ids_PT = engine(), prompt()
    list(its.ablations(ids_PT, STEPS[:1]))
    with torch.no_grad():
        its.model.model.get_submodule("model.layers.3.mlp.down_proj").get_parameter("weight")[0, 0] = torch.nan
    with pytest.raises(NotFinite):
        list(its.ablations(ids_PT, STEPS[:1]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_row_is_an_error(bad: float, engine: Callable[..., Engine]):
    its = engine()
    cells = [*STEPS[:2], Cell(0, (add(1, "hook_resid_post", (LAST,), torch.full((32,), bad)),))]
    with pytest.raises(NotFinite, match="llama: NaN or infinity"):
        list(its.ablations(prompt(rows=3), cells))
    assert list(its.ablations(prompt(rows=3), cells[:2])), "and leaves no trace"


def test_an_intervention_that_does_not_fire_is_an_error(engine: Callable[..., Engine]):
    """A layer that is left out while it should be cut: the count in the row says so."""
    its = engine()
    its.model.blocks[2].module.forward = lambda hidden_states, **_: hidden_states  # type: ignore[method-assign]
    with pytest.raises(NotFired, match="should have fired 2 times, and fired 0 times"):
        list(its.ablations(prompt(), [Cell(0, (Mask(2, (0,), ((LAST, 0), (LAST, 1))),))]))


def test_a_sweep_leaves_no_trace(engine: Callable[..., Engine]):
    its, ids_PT = engine(), prompt(rows=3)
    layer = its.model.blocks[0].module
    own = layer.__dict__["forward"] = layer.forward  # as accelerate does it
    before = its.model.forward(ids_PT).logits_BV
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in its.model.model.modules()]
    list(its.ablations(ids_PT, STEPS))
    with pytest.raises(NotFinite):
        list(its.ablations(ids_PT, [Cell(0, (add(2, "hook_resid_pre", (LAST,), torch.full((32,), torch.inf)),))]))
    assert torch.equal(its.model.forward(ids_PT).logits_BV, before)
    assert layer.__dict__["forward"] is own
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in its.model.model.modules()] == hooks
    assert its.model.tap.prefix is its.model.tap.keep is None


# ---- real weights ----------------------------------------------------------------------------------------------------

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"


@pytest.mark.parametrize("n_tokens", [5, 60])
def test_smollm2(n_tokens: int, demo: Callable[[str], Loaded], plain_demo: Build):
    """Random cells of all layers, heads and positions, windows of ten layers too, against edited masks."""
    its, plain = demo(SMOLLM2).engine, plain_demo(SMOLLM2)
    assert its.way == "cone"
    random, last = Random(n_tokens), n_tokens - 1
    ids_PT = torch.randint(100, its.model.vocab_size, (2, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    cut: list[tuple[int, oracles.Knockout]] = []
    for i in range(10):
        begin, width = random.randrange(its.model.n_layers), random.choice([1, 1, 10])
        layers = tuple(range(begin, min(begin + width, its.model.n_layers)))
        heads = random.choice([None, tuple(random.sample(range(its.model.n_heads), 2))])
        queries = [last, *random.sample(range(1, last), random.randrange(2))]
        edges = {(q, random.choice([0, random.randrange(q)])) for q in queries}
        cut.append((i % 2, oracles.Knockout(layers, heads, tuple(sorted(edges)))))
    cells = [Cell(p, tuple(Mask(layer, k.heads, k.edges) for layer in k.layers)) for p, k in cut]
    ours = measure(its, Request(ids_PT, cells, 0))
    clean = [oracles.last_logits(plain, ids_T) for ids_T in ids_PT]
    effects: list[float] = []
    for row_V, (p, knockout) in zip(ours.ablated_AV, cut, strict=True):
        theirs_V = oracles.by_edited_mask(plain, ids_PT[p], knockout)
        assert float((row_V - theirs_V).abs().max()) <= WORST, knockout
        effects.append(float((theirs_V - clean[p]).abs().max()))
    assert sum(effect > 10 * WORST for effect in effects) >= 8, effects
