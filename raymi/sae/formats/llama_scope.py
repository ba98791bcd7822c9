"""Llama Scope: `hyperparams.json` beside `checkpoints/final.safetensors`, with one threshold for all features.

Inputs and outputs are scaled by the average norms of the dataset. The published threshold is in the units of unscaled
activations, so it is scaled too; a transcoder's output has a norm, and so a factor, of its own. Features
are compared with it without the lengths of their decoder rows. With `sparsity_include_decoder_norm` the library that
trained them multiplies by these first, so that rows that are not of length 1 are refused (SAELens does not tell them
apart); all that is published has rows of length 1.
"""

from pathlib import Path
from typing import cast

from raymi.errors import UserError
from raymi.sae.description import Description, Normalisation, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, has, member, named
from raymi.sae.source import Config, Source

_WEIGHTS = "checkpoints/final.safetensors"
_NORMALISATIONS = {
    "dataset-wise": "expected_average_only_in",
    "token-wise": "constant_norm_rescale",
    "inference": "none",
    None: "none",
}


def _describe(source: Source, file: Path) -> Description:
    config = Config.read(source.folder / "hyperparams.json")
    if config.text("act_fn") != "jumprelu":
        raise config.refuse("act_fn", "'jumprelu'")
    if config.flag("use_glu_encoder", default=False):
        raise config.refuse("use_glu_encoder", "false")
    normalisation = _NORMALISATIONS.get(config.text("norm_activation") or "dataset-wise")
    if normalisation is None:
        raise config.refuse("norm_activation", ", ".join(repr(name) for name in _NORMALISATIONS if name))
    threshold = config.number("jump_relu_threshold")
    if threshold is None:
        raise UserError(f"{config.file}: jump_relu_threshold is missing")
    found = members(file)
    d_sae, d_in = member(file, found, "encoder.weight").shape
    d_out = member(file, found, "decoder.weight").shape[0]
    scales = (1.0, 1.0)
    if normalisation == "expected_average_only_in":
        scales = (_scale(config, "in", d_in), _scale(config, "out", d_out))
    site, site_out = config.text("hook_point_in"), config.text("hook_point_out")
    name = source.path.split("/")[-1] or source.folder.name
    return Description(
        format="llama-scope",
        file=file,
        architecture="jumprelu" if site_out in (None, site) else "jumprelu_transcoder",
        activation="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        dtype=found["encoder.weight"].dtype,
        tensors=named(
            W_enc=Stored("encoder.weight", "transposed"),
            W_dec=Stored("decoder.weight", "transposed"),
            b_enc="encoder.bias",
            b_dec="decoder.bias",
        ),
        constant_threshold=threshold * scales[0],
        model_id="meta-llama/Llama-3.1-8B" if name.startswith("Llama3_1-8B-Base") else None,
        site=site,
        of_lens=True,
        site_out=None if site_out == site else site_out,
        unit_decoder_required=config.flag("sparsity_include_decoder_norm", default=False),
        heads_joined=(site or "").endswith("hook_z"),
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder", default=False),
        normalisation=cast(Normalisation, normalisation),
        input_scale=scales[0],
        output_scale=scales[1],
        context_size=1024,
        prepend_bos=True,
        source=str(source),
        revision=source.revision,
    )


def _scale(config: Config, side: str, width: int) -> float:
    norm = config.part("dataset_average_activation_norm").number(side)
    if not norm:
        raise UserError(f"{config.file}: dataset_average_activation_norm.{side} is missing")
    return width**0.5 / norm


FORMAT = Format("llama-scope", has(_WEIGHTS, "hyperparams.json"), _describe)
