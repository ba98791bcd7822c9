"""Where a family keeps its layers and what is in them, written by hand from its modelling code.

Nothing here is found by trying: the suite compares what raymi finds with this.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Places:
    """Module paths of one family; None where a family has no such module, so that nothing can be compared.

    Where layers differ, alternatives are separated by `|`, and each layer has the first that it has a module for.
    """

    layers: str = "model.layers"
    """The list of decoder layers."""
    attention: str | None = "self_attn"
    """In a layer: the attention itself, before any post-norm."""
    attn_out: str | None = "self_attn"
    """In a layer: the module whose output is added to the residual stream."""
    mlp: str | None = "mlp"
    """In a layer: the MLP itself, which is fed its input and gives its output."""
    mlp_out: str | None = "mlp"
    """In a layer: the module whose output is added."""
    z: str | None = None
    """In a layer: the projection that is fed the heads' outputs; only for families that do not dispatch."""
    attn_times: str | None = None
    """An attribute of the layer by which what `attn_out` and `mlp_out` give is multiplied before it is added."""
    by_side: bool = False
    """Attention and MLP read the same stream: nothing is in the middle."""


LLAMA = Places()
SANDWICH = Places(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
"""Norms before and behind, or behind alone, called as in Gemma 2 and OLMo 2."""
AROUND = Places(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")
"""Norms before and behind, called as in GLM 4."""
SCALED = Places(attn_times="residual_multiplier")
INSIDE = Places(layers="model.language_model.layers")
"""The text part of a multimodal model."""
MIXED = Places(mlp="feed_forward", mlp_out="feed_forward")
GPT = Places(layers="transformer.h", attention="attn", attn_out="attn")
FC = Places(layers="model.decoder.layers", mlp=None, mlp_out="fc2")
"""Fairseq's: an MLP of two matrices that lie in the layer itself."""
BERT = Places(
    layers="bert.encoder.layer",
    attention="attention.self",
    attn_out="attention.output",
    mlp=None,
    mlp_out=None,
    z="attention.output.dense",
)
"""A norm stands in the residual stream behind each sum, so that neither attention nor MLP adds anything."""
PRE_BERT = replace(BERT, attn_out="attention.output.dense", mlp_out="output.dense")

PLACES: dict[str, Places] = {
    "afmoe": replace(SANDWICH, mlp_out="post_mlp_layernorm"),
    "bamba": MIXED,
    "beam": replace(SANDWICH, attn_out=None, mlp_out=None),  # scaled by depth before they are added
    "bert": BERT,
    "bert-generation": BERT,
    "big_bird": BERT,
    "biogpt": replace(FC, layers="biogpt.layers"),
    "bloom": Places(
        layers="transformer.h",
        attention="self_attention",
        attn_out="self_attention.dense",  # the residual is added inside of both
        mlp=None,
        mlp_out="mlp.dense_4h_to_h",
        z="self_attention.dense",
    ),
    "blt": Places(layers="model.local_decoder.layers"),
    "camembert": replace(BERT, layers="roberta.encoder.layer"),
    "codegen": replace(GPT, z="attn.out_proj", by_side=True),
    "cohere": replace(LLAMA, by_side=True),
    "cohere2": replace(LLAMA, by_side=True),
    "cohere2_moe": replace(LLAMA, by_side=True),
    "cohere_compass_text": replace(LLAMA, by_side=True),
    "ctrl": replace(
        GPT,
        attention="multi_head_attention",
        attn_out="multi_head_attention",
        mlp="ffn",
        mlp_out="ffn",
        z="multi_head_attention.dense",
    ),
    "data2vec-text": replace(BERT, layers="data2vec_text.encoder.layer"),
    "dbrx": Places(
        layers="transformer.blocks",
        attention="norm_attn_norm.attn",
        attn_out="norm_attn_norm.attn",
        mlp="ffn",
        mlp_out="ffn",
    ),
    "deepseek_v4": replace(LLAMA, attn_out=None, mlp_out=None),
    "electra": replace(BERT, layers="electra.encoder.layer"),
    "ernie": replace(BERT, layers="ernie.encoder.layer"),
    "exaone4": SANDWICH,
    "falcon": replace(
        GPT,
        attention="self_attention",
        attn_out="self_attention",
        z="self_attention.dense",
        by_side=True,
    ),
    "falcon/alibi": Places(
        layers="transformer.h", attention="self_attention", attn_out="self_attention", z="self_attention.dense"
    ),
    "falcon_h1": replace(MIXED, attn_out=None, mlp_out=None),  # attention and state are added together
    "flex_olmo": SANDWICH,
    "fuyu": INSIDE,
    "gemma2": SANDWICH,
    "gemma3": replace(SANDWICH, layers=INSIDE.layers),
    "gemma3_text": SANDWICH,
    "gemma3n_text": replace(SANDWICH, attn_out=None, mlp_out=None),
    "gemma4": replace(SANDWICH, layers=INSIDE.layers),
    "gemma4_text": SANDWICH,
    "gemma4_unified": replace(SANDWICH, layers=INSIDE.layers),
    "gemma4_unified_text": SANDWICH,
    "git": replace(BERT, layers="git.encoder.layer"),
    "glm4": AROUND,
    "got_ocr2": INSIDE,
    "gpt-sw3": GPT,
    "gpt2": GPT,
    "gpt_bigcode": replace(GPT, z="attn.c_proj"),
    "gpt_neo": replace(GPT, z="attn.attention.out_proj"),
    "gpt_neox": replace(LLAMA, layers="gpt_neox.layers", attention="attention", attn_out="attention", by_side=True),
    "gpt_neox/in_turn": replace(LLAMA, layers="gpt_neox.layers", attention="attention", attn_out="attention"),
    "gpt_neox_japanese": replace(
        LLAMA,
        layers="gpt_neox_japanese.layers",
        attention="attention",
        attn_out="attention",  # in the last layer a bias is added behind it
        z="attention.dense",
    ),
    "gptj": replace(GPT, z="attn.out_proj", by_side=True),
    "granite": SCALED,
    "granite_swa": SCALED,
    "granitemoe": replace(SCALED, mlp="block_sparse_moe", mlp_out="block_sparse_moe"),
    "granitemoe_swa": replace(SCALED, mlp="block_sparse_moe", mlp_out="block_sparse_moe"),
    "granitemoehybrid": replace(SCALED, mlp=None, mlp_out=None),
    "granitemoeshared": replace(SCALED, mlp=None, mlp_out=None),
    "hyperclovax": replace(SCALED, attn_out="post_norm1", mlp_out="post_norm2"),
    "inkling_text": replace(LLAMA, attn_out="attn_sconv", mlp_out="mlp_sconv"),
    "jamba": MIXED,
    "jetmoe": replace(LLAMA, attention="self_attention", attn_out="self_attention"),
    "kolibri1": AROUND,
    "lfm2": MIXED,
    "lfm2_moe": MIXED,
    "lfm3": replace(MIXED, attn_out="post_operator_norm", mlp_out="post_ffn_norm"),
    "llama4": MIXED,
    "llama4_text": MIXED,
    "megatron-bert": PRE_BERT,
    "minicpm3": replace(LLAMA, attn_times="residual_scale"),
    "minimax": replace(LLAMA, attn_out=None, mlp_out=None),  # both streams are weighted
    "modernbert-decoder": replace(LLAMA, attention="attn", attn_out="attn"),
    "moss_transcribe_diarize": INSIDE,
    "mpt": Places(
        layers="transformer.blocks",
        attention="attn",
        attn_out="attn",
        mlp=None,
        mlp_out="ffn.down_proj",  # the residual is added inside
        z="attn.out_proj",
    ),
    "nemotron_h": Places(attention="mixer", attn_out="mixer", mlp=None, mlp_out=None),
    "olmo2": SANDWICH,
    "olmo3": SANDWICH,
    "olmo_hybrid": SANDWICH,
    "opt": FC,
    "opt/post_norm": replace(FC, attn_out=None, mlp_out=None),
    "stablelm/parallel": replace(LLAMA, by_side=True),
    "phi": replace(LLAMA, by_side=True),
    "recurrent_gemma": Places(
        attention="temporal_block",
        attn_out="temporal_block",
        mlp="mlp_block",
        mlp_out="mlp_block",
        z="temporal_block.o_proj",
    ),
    "rembert": replace(BERT, layers="rembert.encoder.layer"),
    "roberta": replace(BERT, layers="roberta.encoder.layer"),
    "roberta-prelayernorm": replace(PRE_BERT, layers="roberta_prelayernorm.encoder.layer"),
    "roc_bert": replace(BERT, layers="roc_bert.encoder.layer"),
    "roformer": replace(BERT, layers="roformer.encoder.layer"),
    "xglm": FC,
    "xlm-roberta": replace(BERT, layers="roberta.encoder.layer"),
    "xlm-roberta-xl": replace(PRE_BERT, layers="roberta.encoder.layer"),
    "xmod": replace(BERT, layers="roberta.encoder.layer"),
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "trocr", "whisper"),
        ),
        FC,
    ),
    "prophetnet": Places(layers="prophetnet.decoder.layers", mlp="feed_forward", mlp_out="feed_forward"),
}
"""What is not Llama's. bart and mbart and their likes are pre- and post-norm: see `FC`, and the suite's verdict."""


def places(model_type: str) -> Places:
    """Of a type, or of a variant `type/what`."""
    return PLACES.get(model_type) or PLACES.get(model_type.partition("/")[0], LLAMA)
