"""One table of small configs: a tiny random model of every type that transformers calls a causal language model.

Four layers or more, every kind of layer, other heads and widths where a layer may have its own, windows, chunks and
top-k shorter than `PROMPT`. What `tests/families.py` has is taken from there.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import families
from tests.fakes import TOKENIZER, TOKENIZER_CONFIG, add_folder
from tests.families import (
    GPT,
    GROUPED,
    LATENT,
    LINEAR,
    MIXED,
    MODERN,
    ODD,
    SIX,
    SPECIAL,
    VOCABULARY,
    WINDOW,
    every_third,
)

PROMPT = 20
"""Tokens of a prompt: more than three windows, two chunks, and every top-k."""

ALTERNATING = ["sliding_attention", "full_attention"] * 2
SLIDING: dict[str, Any] = {**MODERN, "sliding_window": WINDOW, "layer_types": ALTERNATING}
SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"] * 2}
EXPERTS: dict[str, Any] = {**MIXED, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 24, "n_shared_experts": 1, "num_shared_experts": 1}
INDEXED: dict[str, Any] = {**LATENT, **GROUPED, **SPARSE, "index_topk": 6, "index_head_dim": 8, "index_n_heads": 2}
FULL_HEADS: dict[str, Any] = {**MODERN, "num_key_value_heads": 4}
GLM: dict[str, Any] = {"pad_token_id": 1}

ENCODER: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1},
    **{"bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 2},
}
"""BERT and its likes, made into decoders."""
DECODER: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1},
    **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40},
    **{"decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
}
"""BART and its likes, of which a causal language model is the decoder; the encoder has other numbers."""
_VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
_TOWER: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8},
    **{"out_hidden_size": 32, "num_position_embeddings": 16},
}
GEMMA3 = families.CONFIGS["gemma3_text"]
GEMMA4: dict[str, Any] = {**ODD["gemma4_text"], "global_head_dim": 16, "num_global_key_value_heads": 1}
GEMMA4_UNIFIED: dict[str, Any] = {**GEMMA4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
"""Every layer has keys of its own."""
QWEN35: dict[str, Any] = {**every_third("linear_attention"), **LINEAR}
QWEN35_MOE: dict[str, Any] = {**QWEN35, **EXPERTS, "shared_expert_intermediate_size": 24}
INKLING: dict[str, Any] = {
    **{**SIX, **EXPERTS, "d_rel": 4, "rel_extent": 16, "n_shared_experts": 1, "unpadded_vocab_size": VOCABULARY},
    **{"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 4, "sliding_window_size": WINDOW},
    "layer_types": ["hybrid_sliding", "hybrid"] * 3,
}
DOTS3: dict[str, Any] = {
    **{**INDEXED, "num_experts_per_tok": 2, "sliding_window": WINDOW, "shared_experts_intermediate_size": 24},
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "per_layer_config": {
        layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 12}
        for layer in ("1", "3")
    },
}
QWEN4: dict[str, Any] = {
    **{**QWEN35_MOE, "layer_types": ["linear_attention", "indexed_attention"] * 3, "hc_count": 2, "hc_lowrank": 4},
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 6, "indexer_compress_ratio": 2},
}

TYPES: dict[str, dict[str, Any]] = {
    **families.CONFIGS,
    **ODD,
    "apertus": MODERN,
    "arcee": MODERN,
    "aria_text": {**MODERN, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**LATENT, **GROUPED, **SPARSE},
    "axk2": {**INDEXED, "head_dim": 4, "gated_norm_rank": 4},
    "bailing_hybrid": {
        **{**LATENT, **EXPERTS, "num_hidden_layers": 6, "num_expert_group": 1, "topk_group": 1},
        **{"num_experts_per_token": 2, "num_shared_experts": 1, "layer_group_size": 3, "first_k_dense_replace": 1},
        **{"linear_head_dim": 8, "linear_num_heads": 4, "model_max_length": 64},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2,
    },
    "bart": DECODER,
    "beam": {**SLIDING, **EXPERTS, **SPARSE, "n_group": 1, "topk_group": 1},
    "bert": ENCODER,
    "bert-generation": ENCODER,
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "bigbird_pegasus": {**DECODER, "attention_type": "original_full"},
    "biogpt": MODERN,
    "bitnet": MODERN,
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "blt": {
        "patcher_config": {**MODERN, "vocab_size": 260, "num_hidden_layers": 1},
        "encoder_config": {**MODERN, "vocab_size": 260, "num_hidden_layers": 1, "hidden_size_global": 32},
        "decoder_config": {**MODERN, "vocab_size": 260, "num_hidden_layers": 4, "hidden_size_global": 32},
        "global_config": {**MODERN, "num_hidden_layers": 2},
        **{"vocab_size": 260, "encoder_hash_byte_group_vocab": 50, "cross_attn_k": 2, "max_position_embeddings": 64},
    },
    "camembert": ENCODER,
    "cohere2_moe": {**SLIDING, **EXPERTS, **SPARSE, "num_shared_experts": 1},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ALTERNATING},
    },
    "cpmant": {
        **{**MODERN, "dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 8, "position_bias_max_distance": 16},
        **{"prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    },
    "ctrl": {**GPT, "dff": 48},
    "cwm": {**SLIDING},
    "data2vec-text": ENCODER,
    "dbrx": {
        **{**SPECIAL, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": {**INDEXED, "first_k_dense_replace": 1},
    "deepseek_v4": {
        **{**MODERN, **EXPERTS, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2},
        **{"index_head_dim": 8, "index_topk": 4, "sliding_window": WINDOW, "hc_mult": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "qk_rope_head_dim": 4, "partial_rotary_factor": 0.25},
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2,
        "mlp_layer_types": ["hash_moe", "moe"] * 3,
        "num_hidden_layers": 6,
    },
    "diffllama": MODERN,
    "doge": {**MODERN, "keep_window_size": 8, "num_experts": 16, "num_experts_per_tok": 2},
    "dots1": {**SLIDING, **GROUPED, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {
            **{**_VISION, "per_layer_config": {}, "mlp_layer_types": ["dense"], "num_local_experts": 2},
            **{"adapter_in_dim": 16, "adapter_out_dim": 32, "moe_intermediate_size": 8},
        },
        "audio_config": {**_VISION, "adapter_input_size": 16, "adapter_output_size": 32},
    },
    "dots3_note_text": DOTS3,
    "electra": {**ENCODER, "embedding_size": 16},
    "emu3": {
        "text_config": {**FULL_HEADS, "pad_token_id": 1},
        "vq_config": {
            **{"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32},
            **{"attn_resolutions": [], "num_res_blocks": 1, "temporal_downsample_factor": 2},
        },
        "vocabulary_map": {"<image>": 5},
    },
    "ernie": ENCODER,
    "ernie4_5": MODERN,
    "ernie4_5_moe": {**MODERN, **MIXED, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    "exaone_moe": {**SLIDING, **EXPERTS, **SHARED, **SPARSE, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "falcon_mamba": {**MODERN, "state_size": 8},
    "flex_olmo": {**MODERN, **EXPERTS},
    "flint": {
        **{**SLIDING, **EXPERTS, **SHARED, "mlp_only_layers": [0]},
    },
    "fuyu": {"text_config": {"model_type": "persimmon", **FULL_HEADS}, **FULL_HEADS},
    "gemma": MODERN,
    "gemma3": {"text_config": GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma3n": {"text_config": ODD["gemma3n_text"]},
    "gemma4": {"text_config": {**GEMMA4, "pad_token_id": 1}},
    "gemma4_text": GEMMA4,
    "gemma4_assistant": {
        "text_config": {**GEMMA4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        "backbone_hidden_size": 32,
    },
    "gemma4_unified": {"text_config": {**GEMMA4_UNIFIED, "pad_token_id": 1}},
    "gemma4_unified_assistant": {"text_config": GEMMA4, "backbone_hidden_size": 32},
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "git": {**ENCODER, "vision_config": _VISION},
    "glm": {**MODERN, **GLM, "partial_rotary_factor": 0.5},
    "glm4_moe_lite": {**LATENT, **GROUPED, **SPARSE, **GLM},
    "glm_moe_dsa": {**INDEXED, **GLM, "indexer_types": ["full", "shared"] * 2, "first_k_dense_replace": 1},
    "got_ocr2": {
        "text_config": {**families.CONFIGS["qwen2"], "model_type": "qwen2"},
        "vision_config": {**_VISION, "output_channels": 8, "mlp_dim": 16, "global_attn_indexes": [0], "window_size": 2},
    },
    "gpt-sw3": GPT,
    "gpt_neox_japanese": {**FULL_HEADS, "intermediate_multiple_size": 2},
    "granite_swa": {**SLIDING, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoe": {**MODERN, **EXPERTS, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoe_swa": {**SLIDING, **EXPERTS, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoeshared": {
        **{**MODERN, **EXPERTS, "shared_intermediate_size": 24},
        **{"residual_multiplier": 0.5, "attention_multiplier": 0.2},
    },
    "helium": MODERN,
    "hrm_text": {**FULL_HEADS, "num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1},
    "hunyuan_v1_dense": MODERN,
    "hunyuan_v1_moe": {**MODERN, "num_experts": 4, "moe_topk": [2] * 4},
    "hy_v3": {**MODERN, **EXPERTS, **SHARED, **SPARSE},
    "hy_v4": {**INDEXED, "indexer_types": ["full", "shared"] * 2, "hc_mult": 2},
    "hyperclovax": {**MODERN, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "inkling2_text": {**INKLING, "mlp_layer_types": ["dense", "sparse"] * 3, "n_layers_per_attn_res_block": 2},
    "inkling_text": {**INKLING, "mlp_layer_types": ["dense", "sparse"] * 3},
    "internlm3": MODERN,
    "iquestcoder": MODERN,
    "jais2": MODERN,
    "kimi_linear": {
        **{**LATENT, **EXPERTS, "num_hidden_layers": 6, "num_expert_group": 1, "topk_group": 1},
        **{"num_experts_per_token": 2, "num_shared_experts": 1, "linear_head_dim": 8, "linear_num_heads": 4},
        **{"layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2, "model_max_length": 64},
        "mlp_layer_types": ["dense", "sparse"] * 3,
    },
    "kolibri1": {**SLIDING, **EXPERTS, **SHARED},
    "laguna": {**SLIDING, **EXPERTS, **SHARED, **SPARSE, "num_attention_heads_per_layer": [4, 8, 2, 4]},
    "lfm2_moe": {**every_third("conv"), **EXPERTS, "num_dense_layers": 2},
    "lfm3": {**SIX, "layer_types": ["conv", "sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW},
    "llama4": {"text_config": families.CONFIGS["llama4_text"], "vision_config": {**_VISION, "vision_output_dim": 32}},
    "longcat_flash": {
        **{**LATENT, "num_layers": 4, "num_hidden_layers": 8, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24},
        **{"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2},
    },
    "mamba": {**MODERN, "state_size": 8},
    "mamba2": {**MODERN, "num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "marian": {**DECODER, "decoder_vocab_size": VOCABULARY},
    "mbart": DECODER,
    "megatron-bert": ENCODER,
    "mellum": {**SLIDING, **EXPERTS, **SPARSE},
    "mimo_v2_flash": {
        **{**SLIDING, **GROUPED, **SPARSE, "v_head_dim": 4, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4},
        **{"swa_head_dim": 4, "swa_v_head_dim": 4},
    },
    "minicpm3": {**LATENT, "num_key_value_heads": 4, "dim_model_base": 8, "scale_depth": 1.4},
    "minimax": {**ODD["minimax"], "block_size": 4},
    "minimax_m2": {**MODERN, **EXPERTS},
    "minimax_m3_vl_text": {
        **{**MODERN, **EXPERTS, **SPARSE, "dense_intermediate_size": 48, "shared_intermediate_size": 24},
        **{"rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 2, "index_topk_blocks": 2},
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    },
    "ministral": SLIDING,
    "mllama": {
        "text_config": {**SIX, "cross_attention_layers": [1, 4], "pad_token_id": 1},
        "vision_config": {**_VISION, "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]},
    },
    "modernbert-decoder": {
        **{**ENCODER, "layer_types": ALTERNATING, "local_attention": 2 * WINDOW, "cls_token_id": 0, "sep_token_id": 2},
    },
    "moshi": {**FULL_HEADS, "ffn_dim": 96, "sliding_window": WINDOW},
    "moss_transcribe_diarize": {
        "text_config": {**MODERN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "audio_config": {**_VISION, "num_mel_bins": 8, "max_source_positions": 16},
    },
    "musicgen": {},
    "musicgen_melody": {},
    "mvp": {**DECODER, "prompt_length": 4, "prompt_mid_dim": 8},
    "nanochat": MODERN,
    "nemotron": MODERN,
    "olmo": MODERN,
    "olmo3": SLIDING,
    "openai-gpt": GPT,
    "pegasus": DECODER,
    "persimmon": FULL_HEADS,
    "phi4_multimodal": {
        **MODERN,
        "vision_config": {**_VISION, "crop_size": 16},
        "audio_config": {
            **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8},
            **{"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16},
        },
    },
    "plbart": DECODER,
    "prophetnet": {
        **{**SPECIAL, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 4, "pad_token_id": 1},
        **{"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 40},
        **{"decoder_ffn_dim": 48, "max_position_embeddings": 64},
    },
    "qwen2_moe": {
        **{**MODERN, **EXPERTS, "shared_expert_intermediate_size": 24, "use_sliding_window": True},
        **{"sliding_window": WINDOW, "max_window_layers": 2},
        "decoder_sparse_step": 2,
    },
    "qwen3_5": {"text_config": QWEN35, "vision_config": _TOWER},
    "qwen3_5_text": QWEN35,
    "qwen3_5_moe": {"text_config": QWEN35_MOE, "vision_config": _TOWER},
    "qwen3_5_moe_text": QWEN35_MOE,
    "qwen4_exp": {"text_config": QWEN4, "vision_config": _TOWER},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        **{**SPECIAL, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8, "is_decoder": True},
        **{"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48, "pad_token_id": 1},
        **{"attn_layers": ["local", "lsh"] * 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
        **{"max_position_embeddings": 64, "num_buckets": 4, "num_hashes": 1, "hash_seed": 0},
    },
    "rembert": {**ENCODER, "input_embedding_size": 16, "output_embedding_size": 32},
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roc_bert": {
        **{**ENCODER, "pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCABULARY, "shape_embed_dim": 8},
        "shape_vocab_size": VOCABULARY,
    },
    "roformer": {**ENCODER, "embedding_size": 32},
    "rwkv": {**MODERN, "context_length": 64, "attention_hidden_size": 32},
    "seed_oss": MODERN,
    "smollm3": {**MODERN, "no_rope_layers": [1, 0] * 2, "use_sliding_window": True, "sliding_window": WINDOW},
    "solar_open": {**MODERN, **GROUPED, "num_experts_per_tok": 2},
    "trocr": DECODER,
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 16},
    "whisper": {**DECODER, "num_mel_bins": 8, "max_target_positions": 64, "max_source_positions": 16},
    "xglm": {
        **{**SPECIAL, "d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4, "pad_token_id": 1},
        "max_position_embeddings": 64,
    },
    "xlm": {**GPT, "emb_dim": 32, "n_layers": 4, "n_heads": 4, "causal": True, "pad_token_id": 2},
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    "xlnet": {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48, "attn_type": "uni"},
    "xlstm": {**MODERN, "num_heads": 4, "embedding_dim": 32, "num_blocks": 4, "chunk_size": 4},
    "xmod": {**ENCODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        **{**SIX, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "n_mamba_heads": 2},
        "num_key_value_heads": 4,
    },
    "zamba2": {
        **{**SIX, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid", "mamba"] * 2, "chunk_size": 4},
        **{"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "adapter_rank": 4, "num_mem_blocks": 2},
        **{"head_dim": 16, "use_mem_rope": True},
    },
    "zaya": {**MODERN, **EXPERTS, "num_experts_per_tok": 1, "router_hidden_size": 16},
    # With a window, or experts in some layers alone, where the tests' own families have them everywhere or nowhere.
    "ministral3": {**MODERN, "sliding_window": WINDOW},
    "mixtral": {**families.CONFIGS["mixtral"], "sliding_window": WINDOW},
    "phi3": {**MODERN, "sliding_window": WINDOW},
    "phimoe": {**MODERN, **EXPERTS, "sliding_window": WINDOW},
    "qwen3": {**MODERN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3_moe": {
        **{**ODD["qwen3_moe"], "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
        "max_window_layers": 2,
    },
    "qwen3_next": {**ODD["qwen3_next"], "decoder_sparse_step": 2},
}
"""Type -> what its config is made of."""

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon/alibi": {**families.CONFIGS["falcon"], "alibi": True, "parallel_attn": False},
    "falcon/new": {**families.CONFIGS["falcon"], "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma4_text/experts": {
        **{
            **GEMMA4_UNIFIED,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    },
    "gemma3_text/loud": GEMMA3,
    "gpt_bigcode/multi_head": {**GPT, "multi_query": False},
    "gpt_neox/in_turn": {**families.CONFIGS["gpt_neox"], "use_parallel_residual": False},
    "granite/loud": families.CONFIGS["granite"],
    "opt/post_norm": {**families.CONFIGS["opt"], "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "stablelm/parallel": {**families.CONFIGS["stablelm"], "use_parallel_residual": True, "qk_layernorm": True},
}
"""Other shapes of a type, `type/what`: published models have them, and their layers are built another way.

Those called `loud` have one channel of the stream that is large, which the norms undo, as trained models do.
"""
LOUD = 1e5


def types() -> list[str]:
    """Every type that the installed transformers calls a causal language model, whether the table has it or not."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(model_type: str) -> Any:
    """Of a type, or of one of its variants."""
    return CONFIG_MAPPING[model_type.partition("/")[0]](**(TYPES | VARIANTS)[model_type])


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a type in float32, eager, its weights large enough for every layer to matter.

    Raises:
        KeyError: for a type that the table does not have.
        Exception: whatever transformers says of a type that it cannot build by itself.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(model_type), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fan-in keeps wide and narrow matrices alike; the factor makes scores of attention differ between keys.
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.2))
        if model_type.endswith("/loud"):
            _make_loud(model, 1.0 if "gemma" in model_type else 0.0)
    return model.eval()


def _make_loud(model: PreTrainedModel, offset: float) -> None:
    """One channel of the embedding becomes `LOUD`; norms that read the stream leave it out, and the others as they are.

    `offset` is what a norm adds to its weight before it multiplies by it.
    """
    model.get_input_embeddings().weight[:, 3] = LOUD
    reading = {"input_layernorm", "pre_feedforward_layernorm", "norm"}
    if offset == 0.0:
        reading.add("post_attention_layernorm")  # the one before the MLP, where there is none behind the attention
    scale = model.config.hidden_size**0.5 if offset else getattr(model.config, "embedding_multiplier", 1.0)
    for name, module in model.named_modules():
        if name.split(".")[-1] in reading:
            module.weight.fill_(LOUD * scale / model.config.hidden_size**0.5 - offset)
            module.weight[3] = -offset


def save(model_type: str, cache: Path, id: str) -> Path:
    """Puts a type's random model into a cache as a published one would lie there; returns its snapshot's folder.

    Its tokenizer is that of the other fakes: words, 32 of them.
    """
    with TemporaryDirectory() as folder:
        model, of_type = build(model_type), config(model_type)
        model.save_pretrained(folder)
        if type(model.config) is not type(of_type):  # the text part of a multimodal model: published as a whole
            of_type.architectures = [type(model).__name__]
            of_type.save_pretrained(folder)
        for name, content in (("tokenizer.json", TOKENIZER), ("tokenizer_config.json", TOKENIZER_CONFIG)):
            Path(folder, name).write_text(json.dumps(content))
        return add_folder(cache, id, Path(folder))


def load(folder: Path) -> PreTrainedModel:
    """What transformers makes of a snapshot's folder, in float32 and eager."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def prompt(n_tokens: int = PROMPT, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """[rows, n_tokens] random token ids, special ones left out."""
    return torch.randint(8, VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))
