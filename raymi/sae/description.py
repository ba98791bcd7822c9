"""What is known of a sparse autoencoder before any of its weights is read. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raymi.errors import UserError

Activation = Literal["relu", "jumprelu", "topk", "gated"]
Normalisation = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
Reading = Literal["as is", "transposed", "exponential", "scalar"]

SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
         "attn.hook_out", "mlp.hook_out")  # fmt: skip
"""Where in a block of a model raymi can feed an autoencoder; besides these, `hook_embed`."""
OF_STREAM = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""What is in the residual stream, or is added to it as it stands."""
MLP_INPUT, NORMALISED = "mlp.hook_in", "ln2.hook_normalized"
"""What transcoders read, and never write: what a block's MLP is fed, and the same before the weights of its norm."""
_SAME_MODEL = {"gpt2-small": "gpt2"}
"""TransformerLens's names of models whose last part is not that of their Hugging Face id."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where in the file one of an autoencoder's tensors is, and how it is to be read."""

    name: str
    reading: Reading = "as is"
    """`transposed`: a matrix stored the other way round. `exponential`: the logarithm is stored. `scalar`: one number
    for all features."""
    factor: float = 1.0
    """To multiply it with."""


@dataclass(frozen=True, slots=True)
class Description:
    """One autoencoder or transcoder, as its own files describe it.

    Features are computed as activation(normalised input @ W_enc + b_enc), outputs as features @ W_dec + b_dec.
    """

    format: str
    file: Path
    """Holds the weights."""
    architecture: str
    """SAELens's name for it; `batchtopk` and `matryoshka` where a library tells them apart when they are used."""
    activation: Activation
    d_in: int
    d_sae: int
    d_out: int
    dtype: str
    """As stored."""
    tensors: Mapping[str, Stored]
    """Canonical name -> where it is stored: W_enc, W_dec, b_enc, b_dec, threshold, b_gate, b_mag, r_mag, W_skip."""
    ignored: tuple[str, ...] = ()
    """Tensors in the file that say nothing new."""
    must_be_one: tuple[str, ...] = ()
    """Tensors that change nothing as long as they are ones; others are refused."""
    constant_threshold: float | None = None
    """The same for all features, where a config states it."""
    k: int | None = None
    model_id: str | None = None
    site: str | None = None
    """TransformerLens's name of the place whose activations it takes."""
    site_out: str | None = None
    """The place that a transcoder predicts; None for an autoencoder."""
    of_modules: bool = False
    """Whether `site` and `site_out` mean what the modules themselves give (or are given), named as if nothing stood
    between them and the residual stream: in families with norms behind them that is `mlp.hook_out`, `attn.hook_out`."""
    of_lens: bool = False
    """Whether `site` is a hook point of a TransformerLens whose version is not known."""
    head: int | None = None
    """The attention head that it looks at, where it is one head."""
    heads_joined: bool = False
    """Whether its input is the heads' outputs one after the other."""
    apply_b_dec_to_input: bool = False
    normalisation: Normalisation = "none"
    input_scale: float | None = None
    """`expected_average_only_in`: what inputs are multiplied with; None where no file says."""
    output_scale: float | None = None
    """What outputs are divided by."""
    centred: bool = False
    """Whether it sees activations without their mean over the width: those of a model loaded with centred weights."""
    centred_out: bool = False
    """Whether what it writes has none either: to be given back."""
    rescale_by_decoder_norm: bool = False
    unit_decoder: bool = False
    """Whether decoder rows are brought to length 1 when it is loaded, and its features scaled to match."""
    unit_decoder_required: bool = False
    """Whether decoder rows have to be of length 1: its library would multiply by their lengths."""
    context_size: int | None = None
    prepend_bos: bool | None = None
    """Whether its training texts began with BOS; None where its files do not say."""
    model_revision: str | None = None
    """Of the model that it was trained on, where its files name one."""
    source: str = ""
    """What `raymi.sae.load` is given to open it: `repo:path`, or a folder."""
    revision: str | None = None
    notes: tuple[str, ...] = field(default=())
    """What its user should know."""

    @property
    def transcoder(self) -> bool:
        return self.site_out is not None or "transcoder" in self.architecture

    @property
    def skip(self) -> bool:
        return "W_skip" in self.tensors

    @property
    def layer(self) -> int | None:
        """The layer of its site."""
        match = re.match(r"blocks\.(\d{1,6})\.", self.site or "")
        return int(match[1]) if match else None

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape that a tensor has in the arithmetic, by its canonical name."""
        shapes = {
            "W_enc": (self.d_in, self.d_sae),
            "W_dec": (self.d_sae, self.d_out),
            "W_skip": (self.d_out, self.d_in),
            "b_dec": (self.d_out,),
        }
        return shapes.get(tensor, (self.d_sae,))

    def stored_shape(self, tensor: str) -> tuple[int, ...]:
        """The shape that it must have in the file."""
        reading = self.tensors[tensor].reading
        if reading == "scalar":
            return ()
        return self.shape(tensor)[::-1] if reading == "transposed" else self.shape(tensor)


def check_fits(
    sae: Description,
    *,
    model_id: str,
    hidden_size: int,
    n_layers: int,
    n_heads: int | None = None,
    head_dim: int | None = None,
    any_model: bool = False,
) -> None:
    """Checks that an autoencoder can be used on a model.

    Args:
        sae: the autoencoder.
        model_id: the model's id in the cache.
        hidden_size: width of its residual stream.
        n_layers: how many layers it has.
        n_heads: its query heads; None leaves the width of a z autoencoder unchecked.
        head_dim: the width of one head's output.
        any_model: whether a model other than the one it was trained on will do, if the sizes fit.

    Raises:
        UserError: naming the file and what does not fit: the model, the site, the layer or the width.
    """
    if sae.transcoder and sae.site_out is None:
        raise UserError(
            f"{sae.file}: this is a transcoder, and its files do not say which site of the model it predicts",
            hint=f"Name it as `site_out`, such as blocks.{sae.layer or 0}.hook_mlp_out.",
        )
    places = [(sae.site, sae.d_in, (*SITES, MLP_INPUT, NORMALISED) if sae.transcoder else SITES)]
    places += [(sae.site_out, sae.d_out, SITES)] if sae.site_out else []
    if not any_model and sae.model_id is not None and not same_model(sae.model_id, model_id):
        raise UserError(
            f"{sae.file}: this SAE was trained on {sae.model_id}, not on {model_id}",
            hint="`any_model` allows it where the sizes fit.",
        )
    for site, width, allowed in places:
        if site is None:
            raise UserError(f"{sae.file}: its files do not say at which site of the model it belongs", hint="Name it.")
        _check_site(sae, site, allowed, model_id, n_layers)
        expected = _width(sae, site, hidden_size, n_heads, head_dim)
        if expected is not None and width != expected:
            raise UserError(f"{sae.file}: this SAE takes {width} numbers at {site}, where {model_id} has {expected}")


def same_model(a: str, b: str) -> bool:
    """Whether two names are of one model: without their organisations, as many configs give them."""
    names = [re.split(r"[/\\]", name)[-1].lower() for name in (a, b)]
    return len({_SAME_MODEL.get(name, name) for name in names}) == 1


def _check_site(sae: Description, site: str, allowed: tuple[str, ...], model_id: str, n_layers: int) -> None:
    if site == "hook_embed":
        return
    match = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", site)
    if match is None or match[2] not in allowed:
        known = ", ".join(["hook_embed", *(f"blocks.L.{name}" for name in allowed)])
        raise UserError(f"{sae.file}: raymi has no site {site!r} in {model_id}", hint=f"There are: {known}.")
    if int(match[1]) >= n_layers:
        raise UserError(f"{sae.file}: there is no {site} in {model_id}, whose layers are 0 to {n_layers - 1}")


def _width(sae: Description, site: str, hidden_size: int, n_heads: int | None, head_dim: int | None) -> int | None:
    if not site.endswith("attn.hook_z"):
        return hidden_size
    if sae.head is not None:
        return head_dim
    return n_heads * head_dim if n_heads and head_dim else None
