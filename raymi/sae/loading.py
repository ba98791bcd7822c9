"""From a place to an autoencoder that computes: its tensors are checked, mapped, and brought into one convention."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from raymi.errors import UserError, quoted
from raymi.sae import files
from raymi.sae.autoencoder import SAE
from raymi.sae.description import Description, Stored
from raymi.sae.discover import describe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    where: str | Path | None = None,
    *,
    repo: str | None = None,
    path: str = "",
    cache_dir: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    site: str | None = None,
    site_out: str | None = None,
    model_id: str | None = None,
    input_scale: float | None = None,
    centred: bool = True,
) -> SAE:
    """Opens a sparse autoencoder or transcoder of any format that raymi knows. Nothing is downloaded.

    Weights stay mapped files on the CPU; a tensor is converted and moved when it is first needed.

    Args:
        where: a folder, a file in it, or `repo[@revision][:path]` in the Hugging Face cache.
        repo: the repository, in place of `where`.
        path: the path in `repo`.
        cache_dir: the cache; by default the one HF_HOME names.
        device: where it computes.
        dtype: in what it computes: float32, bfloat16 or float16.
        site: the hook point it belongs to, where its files do not say.
        site_out: the one that a transcoder predicts, where its files do not say.
        model_id: the model it belongs to, where its files do not say.
        input_scale: what its inputs are multiplied with, where it normalises them by an average that no file states.
        centred: whether activations are taken without their mean over the width, where its files say so. A model with
            RMS norms cannot be loaded with centred weights, whatever they say.

    Raises:
        UserError: for what is not there, not whole, or not known; it names file and tensor.
    """
    if (where is None) == (repo is None):
        raise UserError("give either `where` or `repo`")
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; raymi computes in {', '.join(_DTYPES)}")
    place = where if where is not None else f"{repo}:{path}" if path else str(repo)
    about = describe(
        place, cache_dir=cache_dir, site=site, site_out=site_out, model_id=model_id, input_scale=input_scale
    )
    if not centred:
        about = replace(about, centred=False, centred_out=False)
    if about.normalisation == "expected_average_only_in" and about.input_scale is None:
        raise UserError(
            f"{about.file}: inputs are to be scaled by an average norm which no file of this SAE states",
            hint="Give it as `input_scale`: the root of d_in over the average norm of the activations.",
        )
    return SAE(about, tensors(about), device=torch.device(device), dtype=_DTYPES[dtype])


def tensors(about: Description) -> dict[str, Tensor]:
    """The tensors of an autoencoder under their canonical names and in their canonical orientation, on the CPU.

    Raises:
        UserError: for a tensor that is missing, misshaped, of an unsupported dtype, or unknown.
    """
    stored = files.tensors(about.file)
    _check(about, stored)
    ready = {name: _read(stored[where.name], where, about) for name, where in about.tensors.items()}
    if about.unit_decoder_required:
        _refuse_lengths(about, ready["W_dec"])
    if about.constant_threshold is not None:
        ready["threshold"] = torch.tensor(about.constant_threshold).expand(about.d_sae)
    return _unit_decoder(ready) if about.unit_decoder else ready


def _check(about: Description, stored: Mapping[str, Tensor]) -> None:
    for canonical, where in about.tensors.items():
        tensor, expected = stored.get(where.name), about.stored_shape(canonical)
        if tensor is None:
            raise UserError(f"{about.file}: tensor {where.name!r} is missing")
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{about.file}: tensor {where.name!r} has shape {list(tensor.shape)}, expected {list(expected)}"
            )
        if tensor.dtype not in _DTYPES.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{about.file}: tensor {where.name!r} is {kind}; raymi reads {', '.join(_DTYPES)}")
    for name in about.must_be_one:
        if name in stored and not bool((stored[name] == 1).all()):
            raise UserError(f"{about.file}: tensor {name!r} is not all ones, and raymi does not apply it")
    known = {where.name for where in about.tensors.values()} | {*about.ignored, *about.must_be_one}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise UserError(f"{about.file}: raymi does not know what tensor {unknown[0]!r} is for in a {about.format} SAE")
    if about.k is not None and about.k > about.d_sae:
        raise UserError(f"{about.file}: k is {about.k}, but there are {about.d_sae} features")
    if about.k is not None and "k" in stored and stored["k"].tolist() not in (about.k, [about.k]):
        raise UserError(f"{about.file}: tensor 'k' is {quoted(stored['k'].tolist())}, where the config says {about.k}")


def _read(tensor: Tensor, where: Stored, about: Description) -> Tensor:
    match where.reading:
        case "transposed":
            tensor = tensor.T
        case "exponential":
            tensor = tensor.exp()
        case "scalar":
            tensor = tensor.expand(about.d_sae)
        case "as is":
            pass
    return tensor if where.factor == 1.0 else tensor * where.factor


def _refuse_lengths(about: Description, decoder: Tensor) -> None:
    """Refuses decoder rows of other lengths than 1, but for the rounding of the file's own numbers."""
    norms = decoder.float().norm(dim=1)
    rounding = 10 * torch.finfo(decoder.dtype).eps
    off = float((norms - 1).abs().max())
    if off > rounding:
        raise UserError(
            f"{about.file}: decoder rows are up to {off:.2g} off length 1, and sparsity_include_decoder_norm has "
            "features multiplied by these lengths before their threshold, which raymi does not do",
            hint="Fold the lengths into encoder, biases and decoder, and write the file again.",
        )


def _unit_decoder(ready: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves the lengths of the decoder's rows into the encoder, unless they are 1 already."""
    norms = ready["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return ready
    return ready | {
        "W_dec": ready["W_dec"] / norms[:, None],
        "W_enc": ready["W_enc"] * norms,
        "b_enc": ready["b_enc"] * norms,
    }
