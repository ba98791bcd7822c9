"""SAELens: `cfg.json` and `sae_weights.safetensors`, before version 6 (a flat config) and from it on."""

import re
from pathlib import Path
from typing import cast, get_args

from raymi.errors import UserError
from raymi.sae.description import Activation, Description, Normalisation, Stored
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
        k=need_k(config, _k(config)) if activation == "topk" else None,
        model_id=config.text("model_name"),
        site=hook,
        site_out=config.text("hook_name_out") if transcoder else None,
        head=config.integer("hook_head_index"),
        heads_joined=joined == "hook_z" or (old and joined is None and "hook_z" in (hook or "")),
        apply_b_dec_to_input=not transcoder and config.flag("apply_b_dec_to_input", default=True),
        normalisation=_normalisation(config),
        rescale_by_decoder_norm=activation == "topk" and config.flag("rescale_acts_by_decoder_norm", default=False),
        context_size=config.integer("context_size"),
        prepend_bos=config.flag("prepend_bos", default=True) if old else config.values.get("prepend_bos"),
        source=str(source),
        revision=source.revision,
    )


def _before_6(config: Config) -> bool:
    metadata = config.part("metadata")
    version = config.values.get("sae_lens_version") or metadata.values.get("sae_lens_version")
    number = re.match(r"\d+", str(version)) if version else None
    # What is installed from a checkout may have a version of any form; the nested part came with version 6.
    return int(number[0]) < 6 if number else not (version and metadata.values)


def _architecture(config: Config, *, old: bool) -> tuple[str, Activation]:
    architecture = config.text("architecture") or "standard"
    if old and architecture == "standard":
        function = config.text("activation_fn") or "relu"
        if function == "topk":
            architecture = "topk"
        elif function != "relu":
            raise config.refuse("activation_fn", "'relu' and 'topk'")
    if architecture in _TRAINING_ONLY:
        raise UserError(
            f"{config.file}: architecture {architecture!r} is a training checkpoint",
            hint="SAELens's save_inference_model() writes what can be used: its threshold, as JumpReLU.",
        )
    if architecture not in _ACTIVATIONS:
        raise config.refuse("architecture", ", ".join(_ACTIVATIONS))
    return architecture, _ACTIVATIONS[architecture]


def _k(config: Config) -> int | None:
    """Before version 6 it is an argument of the activation function."""
    k = config.integer("k")
    return config.part("activation_fn_kwargs").integer("k") if k is None else k


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
