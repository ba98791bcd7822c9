"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `sae.safetensors`; the folder is named like a module of the model.

The decoder is stored as [d_sae, d_in], whatever SAELens's loader believes.
"""

import re
from pathlib import Path

from raymi.errors import UserError
from raymi.sae.description import MLP_INPUT, Description, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, has, member, named, need_k
from raymi.sae.source import Config, Source

_ADDS_TO_RESIDUAL = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".attention": "hook_attn_out",
                     ".self_attn": "hook_attn_out", ".attn": "hook_attn_out"}  # fmt: skip
"""Part of a layer -> what its output is."""


def _describe(source: Source, file: Path) -> Description:
    config = Config.read(source.folder / "cfg.json")
    if config.text("activation") not in (None, "topk"):
        raise config.refuse("activation", "'topk'")
    if config.flag("signed", default=False):
        raise config.refuse("signed", "false")
    found = members(file)
    d_sae, d_in = member(file, found, "encoder.weight").shape
    latents = config.integer("num_latents") or (config.integer("expansion_factor") or 0) * d_in
    if latents and latents != d_sae:
        raise UserError(
            f"{file}: tensor 'encoder.weight' has {d_sae} rows, where {config.file.name} says {latents} latents"
        )
    transcoder, skip = config.flag("transcode", default=False), config.flag("skip_connection", default=False)
    tensors = named(W_enc=Stored("encoder.weight", "transposed"), b_enc="encoder.bias", W_dec="W_dec", b_dec="b_dec")
    if skip:
        tensors["W_skip"] = Stored("W_skip")
    about = Config.read(source.root / "config.json") if (source.root / "config.json").is_file() else None
    site, site_out = _sites(source.folder.name, transcoder=transcoder)
    return Description(
        format="sparsify",
        file=file,
        architecture="topk" + ("_skip" if skip else "") + ("_transcoder" if transcoder else ""),
        activation="topk",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_in,
        dtype=found["encoder.weight"].dtype,
        tensors=tensors,
        k=need_k(config, config.integer("k")),
        model_id=about.text("model") if about else None,
        site=site,
        site_out=site_out,
        of_modules=True,
        apply_b_dec_to_input=not transcoder,
        context_size=about.integer("ctx_len") if about else None,
        source=str(source),
        revision=source.revision,
    )


def _sites(module: str, *, transcoder: bool) -> tuple[str | None, str | None]:
    """Where the input comes from and, for a transcoder, what it predicts; None where the name says nothing."""
    if module.endswith(("embed_tokens", "embed_in", "wte")):
        return "hook_embed", None
    match = re.search(r"(?:layers|h)[._](\d{1,6})((?:\.\w+)?)$", module)
    if match is None or match[2] not in _ADDS_TO_RESIDUAL:
        return None, None
    output = f"blocks.{match[1]}.{_ADDS_TO_RESIDUAL[match[2]]}"
    if not transcoder:
        return output, None
    inputs = {".mlp": MLP_INPUT, "": "hook_resid_pre"}
    return (f"blocks.{match[1]}.{inputs[match[2]]}" if match[2] in inputs else None), output


FORMAT = Format("sparsify", has("sae.safetensors", "cfg.json"), _describe)
