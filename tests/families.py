"""Tiny random models of many families: at least four layers, every kind of layer, windows shorter than the prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.device import DEVICE
from tests.fakes import TOKENIZER, TOKENIZER_CONFIG, add_folder

VOCABULARY = 97
WINDOW = 5
PROMPT = 14
"""Tokens of a test prompt: more than two windows."""

SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "vocab_size": VOCABULARY}
MODERN: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT: dict[str, Any] = {**SPECIAL, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48}

CONFIGS: dict[str, dict[str, Any]] = {
    # Those that every release is held to.
    "llama": MODERN,
    "gpt2": GPT,
    "gpt_neox": {**MODERN, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "qwen2": {**MODERN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": MODERN,
    "gemma2": {**MODERN, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**MODERN, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": MODERN,
    "mistral": {**MODERN, "sliding_window": WINDOW},
    "starcoder2": {**MODERN, "sliding_window": WINDOW},
    # Others that go through the attention function: biases, parallel blocks, post-norms, sinks, chunks, experts.
    "cohere": MODERN,
    "gpt_oss": {
        **MODERN,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granite": {**MODERN, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "llama4_text": {
        **MODERN,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "mixtral": {**MODERN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": MODERN,
    "opt": {
        **SPECIAL,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    "phi": {**MODERN, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {**MODERN, "partial_rotary_factor": 0.5},
    # Those that do not: their masks are edited.
    "bloom": {**SPECIAL, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "falcon": {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "multi_query": False},
    "gpt_neo": {
        **SPECIAL,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
        "max_position_embeddings": 64,
        "intermediate_size": 48,
    },
    "gptj": {**GPT, "rotary_dim": 4},
    "mpt": {**SPECIAL, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
}

REQUIRED = tuple(list(CONFIGS)[:10])


MIXED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    **{**MODERN, "num_key_value_heads": 4, "head_dim": 4},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 16},
}
"""Queries and keys of 12 numbers, values of 16."""
GROUPED: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **MIXED}
LINEAR: dict[str, Any] = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "linear_conv_kernel_dim": 4,
}
STATE: dict[str, Any] = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2},
    **{"mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_d_ssm": 64},
}
SIX: dict[str, Any] = {**MODERN, "num_hidden_layers": 6}


def every_third(state: str, attention: str = "full_attention") -> dict[str, Any]:
    """Six layers, attention in the second and the fifth, so that states lie below, between and above."""
    return {**SIX, "layer_types": [state, attention, state] * 2}


WINDOWED = {**SIX, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}

ODD: dict[str, dict[str, Any]] = {
    # Attention in every layer: latent, of experts, with norms elsewhere.
    "afmoe": {**MODERN, **MIXED, "num_experts": 4, "num_dense_layers": 1, "sliding_window": WINDOW},
    "cohere2": {**MODERN, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {**LATENT, **GROUPED, "topk_method": "greedy", "first_k_dense_replace": 2},
    "deepseek_v3": {**LATENT, **GROUPED, "first_k_dense_replace": 2},
    "exaone4": {**MODERN, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "glm4": {**MODERN, "pad_token_id": 1},
    "glm4_moe": {**MODERN, **GROUPED, "first_k_dense_replace": 1, "pad_token_id": 1},
    "jetmoe": {**MODERN, **MIXED, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    "olmoe": {**MODERN, **MIXED, "num_experts": 4},
    "qwen3_moe": {**MODERN, **MIXED, "num_experts": 4},
    # States, convolutions and linear attention beside it.
    "bamba": {**SIX, **STATE, "attn_layer_indices": [1, 4]},
    "falcon_h1": {**MODERN, **STATE},
    "granitemoehybrid": {
        **{**every_third("mamba", "attention"), **STATE, **MIXED},
        **{"num_local_experts": 4, "shared_intermediate_size": 32},
    },
    "jamba": {
        **{**SIX, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8},
    },
    "lfm2": every_third("conv"),
    "minimax": {**every_third("linear_attention"), "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        **{**SIX, **GROUPED, "layers_block_type": ["mamba", "attention", "moe"] * 2, "ssm_state_size": 8},
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 4},
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo_hybrid": {**every_third("linear_attention"), **LINEAR, "pad_token_id": 1},
    "qwen3_next": {
        **{**every_third("linear_attention"), **LINEAR, **MIXED},
        **{"num_experts": 4, "shared_expert_intermediate_size": 24},
    },
    "recurrent_gemma": {
        **{**SIX, "lru_width": 32, "attention_window_size": WINDOW},
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    # Layers that read other layers' keys, side tensors, streams side by side, outputs as large as the ids say.
    "gemma3n_text": {
        **{**WINDOWED, **PER_LAYER, "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 4},
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**WINDOWED, **PER_LAYER, "num_kv_shared_layers": 2, "global_head_dim": 8},
    "gpt_bigcode": GPT,
}
"""Families that are built in unusual ways, each with what makes it so."""


def config(family: str) -> Any:
    return CONFIG_MAPPING[family](**{**CONFIGS, **ODD}[family])


def build(family: str, seed: int = 0, *, norms: bool = False) -> PreTrainedModel:
    """A random model in float32, its weights large enough for attention to matter.

    Args:
        family: which.
        seed: of its weights.
        norms: whether norms have weights of their own, so that what stands before and behind these is told apart.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0, 0.1)
            elif norms and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().to(DEVICE)


def save(family: str, cache: Path, id: str) -> Path:
    """Puts the random model of a family into a cache, as transformers writes it, and returns its snapshot's folder."""
    with TemporaryDirectory() as folder:
        build(family).save_pretrained(folder)
        for name, content in (("tokenizer.json", TOKENIZER), ("tokenizer_config.json", TOKENIZER_CONFIG)):
            Path(folder, name).write_text(json.dumps(content))
        return add_folder(cache, id, Path(folder))


def prompt(n_tokens: int = PROMPT, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """[rows, n_tokens] random token ids, special ones left out."""
    return torch.randint(2, VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


Build = Callable[[str], PreTrainedModel]
