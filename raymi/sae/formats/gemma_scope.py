"""Gemma Scope (Gemma 2): `layer_L/width_16k/average_l0_N/params.npz`, and no config: site and layer are in the path.

Transcoders were trained on a model whose norms' weights are folded into the MLP's matrices: they read what the norm
gives before its weights ("Language model technical details" of the paper).
"""

import re
from pathlib import Path

from raymi.sae.description import NORMALISED, Description, Stored
from raymi.sae.files import members
from raymi.sae.formats.base import Format, has, member
from raymi.sae.source import Source

_REPO = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": NORMALISED}
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def _describe(source: Source, file: Path) -> Description:
    found = members(file)
    stored = {name: next((there for there in found if there.lower() == name.lower()), name) for name in _NAMES}
    encoder = member(file, found, stored["W_enc"])
    decoder = member(file, found, stored["W_dec"])
    repo = _REPO.search(source.place)
    # Behind the repository's name: a local folder's parents may be called anything.
    layers = re.findall(r"layer_(\d{1,6})", source.place[repo.end() :]) if repo else []
    jumps = stored["threshold"] in found
    tensors = {name: Stored(stored[name]) for name in (_NAMES if jumps else _NAMES[:-1])}
    site = site_out = None
    notes: tuple[str, ...] = ()
    if repo and repo["kind"] == "res" and "embedding" in source.place[repo.end() :]:
        site = "hook_embed"
        # They were trained on embeddings before Gemma multiplies them by the root of its width.
        root = encoder.shape[0] ** 0.5
        tensors |= {"W_enc": Stored(stored["W_enc"], factor=1 / root), "W_dec": Stored(stored["W_dec"], factor=root)}
    elif repo and layers:
        site = f"blocks.{layers[-1]}.{_SITES[repo['kind']]}"
        site_out = f"blocks.{layers[-1]}.hook_mlp_out" if repo["kind"] == "transcoders" else None
    else:
        notes = ("the path does not say what it was trained on: give `site` to use it",)
    return Description(
        format="gemma-scope",
        file=file,
        architecture=("jumprelu" if jumps else "standard") + ("_transcoder" if site_out else ""),
        activation="jumprelu" if jumps else "relu",
        d_in=encoder.shape[0],
        d_sae=encoder.shape[1],
        d_out=decoder.shape[1],
        dtype=encoder.dtype,
        tensors=tensors,
        model_id=f"google/gemma-2-{repo['size']}{'-it' if repo['tuning'] == 'it' else ''}" if repo else None,
        site=site,
        site_out=site_out,
        heads_joined=site is not None and site.endswith("hook_z"),
        context_size=1024,
        prepend_bos=True,
        source=str(source),
        revision=source.revision,
        notes=notes,
    )


FORMAT = Format("gemma-scope", has("params.npz"), _describe)
