"""SAELens: `cfg.json` and `sae_weights.safetensors`, before version 6 (a flat config) and from it on."""

import re
from pathlib import Path
from typing import cast, get_args

from raymi.errors import UserError
from raymi.sae.description import OF_STREAM, Activation, Description, Normalisation, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, member, need_k, straight
from raymi.sae.source import Config, Source

_WEIGHTS = ("sae_weights.safetensors", "model.safetensors")
_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
_CENTRED = (
    "jbloom/GPT2-Small-SAEs-Reformatted",
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "tommmcgrath/gpt2-small-mlp-out-saes",
)
"""Repositories whose files do not say what SAELens's own list says of them: trained on centred activations."""
_HOW_NOT_WHAT = ("device", "device_map", "n_devices", "dtype", "torch_dtype", "trust_remote_code", "low_cpu_mem_usage",
                 "attn_implementation", "cache_dir", "local_files_only", "move_to_device")  # fmt: skip
"""Options of loading a model that decide how it computes, and not what."""
_FUNCTIONS = {"standard": "relu", "jumprelu": "relu", "gated": "relu", "topk": "topk"}
"""Before version 6: architecture -> the activation function that may stand beside it."""
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def _file(source: Source) -> Path | None:
    if not source.has("cfg.json"):
        return None
    return next((source.folder / name for name in _WEIGHTS if source.has(name)), None)


def _describe(source: Source, file: Path) -> Description:
    raw = Config.read(source.folder / "cfg.json")
    old = _before_6(raw)
    about = raw if old else raw.part("metadata")
    config = Config(raw.file, {_RENAMED.get(key, key): value for key, value in (raw.values | about.values).items()})
    architecture, activation = _architecture(config, old=old)
    found = members(file)
    encoder, decoder = member(file, found, "W_enc"), member(file, found, "W_dec")
    hook = config.text("hook_name")
    joined = config.text("reshape_activations")
    if joined not in (None, "none", "hook_z"):
        raise config.refuse("reshape_activations", "'none' and 'hook_z'")
    transcoder = "transcoder" in architecture
    centred, of_model = _loading(config, source)
    for name, size in {"d_in": encoder.shape[0], "d_sae": encoder.shape[1], "d_out": decoder.shape[1]}.items():
        if config.integer(name) not in (None, size):
            raise config.refuse(name, f"{size}, as the tensors of {file.name} have it")
    return Description(
        format="saelens<6" if old else "saelens",
        file=file,
        architecture=architecture,
        activation=activation,
        d_in=encoder.shape[0],
        d_sae=encoder.shape[1],
        d_out=decoder.shape[1],
        dtype=encoder.dtype,
        tensors=_tensors(architecture, activation, set(found)),
        must_be_one=("scaling_factor",),
        k=need_k(config, _k(config, old=old)) if activation == "topk" else None,
        model_id=config.text("model_name"),
        site=hook,
        of_lens=True,
        site_out=config.text("hook_name_out") if transcoder else None,
        head=config.integer("hook_head_index"),
        heads_joined=joined == "hook_z" or (old and joined is None and "hook_z" in (hook or "")),
        centred=centred and _in_stream(hook),
        centred_out=centred and _in_stream(config.text("hook_name_out") if transcoder else hook),
        apply_b_dec_to_input=not transcoder and config.flag("apply_b_dec_to_input", default=True),
        normalisation=_normalisation(config),
        rescale_by_decoder_norm=activation == "topk" and config.flag("rescale_acts_by_decoder_norm", default=False),
        context_size=config.integer("context_size"),
        prepend_bos=config.flag("prepend_bos", default=True) if old else _flag(config, "prepend_bos"),
        model_revision=of_model,
        source=str(source),
        revision=source.revision,
        notes=_notes(config),
    )


def _before_6(config: Config) -> bool:
    metadata = config.part("metadata")
    version = config.values.get("sae_lens_version") or metadata.values.get("sae_lens_version")
    number = re.match(r"\d{1,6}", str(version)) if version else None
    # What is installed from a checkout may have a version of any form; the nested part came with version 6.
    return int(number[0]) < 6 if number else not (version and metadata.values)


def _architecture(config: Config, *, old: bool) -> tuple[str, Activation]:
    architecture = config.text("architecture") or "standard"
    function = config.text("activation_fn")
    if old and architecture == "standard" and function == "topk":
        architecture = "topk"
    if old and function not in (None, _FUNCTIONS.get(architecture, "relu")):
        allowed = f"{_FUNCTIONS.get(architecture, 'relu')!r} with architecture {architecture!r}"
        raise config.refuse("activation_fn", allowed if architecture != "standard" else "'relu' and 'topk'")
    if architecture in _TRAINING_ONLY:
        raise UserError(
            f"{config.file}: architecture {architecture!r} is a training checkpoint",
            hint="SAELens's save_inference_model() writes what can be used: its threshold, as JumpReLU.",
        )
    if architecture not in _ACTIVATIONS:
        raise config.refuse("architecture", ", ".join(_ACTIVATIONS))
    return architecture, _ACTIVATIONS[architecture]


def _k(config: Config, *, old: bool) -> int | None:
    """Before version 6 it is an argument of the activation function, which wins over a `k` beside it."""
    of_function = config.part("activation_fn_kwargs").integer("k") if old else None
    return config.integer("k") if of_function is None else of_function


def _flag(config: Config, key: str) -> bool | None:
    return None if config.values.get(key) is None else config.flag(key, default=True)


def _loading(config: Config, source: Source) -> tuple[bool, str | None]:
    """Whether the model was loaded with centred weights, and its revision if one is named.

    Raises:
        UserError: for an option that gives other activations than the model's own.
    """
    options = config.part("model_from_pretrained_kwargs")
    for key, value in options.values.items():
        if key in (*_HOW_NOT_WHAT, "center_writing_weights", "revision") or value in (None, False):
            continue
        raise UserError(
            f"{config.file}: model_from_pretrained_kwargs has {key} {value!r}; raymi knows center_writing_weights",
            hint="Activations of a model that is loaded so are not those of the model as it stands in the cache.",
        )
    centred = options.flag("center_writing_weights", default=source.repo in _CENTRED)
    return centred, options.text("revision")


def _in_stream(hook: str | None) -> bool:
    return (hook or "").split(".")[-1] in OF_STREAM


def _notes(config: Config) -> tuple[str, ...]:
    """What its training left out of texts, which raymi measures whole."""
    keys = ("seqpos_slice", "exclude_special_tokens")
    said = {key: config.values[key] for key in keys if config.values.get(key) not in (None, False, [None], [])}
    return tuple(f"trained with {key} {value!r}" for key, value in said.items())


def _normalisation(config: Config) -> Normalisation:
    found = config.values.get("normalize_activations") or "none"
    if found is True:  # before it had a name
        return "expected_average_only_in"
    if found not in get_args(Normalisation):
        raise config.refuse("normalize_activations", ", ".join(get_args(Normalisation)))
    return cast(Normalisation, found)


def _tensors(architecture: str, activation: Activation, found: set[str]) -> dict[str, Stored]:
    tensors = straight(
        "W_enc", "W_dec", "b_dec", *(["b_gate", "b_mag", "r_mag"] if activation == "gated" else ["b_enc"])
    )
    if activation == "jumprelu":
        logarithm = "log_threshold" in found and "threshold" not in found
        tensors["threshold"] = Stored("log_threshold", "exponential") if logarithm else Stored("threshold")
    if "skip" in architecture:
        tensors["W_skip"] = Stored("W_skip")
    return tensors


FORMAT = Format("saelens", _file, _describe)
