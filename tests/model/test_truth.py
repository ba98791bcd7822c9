"""What half-precision weights give in float32, against the same weights loaded as a float32 model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymi.model.hooked import HookedModel, NotFired
from raymi.model.interventions import Intervention, Mask, scale
from raymi.model.truth import HALF, NoTruth, in_float32
from tests import oracles
from tests.families import PROMPT, build, prompt

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_oss", "bloom", "jamba", "gemma3n_text", "gemma4_text")


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_truth_is_that_of_a_float32_model_of_the_same_weights(family: str, dtype: torch.dtype):
    model, wide, ids_PT = HookedModel(build(family).to(dtype), family), build(family).to(dtype).float(), prompt()
    with in_float32(model):
        ours_V = model.forward(ids_PT, own_attention=True).logits_BV[0]
    torch.testing.assert_close(ours_V, oracles.last_logits(wide, ids_PT[0]), atol=1e-5, rtol=0)
    narrow_V = model.forward(ids_PT, own_attention=True).logits_BV[0]
    assert float((narrow_V - ours_V).abs().max()) > 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_cut_in_float32(family: str):
    model, wide = HookedModel(build(family).half(), family), build(family).half().float()
    edges = tuple((PROMPT - 1, key) for key in range(4, PROMPT))
    with in_float32(model):
        ours_V = model.forward(prompt(), [(Mask(1, (2,), edges),)], own_attention=True).logits_BV[0]
    theirs_V, *_ = oracles.by_edited_softmax(wide, prompt()[0], oracles.Knockout((1,), (2,), edges))
    torch.testing.assert_close(ours_V, theirs_V, atol=1e-5, rtol=0)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_afterwards_what_they_were(fails: bool):
    model = HookedModel(build("mixtral").bfloat16(), "mixtral")
    before, at = bits(model.model), [each.data_ptr() for each in model.model.parameters()]
    if fails:
        model.blocks[2].module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), in_float32(model):
            model.run(prompt())
    else:
        with in_float32(model):
            model.run(prompt())
    for name, now in bits(model.model).items():
        assert now.dtype == before[name].dtype
        assert torch.equal(now, before[name])
    assert [each.data_ptr() for each in model.model.parameters()] == at


def test_one_layer_is_wide_at_a_time():
    model = HookedModel(build("llama").bfloat16(), "llama")
    seen: list[set[int]] = []

    def look(*_: Any) -> None:
        wide = [{p.dtype for p in block.module.parameters()} == {torch.float32} for block in model.blocks]
        head = model.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        assert next(head.parameters()).dtype == torch.bfloat16
        seen.append({layer for layer, is_wide in enumerate(wide) if is_wide})

    with in_float32(model):
        for block in model.blocks:
            block.module.get_submodule("mlp").register_forward_hook(look)
        model.run(prompt())
    assert seen == [{layer} for layer in range(model.n_layers)]


def test_what_stays_narrow_is_no_truth():
    model = HookedModel(build("llama").bfloat16(), "llama")

    def narrowed(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0].bfloat16(), *args[1:])

    model.blocks[2].module.register_forward_pre_hook(narrowed)
    with pytest.raises(NoTruth, match=r"llama: a layer is given torch\.bfloat16"), in_float32(model):
        model.run(prompt())


def test_weights_that_accelerate_moves_are_not_widened():
    model = HookedModel(build("llama").bfloat16(), "llama")
    model.model.get_input_embeddings().__dict__["_hf_hook"] = object()
    with pytest.raises(NoTruth, match="accelerate"), in_float32(model):
        pass


@pytest.mark.parametrize(
    "change", [Mask(3, None, ((PROMPT - 1, 0),)), scale(2, "hook_mlp_out", (PROMPT - 1,), 0.5)], ids=["mask", "edit"]
)
def test_interventions_are_counted_in_float32_too(change: Intervention):
    model = HookedModel(build("llama").bfloat16(), "llama")
    with in_float32(model):
        out = model.forward(prompt(), [(change,)], own_attention=True)
        assert int(out.fired_B[0]) > 0
        layer = model.blocks[change.layer].module
        layer.forward = lambda hidden_states, **_: hidden_states  # type: ignore[method-assign]
        with pytest.raises(NotFired):
            model.forward(prompt(), [(change,)], own_attention=True)
