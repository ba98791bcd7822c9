"""What a forward refuses, notices and says; and that it leaves a model as it found it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM

from raymi.model import attention
from raymi.model.attention import UnsupportedAttention
from raymi.model.hooked import HookedModel, NotFinite, NotFired
from raymi.model.interventions import Mask, zero
from raymi.model.sites import NoSuchPlace
from tests.families import PROMPT, build, prompt

Hooked = Callable[[str], HookedModel]
LAST = PROMPT - 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_bad_number_is_an_error_that_names_the_layer(bad: float, layer: int):
    model = HookedModel(build("llama"), "broken-llama")
    model.model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight.data[3, 3] = bad
    with pytest.raises(NotFinite, match=rf"broken-llama: .*2 of 2 rows.*layer {layer} is the first"):
        model.forward(prompt(rows=2))


def test_a_bad_number_behind_the_last_layer_is_no_layers_fault():
    model = HookedModel(build("llama"), "broken-llama")
    model.model.get_submodule("lm_head").weight.data[5] = torch.nan
    with pytest.raises(NotFinite, match="every layer is finite, the logits are not"):
        model.forward(prompt())


def test_an_intervention_that_does_not_act_is_an_error():
    """Another attention function is put in the place of raymi's, behind its back."""
    model = HookedModel(build("llama"), "deaf-llama")
    model.model.set_attn_implementation("eager")
    with pytest.raises(NotFired, match=r"deaf-llama: .* row 1 should have fired 4 times, and fired 0"):
        model.forward(prompt().expand(2, -1), [(), (Mask(1, None, ((5, 2),)),)])


@pytest.mark.parametrize("few", [0, 1000])
def test_a_forgotten_edge_is_an_error(few: int, monkeypatch: pytest.MonkeyPatch):
    """What is expected is counted from the interventions, not from the tensors that carry them out."""
    model = HookedModel(build("llama"), "hasty-llama")
    whole = attention.cuts
    monkeypatch.setattr(attention, "FEW", few)
    masks = [(Mask(1, None, ((5, 2), (5, 2), (6, 0))), Mask(1, (0,), ((6, 0), (6, 1))))]
    assert model.forward(prompt(), masks).fired_B.tolist() == [9]  # 4 heads x 2 edges, and one that is new
    monkeypatch.setattr(attention, "cuts", lambda edges, n, device: whole(edges[:, edges[4] != 1], n, device))
    with pytest.raises(NotFired, match="row 0 should have fired 9 times, and fired 8 times"):
        model.forward(prompt(), masks)


def test_one_layer_that_does_not_act_is_an_error():
    model = HookedModel(build("gpt2"), "deaf-gpt2")
    attention = model.model.get_submodule("transformer.h.2.attn")
    attention.forward = lambda hidden, *_, **__: (hidden, None)  # pyright: ignore[reportAttributeAccessIssue]
    masks = tuple(Mask(layer, (0,), ((5, 2),)) for layer in range(4))
    with pytest.raises(NotFired, match="should have fired 4 times, and fired 3"):
        model.forward(prompt(), [masks])


@pytest.mark.parametrize(
    ("intervention", "why"),
    [
        (Mask(4, None, ((5, 2),)), "layer 4 of a model with layers 0 to 3"),
        (Mask(1, (0, 4), ((5, 2),)), "head 4, where there are 0 to 3"),
        (Mask(1, None, ((LAST + 1, 2),)), f"position {LAST + 1}, where there are 0 to {LAST}"),
        (zero(1, "hook_attn_out", (LAST + 1,)), f"position {LAST + 1}, where"),
        (zero(1, "attn.hook_z", (3,), heads=(7,)), "head 7"),
        (zero(1, "hook_resid_middle", (3,)), "hook_resid_middle.*what can.*, attn.hook_z"),
        (zero(1, "hook_resid_middle", (3,), heads=(0,)), "hook_resid_middle.*what can.*, attn.hook_z"),
        (zero(1, "blocks.1.hook_attn_out", (3,)), "blocks.1.hook_attn_out.*what can.*, attn.hook_z"),
    ],
)
def test_what_a_model_does_not_have_is_refused_by_name(intervention: Any, why: str, hooked: Hooked):
    with pytest.raises(NoSuchPlace, match=f"llama.*{why}"):
        hooked("llama").forward(prompt(), [(intervention,)])


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_oss"])
def test_errors_and_captures_leave_no_trace(family: str, hooked: Hooked):
    model, ids_BT = hooked(family), prompt()
    clean = model.forward(ids_BT).logits_BV
    with pytest.raises(NoSuchPlace):
        model.forward(ids_BT, [(Mask(0, (99,), ((3, 2),)),)], ["blocks.0.hook_resid_post"])
    model.forward(ids_BT, [(Mask(1, None, ((LAST, 2),)),)], ["blocks.0.hook_attn_out"], own_attention=True)
    model.forward(ids_BT, [(Mask(1, None, tuple((LAST, key) for key in range(PROMPT))),)])
    assert torch.equal(model.forward(ids_BT).logits_BV, clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_interventions_together_are_cut_once(hooked: Hooked):
    """The same edge twice is one edge; masks of one layer add up."""
    model, ids_BT = hooked("llama"), prompt()
    apart = (Mask(1, (2,), ((9, 3), (9, 4))), Mask(1, None, ((9, 4),)), Mask(3, (0,), ((LAST, 0),)))
    whole = (Mask(1, None, ((9, 4),)), Mask(1, (2,), ((9, 3),)), Mask(3, (0,), ((LAST, 0),)))
    first, second = (model.forward(ids_BT, [masks]) for masks in (apart, whole))
    assert torch.equal(first.logits_BV, second.logits_BV)
    assert first.fired_B.tolist() == second.fired_B.tolist() == [6]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "opt"])
def test_the_familys_own_attention_gives_the_same(family: str, hooked: Hooked):
    """The second opinion of verification, empty lines included."""
    every_key = tuple((LAST, key) for key in range(PROMPT))
    masks = [(), (Mask(1, (1, 3), ((LAST, 11), (12, 12))),), (Mask(2, (0,), every_key), Mask(0, None, ((0, 0),)))]
    ours = hooked(family).forward(prompt().expand(3, -1), masks)
    theirs = hooked(family).forward(prompt().expand(3, -1), masks, own_attention=True)
    torch.testing.assert_close(ours.logits_BV, theirs.logits_BV, atol=1e-5, rtol=0)
    assert ours.empty_B.tolist() == theirs.empty_B.tolist() == [0, 0, 5]
    assert ours.fired_B.tolist() == theirs.fired_B.tolist()


def test_a_family_that_passes_something_new_is_refused():
    model = build("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    before = attention.forward
    attention.forward = lambda *args, **kwargs: before(*args, **kwargs, top_tokens=torch.tensor([3]))  # pyright: ignore
    with pytest.raises(UnsupportedAttention, match="LlamaAttention passes top_tokens"):
        HookedModel(model, "llama")


def test_a_model_without_attention_is_refused_by_name():
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    with pytest.raises(NoSuchPlace, match="mamba-tiny has no attention heads"):
        HookedModel(MambaForCausalLM(MambaConfig(**sizes)).eval(), "mamba-tiny")


def test_dropout_is_off():
    """A model handed over in training mode measures the same twice."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedModel(type(build("llama"))(config).train(), "llama")
    assert not model.model.training
    assert torch.equal(model.forward(prompt()).logits_BV, model.forward(prompt()).logits_BV)
    assert isinstance(model.model, nn.Module)
