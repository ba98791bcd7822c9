"""Gemma Scope 2 (Gemma 3): `resid_post/layer_L_width_16k_l0_medium/` with `params.safetensors` and a config."""

import re
from pathlib import Path

from raymi.errors import UserError
from raymi.sae.description import MLP_INPUT, Description, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, has, member, named
from raymi.sae.source import Config, Source

_SITES = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",  # the input of o_proj, whatever the folder says
    "mlp_out": "hook_mlp_out",
    "transcoder": MLP_INPUT,
}


def _describe(source: Source, file: Path) -> Description:
    place = source.place
    config_file = source.folder / "config.json"
    config = Config.read(config_file) if config_file.is_file() else Config(config_file, {})
    for part in place.split("/"):
        if part.startswith(("clt", "crosscoder")):
            raise UserError(f"{file}: a {part.split('_')[0]} is not supported: it spans several layers")
    if config.text("architecture") not in (None, "jump_relu"):
        raise config.refuse("architecture", "'jump_relu'")
    found = members(file)
    encoder, decoder = member(file, found, "w_enc"), member(file, found, "w_dec")
    layer, kind = re.search(r"layer_(\d+)", place), next((kind for kind in _SITES if kind in place), None)
    transcoder = kind == "transcoder" or config.text("hf_hook_point_out") not in (None, config.text("hf_hook_point_in"))
    skip = config.flag("affine_connection", default=False) or "affine_skip_connection" in found
    tensors = named(W_enc="w_enc", W_dec="w_dec", b_enc="b_enc", b_dec="b_dec", threshold="threshold")
    if skip:
        tensors["W_skip"] = Stored("affine_skip_connection", "transposed")
    return Description(
        format="gemma-scope-2",
        file=file,
        architecture="jumprelu" + ("_skip" if skip else "") + ("_transcoder" if transcoder else ""),
        activation="jumprelu",
        d_in=encoder.shape[0],
        d_sae=encoder.shape[1],
        d_out=decoder.shape[1],
        dtype=encoder.dtype,
        tensors=tensors,
        model_id=_model(place, config.text("model_name")),
        site=f"blocks.{layer[1]}.{_SITES[kind]}" if layer and kind else None,
        site_out=f"blocks.{layer[1]}.hook_mlp_out" if layer and transcoder else None,
        heads_joined=kind == "attn_out",
        context_size=1024,
        prepend_bos=True,
        source=str(source),
        revision=source.revision,
    )


def _model(place: str, stated: str | None) -> str | None:
    """The configs write gemma-v3-1b-pt, and the hub's smallest model has no -pt in its name."""
    repo = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", place)
    name = stated.replace("-v3", "-3").split("/")[-1] if stated else f"gemma-3-{repo[1]}" if repo else None
    if name is None:
        return None
    return f"google/{name.replace('-pt', '') if '270m' in name else name}"


FORMAT = Format("gemma-scope-2", has("params.safetensors"), _describe)
