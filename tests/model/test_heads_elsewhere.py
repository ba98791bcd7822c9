"""The heads' outputs are found a second time where they stand as they are, and not behind a gate, a norm or a sink."""

from typing import Any

import pytest
import torch
from torch import nn

from raymi.model.attention import Tap
from raymi.model.elsewhere import elsewhere
from raymi.model.heads_elsewhere import z_module
from raymi.model.hooked import HookedModel
from raymi.model.interventions import add
from tests.families import build, prompt

MODULES = {
    **dict.fromkeys(("llama", "gemma2", "gemma3_text", "mixtral", "olmo2", "phi3"), "model.layers.{}.self_attn.o_proj"),
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "phi": "model.layers.{}.self_attn.dense",
    "gpt_bigcode": "transformer.h.{}.attn.c_proj",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODULES)
def test_found_by_what_a_head_makes_of_single_keys(family: str, dtype: torch.dtype):
    model = HookedModel(build(family).to(dtype), family)  # pyright: ignore[reportArgumentType]
    for layer in range(4):
        assert z_module(model, prompt(), layer) is model.model.get_submodule(MODULES[family].format(layer))


class Gated(nn.Module):
    """An output projection behind something else."""

    def __init__(self, inner: nn.Module, between: Any) -> None:
        super().__init__()
        self.inner, self.between = inner, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.between(x))


def per_head(x: torch.Tensor) -> torch.Tensor:
    z = x.unflatten(-1, (4, -1))
    return (z / z.square().mean(-1, keepdim=True).sqrt()).flatten(-2)


BETWEEN = {
    "a norm": lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
    "a norm of each head": per_head,
    "a gate by position": lambda x: x * torch.linspace(0.5, 1, x.shape[-2])[:, None],
    "heads in another order": lambda x: x.unflatten(-1, (4, -1)).roll(1, -2).flatten(-2),
    "heads interleaved": lambda x: x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_is_not_the_heads_outputs_is_not_taken_for_them(what: str):
    plain = build("llama")
    attention = plain.get_submodule("model.layers.1.self_attn")
    attention.o_proj = Gated(attention.o_proj, BETWEEN[what])  # pyright: ignore[reportArgumentType]
    model = HookedModel(plain, "llama")
    assert z_module(model, prompt(), 1) is None
    assert z_module(model, prompt(), 2) is not None


def test_sinks_leave_no_second_place():
    assert z_module(HookedModel(build("gpt_oss"), "gpt_oss"), prompt(), 1) is None
    assert z_module(HookedModel(build("llama"), "llama"), prompt(3), 1) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_edit_there_does_not_share_the_first_place(family: str, monkeypatch: pytest.MonkeyPatch):
    model, ids_1T = HookedModel(build(family), family), prompt()
    edit = add(1, "attn.hook_z", (13,), torch.tensor(3.0), heads=(2,))

    def by_both() -> tuple[torch.Tensor, torch.Tensor]:
        first = model.forward(ids_1T, [(edit,)], own_attention=True).logits_BV
        with elsewhere(model, ids_1T, [1], by_head=True):
            return first, model.forward(ids_1T, [(edit,)], own_attention=True).logits_BV

    first, second = by_both()
    assert float((first - model.forward(ids_1T, [()], own_attention=True).logits_BV).abs().max()) > 0.1
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert not any(block.z_by_module for block in model.blocks)

    passes = Tap.pass_z

    def other_heads(self: Tap, layer: int, z_BQHD: torch.Tensor) -> torch.Tensor:
        return passes(self, layer, z_BQHD.roll(1, 2)).roll(-1, 2)

    monkeypatch.setattr(Tap, "pass_z", other_heads)
    first, wrong = by_both()
    torch.testing.assert_close(wrong, second, rtol=0, atol=1e-5)
    assert float((first - wrong).abs().max()) > 0.1
