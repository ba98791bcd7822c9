"""From a snapshot on disk to a model that can be hooked."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from raymi.model import memory
from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadWeights(RuntimeError):
    """The files of a snapshot do not make up the model that its config describes."""


class WrongNumbers(RuntimeError):
    """raymi's own attention and the family's eager attention do not agree on this model."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what loading it took."""

    model: HookedModel
    seconds: float
    before: memory.Snapshot
    after: memory.Snapshot
    noise: float
    """Largest logit difference that the batch's shape alone makes."""
    disagreement: float
    """Largest logit difference between raymi's attention and the family's own, clean and knocked out."""


def pick_device(wanted: str = "auto") -> torch.device:
    """`auto` is the first of CUDA, Apple's GPU and the CPU that is there."""
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(
    path: Path,
    *,
    name: str = "",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Loaded:
    """Load a snapshot, find its places, and check its attention against the family's own.

    Args:
        path: the snapshot folder.
        name: what errors call the model.
        dtype: float32, bfloat16 or float16; the weights are converted. float32 means float32: no TF32.
        device: auto, cpu, cuda, cuda:1, mps.
        trust_remote_code: run the Python code that the snapshot brings along.
        allow_pickle: accept weights that are not safetensors.

    Raises:
        BadWeights: weights are missing, misshaped or unreadable.
        WrongNumbers: the self-check failed.
        NoSuchPlace, UnsupportedAttention: the model is built in a way that raymi does not know.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    where = pick_device(device)
    before, started = memory.snapshot(where), time.perf_counter()
    raw = _read(path, name or path.name, DTYPES[dtype], trust_remote_code, allow_pickle).to(where)
    model = HookedModel(raw, name or path.name)
    seconds = time.perf_counter() - started
    noise, disagreement = _check(model)
    return Loaded(model, seconds, before, memory.snapshot(where), noise, disagreement)


def _read(path: Path, name: str, dtype: torch.dtype, trust_remote_code: bool, allow_pickle: bool) -> PreTrainedModel:
    # Its progress bars and warnings would end up between the lines of a run's own display.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        if memory.is_out_of_memory(error):
            raise
        raise BadWeights(f"{name}: its weights cannot be read: {error}") from error
    missing, misshaped = sorted(info["missing_keys"]), sorted(str(key) for key in info["mismatched_keys"])
    if missing or misshaped:
        raise BadWeights(f"{name}: missing tensors {missing[:5]}, misshaped tensors {misshaped[:5]} of {path}")
    return model.eval()


def _check(model: HookedModel) -> tuple[float, float]:
    """Clean logits and a deep knockout, once by raymi's function and once by the family's own.

    Returns:
        Noise (the same prompt alone and in a batch) and disagreement, in logits.
    """
    ids_1T = model.probe_ids(8)
    deepest = max(i for i, block in enumerate(model.blocks) if block.attention is not None)
    shallowest = min(i for i, block in enumerate(model.blocks) if block.attention is not None)
    cuts = [(), *((Mask(layer, (model.n_heads - 1,), ((7, 0), (5, 2))),) for layer in (shallowest, deepest))]
    ours = model.forward(ids_1T.expand(3, -1), cuts)
    alone = model.forward(ids_1T)
    noise = float((alone.logits_BV[0] - ours.logits_BV[0]).abs().max())
    if not model.dispatches:
        return noise, 0.0
    theirs = model.forward(ids_1T.expand(3, -1), cuts, own_attention=True)
    disagreement = float((ours.logits_BV - theirs.logits_BV).abs().max())
    scale = float(theirs.logits_BV.abs().max())
    tolerance = max(20 * noise, scale * (1e-5 if model.dtype == torch.float32 else 3e-2))
    if disagreement > tolerance:
        raise WrongNumbers(
            f"{model.name}: raymi's attention differs from {type(model.model).__name__}'s own by {disagreement:.2e} "
            f"in the logits, where {tolerance:.1e} would be noise"
        )
    return noise, disagreement
