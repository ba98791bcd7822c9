"""Small autoencoders of every kind, made without any library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raymi.sae.autoencoder import SAE
from raymi.sae.description import Activation, Description
from raymi.sae.formats.base import straight
from tests.device import DEVICE

D, F = 6, 40


def weights(
    activation: Activation, *, d_sae: int = F, coarse: bool = False, seed: int = 0, d_in: int = D
) -> dict[str, Tensor]:
    """Random weights; `coarse` ones are small integers, so that activations tie and matrix products are exact."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        if coarse:
            return torch.randint(-2, 3, shape, generator=generator, device="cpu").float()
        return torch.randn(shape, generator=generator, device="cpu")

    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(activation, ("b_enc",))
    made = {"W_enc": numbers(d_in, d_sae), "W_dec": numbers(d_sae, d_in), "b_dec": numbers(d_in)}
    return made | {name: numbers(d_sae) for name in biases}


def sae(
    activation: Activation, *, d_sae: int = F, coarse: bool = False, seed: int = 0, d_in: int = D, **about: Any
) -> SAE:
    """An autoencoder that is in no file."""
    made = weights(activation, d_sae=d_sae, coarse=coarse, seed=seed, d_in=d_in)
    if activation == "topk":
        about.setdefault("k", 5)
    description = Description(
        format="made", file=Path("made"), architecture=activation, activation=activation, d_in=d_in, d_sae=d_sae,
        d_out=d_in, dtype="float32", tensors=straight(*made), **about,
    )  # fmt: skip
    return SAE(description, made, device=DEVICE)


def saelens(folder: Path, activation: Activation = "relu", *, without: str = "", **config: Any) -> Path:
    """Writes one in SAELens's format, as version 6 does.

    Args:
        folder: where to.
        activation: of what kind.
        without: a tensor to leave out.
        config: fields of cfg.json to add or replace; `metadata` is merged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = weights(activation)
    made.pop(without, None)
    save_file(made, folder / "sae_weights.safetensors")
    given = config.pop("metadata", {})
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
    cfg = {
        "architecture": {"relu": "standard"}.get(activation, activation), "d_in": D, "d_sae": F, "dtype": "float32",
        "apply_b_dec_to_input": True, **({"k": 5} if activation == "topk" else {}),
        **config, "metadata": metadata | given if isinstance(given, dict) else given,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return folder
