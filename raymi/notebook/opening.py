"""Opening a model of the Hugging Face cache."""

from dataclasses import replace
from pathlib import Path

import torch

from raymi import catalog
from raymi.errors import UserError
from raymi.fields import near
from raymi.model.loading import DTYPES
from raymi.model.loading import load as load_weights
from raymi.notebook.model import Model
from raymi.tokenizer import load_tokenizer


def load(
    id: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    cache_dir: Path | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    allow_unused: bool = False,
) -> Model:
    """Opens a model of the Hugging Face cache. Nothing is downloaded (`raymi fetch ID` does that) and Ray is not used.

    Args:
        id: `org/name`, or `org/name@revision` with a branch, a tag, a commit or the beginning of one.
        dtype: what to compute in: float32, bfloat16 or float16.
        device: `auto` (CUDA, then Apple's GPU, then the CPU), or cpu, mps, cuda, cuda:1.
        cache_dir: the cache, in place of the one that HF_HOME or HF_HUB_CACHE names.
        trust_remote_code: run the Python code that the model brings along.
        allow_pickle: accept weights that are not safetensors, and can run any code when they are loaded.
        allow_unused: leave out tensors that its files hold and the model of its config has no place for.

    Raises:
        UserError: there is no such model, it cannot run (the reason is given), or there is no such device or dtype.
        RuntimeError: its weights do not fit its config, or raymi does not compute what the model's own code does.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: found {dtype!r}; allowed: {', '.join(DTYPES)}{near(dtype, DTYPES)}")
    check_device(device)
    cache = None if cache_dir is None else Path(cache_dir)
    found = catalog.find(id, cache, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if found.reason is not None:
        raise UserError(f"{found.id} cannot run: {found.reason}")
    tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
    loaded = load_weights(
        found.path,
        name=found.id,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        allow_unused=allow_unused,
    )
    # What config.json does not tell, the loaded model does.
    found = replace(found, attention_layers=tuple(loaded.model.attention_layers))
    return Model(found, tokenizer, loaded, dtype)


def check_device(device: str) -> None:
    """UserError when this machine has not the device: `auto`, cpu, mps, cuda or cuda:1."""
    kind, _, index = device.partition(":")
    there = {"auto": 1, "cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or not (index.isdecimal() or not index) or int(index or 0) >= there[kind]:
        usable = [name for name, count in there.items() if count]
        raise UserError(f"device: found {device!r}; there is here: {', '.join(usable)}")
