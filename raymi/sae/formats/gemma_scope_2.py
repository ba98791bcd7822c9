"""Gemma Scope 2 (Gemma 3): `resid_post/layer_L_width_16k_l0_medium/` with `params.safetensors` and a config."""

import re
from pathlib import Path

from raymi.errors import UserError
from raymi.sae.description import MLP_INPUT, Description, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, has, member, named
from raymi.sae.source import Config, Source

_REPO = re.compile(r"gemma-scope-2-[^/]*/?")
_SITES = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",  # the input of o_proj, whatever the folder says
    "mlp_out": "hook_mlp_out",
    "transcoder": MLP_INPUT,
}


_HOOKS = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "transcoder",
}
"""Below a layer, as the configs write them."""


def _describe(source: Source, file: Path) -> Description:
    place, own = source.place, _own(source.place)
    config_file = source.folder / "config.json"
    config = Config.read(config_file) if config_file.is_file() else Config(config_file, {})
    for part in own.split("/"):
        if part.startswith(("clt", "crosscoder")):
            raise UserError(f"{file}: a {part.split('_')[0]} is not supported: it spans several layers")
    if config.text("architecture") not in (None, "jump_relu"):
        raise config.refuse("architecture", "'jump_relu'")
    found = members(file)
    encoder, decoder = member(file, found, "w_enc"), member(file, found, "w_dec")
    layer, kind = _where(config, own)
    transcoder = kind == "transcoder" or config.text("hf_hook_point_out") not in (None, config.text("hf_hook_point_in"))
    _check_predicted(config, layer, transcoder=transcoder)
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
        site=f"blocks.{layer}.{_SITES[kind]}" if layer is not None and kind else None,
        site_out=f"blocks.{layer}.hook_mlp_out" if layer is not None and transcoder else None,
        heads_joined=kind == "attn_out",
        context_size=1024,
        prepend_bos=True,
        source=str(source),
        revision=source.revision,
    )


def _own(place: str) -> str:
    """What of a path can be about the autoencoder: behind the repository's name, or the last two folders."""
    repo = _REPO.search(place)
    return place[repo.end() :] if repo else "/".join(place.split("/")[-2:])


def _where(config: Config, own: str) -> tuple[int | None, str | None]:
    """Layer and kind, as the config says, else the path; they must not contradict each other."""
    layers = re.findall(r"layer_(\d{1,6})", own)
    of_path = int(layers[-1]) if layers else None, next((kind for kind in _SITES if kind in own), None)
    hook = re.search(r"layers\.(\d{1,6})\.(.+)", config.text("hf_hook_point_in") or "")
    stated = (int(hook[1]), _HOOKS.get(hook[2])) if hook else (None, None)
    for said, found in zip(stated, of_path, strict=True):
        if None not in (said, found) and said != found:
            raise UserError(
                f"{config.file}: hf_hook_point_in is {config.text('hf_hook_point_in')!r}, "
                f"which contradicts its folder {own!r}",
                hint="Put the files where they belong, or correct the config.",
            )
    layer, kind = (found if said is None else said for said, found in zip(stated, of_path, strict=True))
    return layer, kind  # pyright: ignore[reportReturnType]


def _check_predicted(config: Config, layer: int | None, *, transcoder: bool) -> None:
    """Whether a transcoder predicts its own layer's MLP, as all do that are published."""
    said = config.text("hf_hook_point_out")
    hook = re.search(r"layers\.(\d{1,6})\.(.+)", said or "")
    if transcoder and said is not None and (hook is None or (int(hook[1]), _HOOKS.get(hook[2])) != (layer, "mlp_out")):
        raise config.refuse("hf_hook_point_out", f"'model.layers.{layer}.post_feedforward_layernorm.output'")


def _model(place: str, stated: str | None) -> str | None:
    """The configs write gemma-v3-1b-pt, and the hub's smallest model has no -pt in its name."""
    repo = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", place)
    name = stated.replace("-v3", "-3").split("/")[-1] if stated else f"gemma-3-{repo[1]}" if repo else None
    if name is None:
        return None
    return f"google/{name.replace('-pt', '') if '270m' in name else name}"


FORMAT = Format("gemma-scope-2", has("params.safetensors"), _describe)
