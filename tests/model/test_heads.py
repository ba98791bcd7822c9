"""Layers with heads, widths and windows of their own: knockouts equal what eager attention gives with edited masks."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raymi import headcounts, snapshot
from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask, zero
from raymi.model.sites import NoSuchPlace
from tests.families import MODERN, PROMPT, WINDOW, prompt
from tests.model.measuring import by_engine, in_one_batch

LAST = PROMPT - 1
MIXED = ["sliding_attention", "full_attention"] * 2
WINDOWED: dict[str, Any] = {**MODERN, "sliding_window": WINDOW, "layer_types": MIXED}
CONFIGS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "more heads than the first": (
        "laguna",
        {**WINDOWED, "num_attention_heads_per_layer": [4, 8, 2, 6], "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        (4, 8, 2, 6),
    ),
    "windows with heads": (
        "inkling_text",
        {**MODERN, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 2, "swa_head_dim": 4}
        | {"sliding_window_size": WINDOW, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "d_rel": 4}
        | {"mlp_layer_types": ["dense"] * 4, "rel_extent": 16, "logits_mup_width_multiplier": 1.0},
        (8, 4, 8, 4),
    ),
    "unequal widths": (
        "gemma4_text",
        {**WINDOWED, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
        (4,) * 4,
    ),
    "windows": ("gemma3_text", {**WINDOWED, "query_pre_attn_scalar": 16}, (4,) * 4),
    "chunks": (
        "llama4_text",
        {**MODERN, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, "num_local_experts": 2}
        | {"num_experts_per_tok": 1, "no_rope_layers": [1, 1, 1, 0]},
        (4,) * 4,
    ),
    "windows and sinks": (
        "gpt_oss",
        {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
        (4,) * 4,
    ),
}


def build(case: str) -> PreTrainedModel:
    kind, fields, _ = CONFIGS[case]
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(6.0)  # or nothing that is done has an effect worth comparing
    return model


@cache
def engine(case: str) -> Engine:
    model = HookedModel(build(case), case)
    capability = measure_capability(model, PROMPT)
    return Engine(model, capability, capability.way)


Edges = tuple[tuple[int, int], ...]


@torch.no_grad()
def by_edited_mask(
    model: PreTrainedModel, ids_T: Tensor, heads: dict[int, tuple[int, ...]], edges: Edges, n_heads: tuple[int, ...]
) -> tuple[Tensor, int, int]:
    """[V] logits with edges of some heads of some layers forbidden; how many were open, and how many were not."""
    open_edges = closed_edges = 0
    handles: list[Any] = []

    def edit(layer: int, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            nonlocal open_edges, closed_edges
            mask = kwargs["attention_mask"].expand(1, n_heads[layer], -1, -1).clone()
            lowest = torch.finfo(mask.dtype).min
            for head in heads[layer]:
                for query, key in edges:
                    forbidden = bool(mask[0, head, query, key] < lowest / 2)
                    open_edges, closed_edges = open_edges + (not forbidden), closed_edges + forbidden
                    mask[0, head, query, key] = lowest
            return args, {**kwargs, "attention_mask": mask}

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for module in model.modules():
        if type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) in heads:
            edit(int(module.layer_idx), module)  # pyright: ignore[reportArgumentType]
    assert len(handles) == len(heads)
    try:
        logits_V = model(ids_T[None], use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits_V, open_edges, closed_edges


@pytest.mark.oracle
@pytest.mark.parametrize("case", CONFIGS)
def test_layers_with_heads_of_their_own(case: str):
    its, plain, ids_PT, n_heads = engine(case), build(case), prompt(), CONFIGS[case][2]
    assert tuple(map(its.model.heads, range(4))) == n_heads
    # The third edge is open in every layer; a window has closed the first, and a chunk the second, too.
    edges: Edges = ((LAST, 1), (LAST, LAST - WINDOW - 1), (LAST, LAST - 1), (LAST - 3, LAST - 4))
    asked: list[tuple[dict[int, tuple[int, ...] | None], Edges]] = []
    for layer in range(4):
        asked += [({layer: None}, edges), ({layer: (n_heads[layer] - 1,)}, edges), ({layer: None}, edges[:1])]
    asked.append((dict.fromkeys(range(4)), edges))
    cells = [Cell(0, tuple(Mask(layer, of, edges) for layer, of in heads.items())) for heads, edges in asked]
    with torch.no_grad():
        scale = float(plain(ids_PT).logits[0, -1].abs().max())
    for measured in (by_engine(its, ids_PT, cells), in_one_batch(its.model, ids_PT, cells)):
        effects: list[float] = []
        for i, (heads, edges) in enumerate(asked):
            every = {layer: tuple(range(n_heads[layer])) if of is None else of for layer, of in heads.items()}
            theirs_V, n_open, n_closed = by_edited_mask(plain, ids_PT[0], every, edges, n_heads)
            assert float((measured.ablated_AV[i] - theirs_V).abs().max()) <= 1e-5 * scale, (case, heads, edges)
            assert (int(measured.fired_A[i]), int(measured.closed_A[i])) == (n_open, n_closed), (case, heads, edges)
            effects.append(float((theirs_V - measured.clean_PV[0]).abs().max()))
            assert (n_open > 0) == (effects[-1] > 1e-6 * scale), (
                "what is closed has no effect, and what is open has one"
            )
        assert max(effects) > 1e-3 * scale
    if "window" in case or "chunk" in case:
        assert any(
            int(closed) and not int(fired) for closed, fired in zip(measured.closed_A, measured.fired_A, strict=True)
        )


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json_says_the_same_without_torch(case: str):
    config = json.loads(build(case).config.to_json_string())
    n_heads = CONFIGS[case][2]
    found = headcounts.heads_by_layer(config, 4, snapshot.sizes(config)["n_heads"])
    assert found == (None if len(set(n_heads)) == 1 else n_heads)


def test_a_head_that_a_layer_lacks_is_named():
    model = engine("more heads than the first").model
    with pytest.raises(NoSuchPlace, match="head 2 of layer 2, where there are 0 to 1"):
        model.forward(prompt(), [[Mask(2, (2,), ((LAST, 0),))]])
    model.forward(prompt(), [[Mask(1, (7,), ((LAST, 0),))]])
    out = model.forward(prompt(), [[zero(1, "attn.hook_z", (LAST,))]], capture=["blocks.1.attn.hook_z"])
    assert out.fired_B.tolist() == [8]
    assert out.cache["blocks.1.attn.hook_z"].shape == (1, PROMPT, 8, 8)


def test_every_kind_of_layer_is_tried_at_load(monkeypatch: pytest.MonkeyPatch):
    """A number of heads that is wrong in one layer in the middle alone."""
    model = HookedModel(build("more heads than the first"), "miscounted")
    model.heads_by_layer = (4, 4, 2, 6)
    with pytest.raises(RuntimeError, match="miscounted"):
        measure_capability(model, PROMPT)
