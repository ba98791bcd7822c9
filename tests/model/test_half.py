"""In half precision: what is mistaken is refused, what is right is not, and a jump to another expert is told apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymi.model import engine
from raymi.model.cone import Cone
from raymi.model.engine import Engine, WrongNumbers, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.model.proof import CAP, Truth, precision, truths
from tests.families import PROMPT, build, prompt

AT = PROMPT - 1


def half(family: str, dtype: torch.dtype = torch.bfloat16) -> HookedModel:
    return HookedModel(build(family).to(dtype), family)


def planted(family: str, layer: int, share: float, dtype: torch.dtype = torch.bfloat16) -> HookedModel:
    """A layer that sums over the past, as a recurrent one whose state no cache shows."""

    def mix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0] + share * args[0].cumsum(1), *args[1:]), kwargs

    model = build(family).to(dtype)
    model.get_submodule(f"model.layers.{layer}").register_forward_pre_hook(mix, with_kwargs=True)
    return HookedModel(model, family)


@pytest.mark.parametrize(
    ("family", "layer", "share"),
    [("gpt_oss", 1, 0.1), ("gpt_oss", 3, 0.02), ("mixtral", 3, 0.1), ("mixtral", 1, 0.02), ("qwen3_moe", 2, 0.02)],
)
def test_a_planted_state_is_found_among_experts(family: str, layer: int, share: float):
    found = measure_capability(planted(family, layer, share), PROMPT)
    assert found.way != "cone"
    assert found.why.startswith("cone: ")


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "deepseek_v3", "jamba"])
def test_experts_leave_the_fast_way(family: str):
    found = measure_capability(half(family), PROMPT)
    assert found.way == ("layers" if family == "jamba" else "cone")
    assert found.routes
    assert found.precision is not None
    assert found.tolerance < 1.1 * CAP * found.precision.scale


def test_flips_are_counted_and_are_no_mistake():
    """A router of whose scores three are as good as equal: whoever rounds otherwise chooses two others."""
    model = half("mixtral")
    for layer in range(model.n_layers):
        weight = model.model.get_submodule(f"model.layers.{layer}.mlp.gate").get_parameter("weight")
        with torch.no_grad():
            weight[1:3] = weight[0]
            weight[2, ::2] *= 1 + 2**-7
    found = measure_capability(model, PROMPT)
    assert found.precision is not None
    assert found.precision.flips > 10
    assert found.way == "cone"
    assert found.jumped > 0
    assert found.precision.error < CAP * found.precision.scale, "the family's own error is measured without them"
    # And sweeps whose clean row jumps are no reason for full forwards.
    cells = [Cell(0, (Mask(layer, (head,), ((AT, 0),)),)) for layer in range(model.n_layers) for head in range(4)]
    measuring = Engine(model, found, "cone")
    assert {batch.way for batch in measuring.ablations(prompt(), cells)} == {"cone"}
    assert not measuring.gave_up


def effects(model: HookedModel, cells: list[Cell], ids_PT: Tensor) -> list[Tensor]:
    cone, found = Cone(model, ids_PT, 0), dict[int, Tensor]()
    for group in cone.groups(cells):
        for batch in cone.measure(cells, group):
            found.update(zip(batch.cells, batch.ablated_AV - batch.clean_PV[batch.prompt_A], strict=True))
    return [found[i] for i in range(len(cells))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_a_wrong_head_is_refused_and_a_right_one_is_not(family: str, dtype: torch.dtype):
    model, ids_PT = half(family, dtype), prompt()
    edges = tuple((AT, key) for key in range(PROMPT))
    cells = [Cell(0, (Mask(layer, (head,), edges),)) for layer in range(model.n_layers) for head in range(4)]
    found, measured = truths(model, ids_PT, cells, rows=8), effects(model, cells, ids_PT)
    typical = precision(found)
    wrong = refused = 0
    for i, truth in enumerate(found):
        assert truth.judge(measured[i], typical).passed
        for other in range(i // 4 * 4, i // 4 * 4 + 4):
            apart = found[other].effect - truth.effect
            if float((apart - apart.mean()).square().mean().sqrt()) > 3 * max(typical.spread, _own(truth)):
                wrong += 1
                refused += not truth.judge(measured[other], typical).passed
    assert wrong > 10
    assert refused >= 0.95 * wrong


def _own(truth: Truth) -> float:
    error = truth.error - truth.error.mean()
    return float(error.square().mean().sqrt())


def test_a_shift_of_all_logits_is_held_to_the_cap():
    model, cells = half("gpt2"), [Cell(0, (Mask(1, None, ((AT, 0),)),))]
    [truth] = truths(model, prompt(), cells)
    typical = precision([truth])
    right = effects(model, cells, prompt())[0]
    assert truth.judge(right + 0.5 * CAP * typical.scale, typical).passed
    verdict = truth.judge(right + 3 * CAP * typical.scale, typical)
    assert not verdict.passed
    assert "all logits shifted by" in str(verdict)


def test_no_tolerance_is_above_the_cap():
    generator = torch.Generator().manual_seed(0)
    truth = Truth(*(torch.randn(50, generator=generator) * scale for scale in (4, 4, 5, 4)))
    typical = precision([truth])
    verdict = truth.judge(truth.effect + 0.1 * torch.randn(50), typical)
    assert max(verdict.tolerance, verdict.spread_tolerance) == pytest.approx(CAP * typical.scale, rel=0.5)
    assert not truth.judge(truth.own - truth.own_clean, typical).passed, "as wrong as the family's own is no proof"
    assert truth.judge(truth.own - truth.own_clean, typical, capped=False).passed


def test_of_several_tokens_each_is_judged():
    generator = torch.Generator().manual_seed(1)
    clean, ablated, noise, other, ours = (torch.randn(9, 50, generator=generator) for _ in range(5))
    truth = Truth(9 * clean, 9 * ablated, 9 * clean + 0.05 * noise, 9 * ablated + 0.05 * other)
    typical = precision([truth])
    effect = truth.effect + 0.07 * ours
    assert truth.judge(effect, typical).passed
    effect[6] += 0.3 * ours[6]
    assert not truth.judge(effect, typical).passed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_has_a_cap_in_float32_too(
    family: str, monkeypatch: pytest.MonkeyPatch, hooked: Callable[[str], HookedModel]
):
    quiet = measure_capability(hooked(family), PROMPT)
    monkeypatch.setattr(engine, "_rounding", lambda *_: 10.0)
    loud = measure_capability(hooked(family), PROMPT)
    assert quiet.tolerance < 1e-3
    assert loud.tolerance < 0.5
    assert loud.precision is None


@pytest.mark.parametrize("why", ["memory", "accelerate", "their code"])
def test_without_a_truth_there_is_no_proof(why: str, monkeypatch: pytest.MonkeyPatch):
    model = half("gpt2")
    if why == "their code":

        def choke(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].dtype == torch.float32:
                raise LookupError("a kernel for half precision only")

        model.blocks[1].module.register_forward_pre_hook(choke)
    elif why == "memory":

        def fail(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("not that much")

        monkeypatch.setattr(engine, "truths", fail)
    else:
        model.model.get_input_embeddings().__dict__["_hf_hook"] = object()
    found = measure_capability(model, PROMPT)
    assert (found.way, found.precision) == ("full", None)
    assert "no proof in half precision: " in found.why


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_change_each_other_are_found_below_the_noise(family: str, dtype: torch.dtype, share: float):
    """By less than rounding does, so that half precision alone does not show it."""

    def mix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0] + share * args[0].mean(0, keepdim=True), *args[1:]), kwargs

    model = build(family).to(dtype)
    model.get_submodule("model.layers.2").register_forward_pre_hook(mix, with_kwargs=True)
    with pytest.raises(WrongNumbers, match="the rows of a batch change each other's logits"):
        measure_capability(HookedModel(model, family), PROMPT)
