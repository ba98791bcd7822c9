"""One model in four classes: SmolLM2's tensors, placed in Mistral, Qwen2 and Phi-3, give Llama's answers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.model.loading import Loaded
from tests.families import Build
from tests.model.measuring import by_engine

pytestmark = pytest.mark.oracle

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"
State = dict[str, Tensor]


def same(state: State) -> State:
    return state


def with_biases(state: State) -> State:
    """Qwen2's queries, keys and values have biases: zero ones."""
    projections = [name for name in state if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    return state | {f"{name.removesuffix('weight')}bias": torch.zeros(len(state[name])) for name in projections}


def fused(state: State) -> State:
    """Phi-3 keeps queries, keys and values in one matrix, and gate and up in another."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith(_SPLIT)}
    for name in state:
        stem = name.removesuffix("self_attn.q_proj.weight")
        if stem != name:
            qkv = [state[f"{stem}self_attn.{letter}_proj.weight"] for letter in "qkv"]
            out[f"{stem}self_attn.qkv_proj.weight"] = torch.cat(qkv)
            out[f"{stem}mlp.gate_up_proj.weight"] = torch.cat(
                [state[f"{stem}mlp.{g}_proj.weight"] for g in ("gate", "up")]
            )
    return out


_SPLIT = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))

CLASSES = {
    "mistral": (MistralConfig, MistralForCausalLM, same),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, with_biases),
    "phi3": (Phi3Config, Phi3ForCausalLM, fused),
}


def placed(family: str, llama: PreTrainedModel) -> PreTrainedModel:
    make_config, make_model, rearrange = CLASSES[family]
    given = llama.config.to_dict()
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
        *("num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    config = make_config(**{name: given[name] for name in kept}, sliding_window=None, attn_implementation="eager")
    with torch.device("meta"):
        model = make_model(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(rearrange(llama.state_dict()), assign=True)
    model.tie_weights()
    # Buffers are made by the constructor alone, and were made of nothing.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@pytest.mark.parametrize("family", CLASSES)
def test_every_class_gives_llamas_numbers(family: str, demo: Callable[[str], Loaded], plain_demo: Build):
    ids_PT = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    cells = [
        Cell(0, (Mask(15, None, ((4, 0),)),)),
        Cell(0, (Mask(0, (8,), ((4, 3), (3, 1))), Mask(29, (0, 4), ((4, 4),)))),
        Cell(0, (Mask(1, (2,), tuple((4, key) for key in range(5))),)),
    ]

    theirs = by_engine(demo(SMOLLM2).engine, ids_PT, cells)
    assert (theirs.ablated_AV - theirs.clean_PV).abs().amax(-1).min() > 0.1

    model = HookedModel(placed(family, plain_demo(SMOLLM2)), family)
    capability = measure_capability(model, 8)
    assert capability.way == "cone"
    ours = by_engine(Engine(model, capability, "cone"), ids_PT, cells)
    torch.testing.assert_close(ours.clean_PV, theirs.clean_PV, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.ablated_AV, theirs.ablated_AV, atol=1e-4, rtol=0)
