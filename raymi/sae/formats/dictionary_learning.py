"""dictionary_learning: `ae.pt`, a pickle of which only tensors are read, and `config.json`, which names the class."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raymi.errors import UserError
from raymi.sae.description import MLP_INPUT, Activation, Description, Stored
from raymi.sae.formats.base import Format, has, named, need_k, straight
from raymi.sae.source import Config, Source


@dataclass(frozen=True, slots=True)
class _Class:
    """What one class of the library computes."""

    architecture: str
    activation: Activation
    tensors: Mapping[str, Stored]
    centred: bool = True
    """Whether it subtracts the decoder's bias from its input."""
    ignored: tuple[str, ...] = ()
    unit_decoder: bool = False


_LINEAR = {"W_enc": Stored("encoder.weight", "transposed"), "W_dec": Stored("decoder.weight", "transposed")}
_OWN = straight("W_enc", "W_dec", "b_enc", "b_dec")
_BIASED = {**_LINEAR, **named(b_enc="encoder.bias", b_dec="b_dec")}
_SCALAR = {"threshold": Stored("threshold", "scalar")}
_CLASSES = {
    # The library's own loader brings this one's decoder to unit norm.
    "AutoEncoder": _Class(
        "standard", "relu", {**_LINEAR, **named(b_enc="encoder.bias", b_dec="bias")}, unit_decoder=True
    ),
    "AutoEncoderNew": _Class(
        "standard", "relu", {**_LINEAR, **named(b_enc="encoder.bias", b_dec="decoder.bias")}, centred=False
    ),
    "GatedAutoEncoder": _Class(
        "gated",
        "gated",
        {**_LINEAR, **named(b_gate="gate_bias", b_mag="mag_bias", r_mag="r_mag", b_dec="decoder_bias")},
    ),
    "JumpReluAutoEncoder": _Class("jumprelu", "jumprelu", {**_OWN, **straight("threshold")}, centred=False),
    # It stores a threshold as well, but encodes by each token's k largest.
    "AutoEncoderTopK": _Class("topk", "topk", _BIASED, ignored=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", "jumprelu", {**_BIASED, **_SCALAR}, ignored=("k",)),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", "jumprelu", {**_OWN, **_SCALAR}, ignored=("k", "group_sizes")),
}
_OUTPUTS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}
_INPUTS = {"resid_post": "hook_resid_pre", "mlp_out": MLP_INPUT}
"""What the library calls a module -> what it gives, and what it is given."""


def _describe(source: Source, file: Path) -> Description:
    config = Config.read(source.folder / "config.json")
    trainer = config.part("trainer")
    kind = _CLASSES.get(trainer.text("dict_class") or "")
    if kind is None:
        raise trainer.refuse("dict_class", ", ".join(_CLASSES))
    site, site_out = _sites(config, trainer)
    d_in, d_sae = trainer.integer("activation_dim"), trainer.integer("dict_size")
    if d_in is None or d_sae is None:
        raise UserError(f"{config.file}: trainer.activation_dim and trainer.dict_size are needed")
    return Description(
        format="dictionary_learning",
        file=file,
        architecture=kind.architecture + ("_transcoder" if _io(config) == "in_and_out" else ""),
        activation=kind.activation,
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_in,
        dtype="float32",
        tensors=kind.tensors,
        ignored=kind.ignored,
        k=need_k(config, trainer.integer("k")) if kind.activation == "topk" else None,
        model_id=trainer.text("lm_name"),
        site=site,
        site_out=site_out,
        of_modules=True,
        apply_b_dec_to_input=kind.centred,
        unit_decoder=kind.unit_decoder,
        context_size=config.part("buffer").integer("ctx_len"),
        source=str(source),
        revision=source.revision,
    )


def _io(config: Config) -> str:
    """Which side of a module the activations came from; `in_and_out` predicts one from the other."""
    io = config.part("buffer").text("io") or "out"
    if io not in ("in", "out", "in_and_out"):
        raise config.part("buffer").refuse("io", "'in', 'out' and 'in_and_out'")
    return io


def _sites(config: Config, trainer: Config) -> tuple[str | None, str | None]:
    """Where the input comes from and, for a transcoder, what it predicts; None where the files do not say."""
    io = _io(config)
    match = re.search(r"(resid_post|mlp_out|attention_out)_layer_(\d{1,6})", trainer.text("submodule_name") or "")
    if match is None:
        return None, None
    given, gave = (f"blocks.{match[2]}.{of[match[1]]}" if match[1] in of else None for of in (_INPUTS, _OUTPUTS))
    if io == "out":
        return gave, None
    return given, gave if io == "in_and_out" else None


FORMAT = Format("dictionary_learning", has("ae.pt", "config.json"), _describe)
