"""What the files of one snapshot say about the model in it, read without torch or transformers.

Importing anything of `transformers.models.auto` imports torch, which takes seconds, so config.json and the headers of
the safetensors files are read here, and the types of model that exist in the source of the installed transformers.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from raymi import parts

CONFIG = "config.json"
TOKENIZERS: tuple[set[str], ...] = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"tekken.json"},
)
"""Any one of these sets of files is a tokenizer."""
_SMALL_FILES = set[str]().union(*TOKENIZERS) | {
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
}
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

NAMES = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
}
"""The names that the families give to the same thing, the commonest first."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
           "BOOL": "bool"}  # fmt: skip
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
"""Kinds of layers that have none. Of a kind that is not listed it is assumed; loading the model tells."""
_BUFFERS = ("masked_bias", "inv_freq", "position_ids")
MOST_COUNTED = 1_000
"""Layers, and heads of a layer: whoever writes more than this did not write of a model."""
_ITEMSIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Bytes of a number, of the kinds that are whole bytes."""
_LARGEST_HEADER = 100_000_000  # the format's own limit, in bytes


class DamagedError(Exception):
    """A file that cannot be what its name says. The message fits into a table of models."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a snapshot."""

    files: tuple[str, ...]
    """What `transformers` would load, in the order of the names."""
    pickle: bool
    parameters: int | None
    """Counted once where weights are tied; None for pickles, which are never opened."""
    dtype: str | None
    """The one most of the bytes are in."""
    not_built: tuple[str, ...] = ()
    """Parts beside the language model that loading it leaves out, as far as names tell."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        DamagedError: when it is missing or is not one.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"incomplete snapshot: {file.name} is missing") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"corrupt file: {file.name} is not JSON") from None
    if not isinstance(content, dict):
        raise DamagedError(f"corrupt file: {file.name} is not a JSON object")
    return cast(dict[str, Any], content)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: multimodal models nest it."""
    nested = config.get("text_config")
    return cast(Mapping[str, Any], nested) if isinstance(nested, dict) else config


def sizes(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The sizes that a config states, under raymi's names for them (the keys of `NAMES`).

    What the config leaves to its class is looked up there (Gemma 3's name no heads); key-value heads, head and
    feed-forward sizes then follow from the others as is customary.
    """
    text = text_config(config)
    found = {size: _possible(first_int(text, names)) for size, names in NAMES.items()}
    essential = (found["n_layers"], found["n_heads"], found["vocab_size"])
    if text is not config or None in essential:  # a nested config leaves out whatever equals its class's default
        defaults = config_defaults(model_type(config), model_type(text))
        found = {size: number or first_int(defaults, NAMES[size]) for size, number in found.items()}
    found["n_layers"] = found["n_layers"] or _listed_layers(text)
    found["n_heads"] = found["n_heads"] or _possible(_listed_heads(text))
    if max(found["n_layers"] or 0, found["n_heads"] or 0) > MOST_COUNTED:  # nothing is to be made of each of them
        found["n_layers"] = found["n_heads"] = None
    heads, hidden = found["n_heads"], found["hidden_size"]
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        found["n_kv_heads"] = 1
    found["n_kv_heads"] = found["n_kv_heads"] or heads
    if heads and hidden:
        found["head_dim"] = found["head_dim"] or hidden // heads
    if hidden:
        found["intermediate_size"] = found["intermediate_size"] or 4 * hidden
    return found


def _possible(size: int | None) -> int | None:
    """A size, if it is one."""
    return size if size is not None and 0 < size < 2**40 else None


def attention_layers(config: Mapping[str, Any], n_layers: int | None) -> tuple[int, ...] | None:
    """The layers that have attention, ascending; None: all of them, as far as the config tells.

    Layers that are recurrent, convolutional or of linear attention have none, nor have those that are only an MLP.
    """
    has = _has_attention(text_config(config))
    layers = tuple(layer for layer in range(n_layers or 0) if has(layer))
    return None if len(layers) == (n_layers or 0) else layers


def _has_attention(text: Mapping[str, Any]) -> Callable[[int], bool]:
    """What tells of a layer whether it has attention, by the names that the families give to it."""
    match text:
        # The last of these may be shorter than the model: it begins anew.
        case (
            {"layer_types": [_, *_] as kinds}
            | {"layers_block_type": [_, *_] as kinds}
            | {"block_types": [_, *_] as kinds}
        ):
            return lambda layer: kinds[layer % len(kinds)] not in _WITHOUT_ATTENTION
        case {"hybrid_override_pattern": str(pattern)} if pattern:
            return lambda layer: pattern[layer % len(pattern)] == "*"
        case {"attn_layer_indices": [*indices]} | {"full_attn_idxs": [*indices]}:
            return lambda layer: layer in indices
        case {"attn_layer_period": int(period), "attn_layer_offset": int(offset)} if period > 0:
            return lambda layer: layer % period == offset
        case {"full_attention_interval": int(interval)} | {"layer_group_size": int(interval)} if interval > 0:
            return lambda layer: (layer + 1) % interval == 0
        case {"linear_attn_config": {"full_attn_layers": [*numbers]}}:  # counted from 1
            return lambda layer: layer + 1 in numbers
        case {"block_configs": [{"attention": dict()}, *_] as blocks}:
            return lambda layer: not blocks[layer % len(blocks)]["attention"].get("no_op")
        case _:
            return lambda _: True


def _listed_layers(text: Mapping[str, Any]) -> int | None:
    """How many layers a config lists that does not say their number."""
    match text:
        case {"layers_block_type": [_, *_] as kinds} | {"hybrid_override_pattern": str(kinds)}:
            return len(kinds) or None
        case _:
            return None


LISTED_HEADS = ("num_attention_heads", "num_query_heads", "num_attention_heads_per_layer")
"""What configs call a list of the heads of each layer."""


def _listed_heads(text: Mapping[str, Any]) -> int | None:
    """Heads of the first layer, where a config has only a list of them."""
    listed = (text.get(name) for name in LISTED_HEADS)
    return next((each[0] for each in listed if isinstance(each, list) and each and type(each[0]) is int), None)


def files_needed(names: Collection[str]) -> list[str]:
    """Of the files of a repository, those that are needed to run its model; the weights in one form only."""
    stem = weights_stem(names)
    weight_files = re.compile("$^")
    if stem is not None:
        name, extension = stem.split(".")
        shards = rf"{name}-\d+-of-\d+\.{extension}|{stem}\.index\.json"
        weight_files = re.compile(stem if stem in names else shards)
    return [
        name
        for name in sorted(names)
        if name in _SMALL_FILES
        or weight_files.fullmatch(name)
        or (name.endswith((".tiktoken", ".py")) and "/" not in name)  # code runs only for those who ask for it by name
    ]


def weights_stem(names: Collection[str]) -> str | None:
    """Which of the forms of the weights among these files `transformers` would load: SAFETENSORS, PICKLE or none."""
    return next((stem for stem in (SAFETENSORS, PICKLE) if stem in names or f"{stem}.index.json" in names), None)


def weights(folder: Path, present: set[str], config: Mapping[str, Any]) -> Weights:
    """Finds the weight files of a snapshot and reads the headers of those in safetensors format.

    Raises:
        DamagedError: when files are missing, or a header or a file's length does not fit.
    """
    stem = weights_stem(present)
    if stem is None:
        raise DamagedError("incomplete snapshot: it holds no weights")
    files = (stem,) if stem in present else _shards(folder / f"{stem}.index.json", present)
    if stem == PICKLE:
        return Weights(files, pickle=True, parameters=None, dtype=_config_dtype(config))
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors |= safetensors_header(folder / file)
    try:
        return Weights(files, False, _parameters(tensors, config), _stored_dtype(tensors), _not_built(tensors, config))
    except (ValueError, TypeError, AttributeError):
        raise DamagedError(f"corrupt file: the header of {files[0]} does not describe tensors") from None


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises:
        DamagedError: when the header cannot be read, or the file is not as long as its header says.
    """
    corrupt = DamagedError(f"corrupt file: {file.name} is not in safetensors format")
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > _LARGEST_HEADER or size < 8:
                raise corrupt
            raw = stream.read(length)
    except OSError as error:
        raise DamagedError(f"incomplete snapshot: {file.name} cannot be read ({error.strerror})") from None
    if len(raw) < length:
        raise DamagedError(f"truncated file: {file.name} ends within its header")
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        if not all(map(_is_tensor, header.values())):
            raise DamagedError(f"corrupt file: the header of {file.name} does not describe tensors")
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise corrupt from None
    if size < expected:
        raise DamagedError(f"truncated file: {file.name} has {size:,} of {expected:,} bytes")
    if size > expected:
        raise corrupt
    return header


def _is_tensor(tensor: Mapping[str, Any]) -> bool:
    """Whether an entry of a header describes one; raises what it likes where it is of another form."""
    (begin, end), shape = tensor["data_offsets"], tensor["shape"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        return False
    itemsize = _ITEMSIZES.get(tensor["dtype"])
    return begin <= end and (itemsize is None or math.prod(shape) * itemsize == end - begin)


def tokenizer_present(present: set[str]) -> bool:
    """Whether the files of a snapshot include a tokenizer."""
    return any(files <= present for files in TOKENIZERS) or any(name.endswith(".tiktoken") for name in present)


def model_type(config: Mapping[str, Any]) -> str | None:
    """The family, as the config names it."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def unloadable(config: Mapping[str, Any], *, remote_code: bool) -> str | None:
    """Why `transformers` cannot load a model with this config as a causal language model, or None.

    Args:
        config: the content of config.json.
        remote_code: whether code in the snapshot may be run.
    """
    kind, architectures = model_type(config), _architectures(config)
    if needs_remote_code(config):
        return None if remote_code else "needs remote code"
    if kind is None:
        return "unknown type: config.json names no model_type"
    causal = causal_types()
    if kind not in causal:
        return f"not a causal LM ({kind})" if kind in known_types() else f"unknown type: {kind}"
    for field, part in (("return_dict", config), ("text_config.return_dict", text_config(config))):
        if part.get("return_dict", True) is not True:  # what a model gives is then a tuple without names
            return f"config.json has {field}: {json.dumps(part['return_dict'])}, where true is needed"
    if config.get("is_encoder_decoder") is True:
        return f"not a causal LM ({kind} is an encoder and a decoder)"
    accepted = [
        "ForCausalLM",
        "LMHeadModel",
        causal[kind],
        *(["ForConditionalGeneration"] if "text_config" in config else []),
    ]
    if architectures and not any(name.endswith(tuple(accepted)) for name in architectures):
        return f"not a causal LM ({architectures[0]})"
    method = _quantisation(config)
    return f"quantised weights ({method}) are not supported" if method else None


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether only code that comes with the snapshot knows this type of causal language model."""
    auto_map = config.get("auto_map")
    brings_code = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    return brings_code and model_type(config) not in causal_types()


@cache
def causal_types() -> dict[str, str]:
    """model_type -> class, of the causal language models that the installed transformers knows."""
    return _mapping("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@cache
def known_types() -> frozenset[str]:
    """Every model_type that the installed transformers knows."""
    return frozenset(_mapping("MODEL_MAPPING_NAMES")) | frozenset(causal_types())


@cache
def config_defaults(kind: str | None, text_kind: str | None) -> dict[str, Any]:
    """The defaults of a family's config class, by field, as the source of transformers states them.

    Args:
        kind: the model_type, which names the folder of the family.
        text_kind: the model_type of the class asked for; a nested text config may have its own.
    """
    if kind not in causal_types():
        return {}
    folder = _transformers() / "models" / kind.replace("-", "_")
    for file in folder.glob("configuration_*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            fields = _literal_fields(node) if isinstance(node, ast.ClassDef) else {}
            if fields.get("model_type") == text_kind:
                return fields
    return {}


def _transformers() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed")
    return Path(spec.origin).parent


@cache
def _modeling_auto() -> str:
    return (_transformers() / "models" / "auto" / "modeling_auto.py").read_text("utf-8")


def _mapping(name: str) -> dict[str, str]:
    # Parsing the one statement instead of the whole file saves 40 ms of every `raymi models`.
    statement = re.search(rf"^{name} = OrderedDict\((.*?)^\)", _modeling_auto(), re.MULTILINE | re.DOTALL)
    if statement is None:
        raise RuntimeError(f"the installed transformers has no {name} where raymi looks for it")
    pairs: list[tuple[str, str | tuple[str, ...]]] = ast.literal_eval(statement[1].strip())
    return {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in pairs}


def _literal_fields(node: ast.ClassDef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value)):
                fields[name] = value
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                fields[name] = value
            case _:
                pass
    return fields


def _shards(index: Path, present: set[str]) -> tuple[str, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"corrupt file: {index.name} names no weights")
    files = tuple(sorted({str(file) for file in cast(dict[str, Any], weight_map).values()}))
    missing = [file for file in files if file not in present]
    if missing:
        raise DamagedError(f"incomplete snapshot: {len(missing)} of {len(files)} weight files missing ({missing[0]})")
    return files


def _parameters(tensors: dict[str, dict[str, Any]], config: Mapping[str, Any]) -> int:
    """Counts tied weights once, and not the constants that older checkpoints store (GPT-2's masks: [1, 1, n, n])."""
    shapes: dict[str, list[int]] = {name: tensor["shape"] for name, tensor in tensors.items()}
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings")) is True
    head = next((name for name in shapes if name.endswith("lm_head.weight")), None)
    if tied and head and list(shapes.values()).count(shapes[head]) > 1:
        del shapes[head]
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if not name.endswith(_BUFFERS) and not (len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3])
    )


def _not_built(tensors: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    named = causal_types().get(model_type(config) or "", "")
    return parts.beside(tensors, sizes(config)["n_layers"], media_built=named.endswith("ForConditionalGeneration"))


def _stored_dtype(tensors: dict[str, dict[str, Any]]) -> str | None:
    """The one that most of the bytes are in."""
    stored: dict[str, int] = {}
    for tensor in tensors.values():
        begin, end = tensor["data_offsets"]
        stored[tensor["dtype"]] = stored.get(tensor["dtype"], 0) + end - begin
    most = max(stored, key=stored.__getitem__, default="")
    return _DTYPES.get(most, most) or None


def first_int(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in cast(list[Any], named)] if isinstance(named, list) else []


def _quantisation(config: Mapping[str, Any]) -> str | None:
    stated = config.get("quantization_config", text_config(config).get("quantization_config"))
    if not stated:
        return None
    return str(cast(dict[str, Any], stated).get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"


def _config_dtype(config: Mapping[str, Any]) -> str | None:
    for part in (config, text_config(config)):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part.get(name), str):
                return part[name]
    return None
