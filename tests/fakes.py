"""Fake Hugging Face caches in the standard layout, with models small enough to make by the hundred.

cache/models--ORG--NAME/refs/main
cache/models--ORG--NAME/snapshots/<40 hex>/config.json -> ../../blobs/<sha256>
cache/models--ORG--NAME/blobs/<sha256>
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
WORDS = ["<unk>", "<s>", "</s>", "The", "capital", "of", "France", "Spain", "Italy", "Peru", "is", "Paris", "Madrid",
         "Rome", "Lima", "the", "a", "and", "in", "to", "on", "it", "was", "with", "for", "that", "at", "by", "he",
         "she", "they", "we"]  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"},
}
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}


def llama_shapes(config: Mapping[str, Any] = LLAMA) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a tied Llama with this config, as `transformers` expects them."""
    d, ff = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "mlp.gate_proj.weight": (ff, d),
        "mlp.up_proj.weight": (ff, d),
        "mlp.down_proj.weight": (d, ff),
    }
    layers = {f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in layer.items()}
    return {"model.embed_tokens.weight": (config["vocab_size"], d), **layers, "model.norm.weight": (d,)}


def safetensors(shapes: Shapes, *, dtype: str = "F32", seed: int = 0, scale: float = 0.1) -> bytes:
    """A safetensors file of random numbers; `dtype` is F32, F16, BF16, or anything of one byte (zeros)."""
    rng = np.random.default_rng(seed)
    header: dict[str, Any] = {}
    data = b""
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        match dtype:
            case "F32":
                raw = values.tobytes()
            case "F16":
                raw = values.astype(np.float16).tobytes()
            case "BF16":
                raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            case _:
                raw = bytes(values.size)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def add_files(
    cache: Path,
    id: str,
    files: Mapping[str, bytes | str | Mapping[str, Any]],
    *,
    revision: str | None = None,
    refs: Sequence[str] = ("main",),
) -> Path:
    """Puts files into the cache as one snapshot (a mapping is written as JSON) and returns the snapshot's folder."""
    repo = cache / f"models--{id.replace('/', '--')}"
    revision = revision or hashlib.sha1(id.encode()).hexdigest()
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for ref in refs:
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(revision)
    (repo / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        data = json.dumps(content).encode() if isinstance(content, Mapping) else content
        data = data.encode() if isinstance(data, str) else data
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    return snapshot


def add_model(
    cache: Path,
    id: str,
    config: Mapping[str, Any] = LLAMA,
    *,
    revision: str | None = None,
    refs: Sequence[str] = ("main",),
    tensors: Shapes | None = None,
    dtype: str = "F32",
    scale: float = 0.1,
    shards: int = 1,
    tokenizer: bool = True,
    files: Mapping[str, bytes | str | Mapping[str, Any]] | None = None,
) -> Path:
    """Puts a model into the cache and returns its snapshot's folder.

    Args:
        config: config.json; the default is a Llama of 2 layers that `transformers` loads.
        revision: the commit, 40 hex digits; by default made from the id.
        refs: the branches and tags that point to it.
        tensors: names and shapes of the weights; by default those of a Llama. Empty: no weight file at all.
        scale: of the weights; from 0.5 on, attention matters to the logits.
        shards: with more than one, an index and that many files.
        tokenizer: whether there is one (32 words, split at blanks).
        files: more files, or others in place of those above.
    """
    shapes = llama_shapes() if tensors is None else tensors
    out: dict[str, bytes | str | Mapping[str, Any]] = {"config.json": config}
    if tokenizer:
        out |= {"tokenizer.json": TOKENIZER, "tokenizer_config.json": TOKENIZER_CONFIG}
    if shards == 1 and shapes:
        out["model.safetensors"] = safetensors(shapes, dtype=dtype, scale=scale)
    elif shapes:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        place = {tensor: names[i % shards] for i, tensor in enumerate(shapes)}
        for i, name in enumerate(names):
            part = {tensor: shapes[tensor] for tensor in shapes if place[tensor] == name}
            out[name] = safetensors(part, dtype=dtype, seed=i, scale=scale)
        out["model.safetensors.index.json"] = {"metadata": {}, "weight_map": place}
    return add_files(cache, id, out | dict(files or {}), revision=revision, refs=refs)


def add_folder(cache: Path, id: str, folder: Path, *, revision: str | None = None) -> Path:
    """Puts a folder written by `save_pretrained` into the cache and returns the snapshot's folder."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    return add_files(cache, id, files, revision=revision)


def sae_files(
    site: str, *, d_in: int = LLAMA["hidden_size"], d_sae: int = 40, model: str = "tiny", seed: int = 0, **config: Any
) -> dict[str, bytes | str | Mapping[str, Any]]:
    """The files of an autoencoder in SAELens's format, by name; `config` are fields of cfg.json to add or replace."""
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    metadata = {"sae_lens_version": "6.54.12", "model_name": model, "hook_name": site}
    about = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "metadata": metadata}
    return {"sae_weights.safetensors": safetensors(shapes, seed=seed, scale=1.0), "cfg.json": about | config}


def add_saes(cache: Path, id: str, saes: Mapping[str, str], **options: Any) -> Path:
    """Puts a repository of autoencoders into the cache: path -> site; `options` are those of `sae_files`."""
    revision = options.pop("revision", None)
    files = {
        f"{path}/{name}": content
        for seed, (path, site) in enumerate(saes.items())
        for name, content in sae_files(site, **{"seed": seed, **options}).items()
    }
    return add_files(cache, id, files, revision=revision)


def write_sae(folder: Path, site: str, **options: Any) -> Path:
    """An autoencoder in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sae_files(site, **options).items():
        data = json.dumps(content).encode() if isinstance(content, Mapping) else content
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder
