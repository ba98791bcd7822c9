"""Choices of experts, watched and held."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymi.model.cone import Cone
from raymi.model.engine import measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask, scale
from raymi.model.routing import flips, routing
from tests.conformance import configs as types
from tests.families import PROMPT, prompt


def nudged(model: HookedModel, layer: int, by: float) -> Any:
    """Changes a layer's input by so much: enough, and its experts are others."""
    generator = torch.Generator().manual_seed(1)

    def nudge(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0] + by * torch.randn(args[0].shape, generator=generator), *args[1:])

    return model.blocks[layer].module.register_forward_pre_hook(nudge)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_what_is_chosen_is_seen_and_can_be_held(family: str, hooked: Any):
    model: HookedModel = hooked(family)
    ids_PT = prompt(rows=2)
    with routing(model) as watched:
        clean_PV = model.run(ids_PT)
    choices = [watched.of_row(row) for row in range(2)]
    assert choices[0]
    assert all(chosen.shape[0] == PROMPT for chosen in choices[0].values())
    assert flips(choices[0], choices[0]) == 0
    assert flips(choices[0], choices[1]) > 0
    with routing(model, choices) as again:
        assert torch.equal(model.run(ids_PT), clean_PV)
    handle = nudged(model, 1, 0.5)
    try:
        with routing(model) as free:
            model.run(ids_PT)
        assert flips(choices[0], free.of_row(0)) > 0
        with routing(model, [choices[0]]) as again:
            model.run(ids_PT)
    finally:
        handle.remove()
    assert flips(choices[0], again.of_row(0)) == 0
    assert flips(choices[1], again.of_row(1)) > 0, "rows without are free"
    torch.testing.assert_close(model.run(ids_PT), clean_PV, atol=0, rtol=0)


def test_one_expert_at_a_time_is_seen_too():
    """As Phi-MoE takes them, by `max`."""
    raw = types.build("phimoe")
    for parameter in raw.parameters():
        parameter.data = parameter.data.half()
    model = HookedModel(raw, "phimoe")
    with routing(model) as watched:
        model.run(prompt())
    assert {layer for layer, _ in watched.of_row(0)} == set(range(model.n_layers))
    found = measure_capability(model, PROMPT)
    assert found.precision is not None
    assert found.way == "cone"
    assert found.precision.error < 0.03 * found.precision.scale


def test_dense_models_choose_nothing(hooked: Any):
    with routing(hooked("llama")) as watched:
        hooked("llama").run(prompt())
    assert not watched.of_row(0)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_last_positions_of_choices_hold_a_sweep(family: str, prefix: bool, hooked: Any):
    """In float32 nothing flips, so that holding a sweep to a full forward's choices changes nothing; another's do."""
    model: HookedModel = hooked(family)
    at = PROMPT - 3
    cell = Cell(0, (Mask(1, None, ((at, 0), (at, at))), scale(2, "hook_resid_pre", (at,), -1.0)))
    with routing(model) as watched:
        full_BV = model.forward(prompt()[[0, 0]], [(), cell.interventions]).logits_BV

    def held(clean: int, ablated: int) -> Tensor:
        with routing(model, [watched.of_row(clean), watched.of_row(ablated)]):
            [batch] = Cone(model, prompt(), 0, prefix=prefix).measure([cell], [0])
        return batch.ablated_AV[0]

    torch.testing.assert_close(held(0, 1), full_BV[1], atol=1e-4, rtol=0)
    assert flips(watched.of_row(0), watched.of_row(1)) > 0
    assert float((held(0, 0) - full_BV[1]).abs().max()) > 1e-3
