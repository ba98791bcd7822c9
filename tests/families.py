"""Tiny random models of many families: at least four layers, every kind of layer, windows shorter than the prompts."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
WINDOW = 5
PROMPT = 14
"""Tokens of a test prompt: more than two windows."""

_SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "vocab_size": VOCABULARY}
_MODERN: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {**_SPECIAL, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48}

CONFIGS: dict[str, dict[str, Any]] = {
    # Those that every release is held to.
    "llama": _MODERN,
    "gpt2": _GPT,
    "gpt_neox": {**_MODERN, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "qwen2": {**_MODERN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": _MODERN,
    "gemma2": {**_MODERN, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_MODERN, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": _MODERN,
    "mistral": {**_MODERN, "sliding_window": WINDOW},
    "starcoder2": {**_MODERN, "sliding_window": WINDOW},
    # Others that go through the attention function: biases, parallel blocks, post-norms, sinks, chunks, experts.
    "cohere": _MODERN,
    "gpt_oss": {
        **_MODERN,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granite": {**_MODERN, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "llama4_text": {
        **_MODERN,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "mixtral": {**_MODERN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": _MODERN,
    "opt": {
        **_SPECIAL,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    "phi": {**_MODERN, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {**_MODERN, "partial_rotary_factor": 0.5},
    # Those that do not: their masks are edited.
    "bloom": {**_SPECIAL, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "falcon": {**_SPECIAL, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "multi_query": False},
    "gpt_neo": {
        **_SPECIAL,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
        "max_position_embeddings": 64,
        "intermediate_size": 48,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "mpt": {**_SPECIAL, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
}

REQUIRED = tuple(list(CONFIGS)[:10])


def config(family: str) -> Any:
    return CONFIG_MAPPING[family](**CONFIGS[family])


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float32, its weights large enough for attention to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def prompt(n_tokens: int = PROMPT, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """[rows, n_tokens] random token ids, special ones left out."""
    return torch.randint(2, VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


Build = Callable[[str], PreTrainedModel]
