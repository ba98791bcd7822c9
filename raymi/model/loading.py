"""From a snapshot on disk to a model that can be hooked."""

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from raymi.model import memory
from raymi.model.config import REACHES, values, whole
from raymi.model.engine import Capability, Engine, Way, measure_capability
from raymi.model.hooked import HookedModel
from raymi.model.linear import lay_out
from raymi.model.rope import forget_lengths
from raymi.model.stored import Stored, weight_files
from raymi.model.unused import Unused, contradictions, unused, without_scale

SHORTEST_CHECK = 12

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadWeights(RuntimeError):
    """The files of a snapshot do not make up the model that its config describes."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what loading it took."""

    engine: Engine
    seconds: float
    """Of reading the weights and finding the places."""
    check_seconds: float
    """Of measuring what the model can be trusted with."""
    before: memory.Snapshot
    after: memory.Snapshot
    not_built: tuple[str, ...] = ()
    """Parts that the checkpoint holds beside the model: towers, prediction heads."""
    unused: tuple[str, ...] = ()
    """Tensors that the model of the config should have had a place for, and an adapter, as far as that was allowed."""

    @property
    def model(self) -> HookedModel:
        return self.engine.model

    @property
    def capability(self) -> Capability:
        return self.engine.capability


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
    allow_unused: bool = False,
    longest: int = SHORTEST_CHECK,
    way: Way | None = None,
) -> Loaded:
    """Load a snapshot, find its places, check its attention against the family's own, and measure its capability.

    Args:
        path: the snapshot folder.
        name: what errors call the model.
        dtype: float32, bfloat16 or float16; the weights are converted. float32 means float32: no TF32.
        device: auto, cpu, cuda, cuda:1, mps.
        trust_remote_code: run the Python code that the snapshot brings along.
        allow_pickle: accept weights that are not safetensors.
        allow_unused: leave out tensors that the model of the config should have had a place for.
        longest: tokens of the longest prompt to come; windows and chunks that it exceeds are exceeded by the check.
        way: how ablations are measured; the fastest exact way where None.

    Raises:
        BadWeights: weights are missing, misshaped, unreadable, or more than the config says.
        WrongNumbers: the self-check failed.
        NoSuchPlace, UnsupportedAttention: the model is built in a way that raymi does not know.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    memory.keep_what_is_freed()
    where = pick_device(device)
    memory.give_back()  # what an earlier model has left is no part of what is in use
    before, started = memory.snapshot(where), time.perf_counter()
    raw, unexpected = _read(path, name or path.name, DTYPES[dtype], trust_remote_code, allow_pickle)
    forget_lengths(raw)
    rest = _check_rest(raw, unexpected, path, name or path.name, allow_unused)
    cast(nn.Module, raw).to(where)
    lay_out(raw)
    memory.give_back()
    model = HookedModel(raw, name or path.name)
    seconds, started = time.perf_counter() - started, time.perf_counter()
    capability = measure_capability(model, check_length(raw.config.get_text_config(), longest))
    engine = Engine(model, capability, way or capability.way)
    checked, after = time.perf_counter() - started, memory.snapshot(where)
    return Loaded(engine, seconds, checked, before, after, rest.parts, rest.wrong)


def check_length(config: object, longest: int) -> int:
    """Tokens of the prompt that a model is checked on: past every window and chunk that the job's prompts get past."""
    n_layers = whole(config, "num_hidden_layers") or 1
    within_reach = [value + 3 for name in REACHES for value in values(config, n_layers, name) if value < longest]
    return max(SHORTEST_CHECK, *within_reach, 0)


def _read(
    path: Path, name: str, dtype: torch.dtype, trust_remote_code: bool, allow_pickle: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the tensors that it has no place for and that transformers does not list as ignorable."""
    # Its progress bars and warnings would end up between the lines of a run's own display.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # they are refused below, where they can be named
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise BadWeights(f"{name}: its weights cannot be read: a pickle of them holds more than tensors") from error
    except Exception as error:  # safetensors, configs and snapshots' own code raise whatever they like
        if memory.is_out_of_memory(error):
            raise
        raise BadWeights(f"{name}: its weights cannot be read: {error}") from error
    model, info = found
    wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    for key, stored, expected in sorted(info["mismatched_keys"]):
        wrong.append(f"{key} has shape {list(stored)}, not {list(expected)}")
    if wrong:
        raise BadWeights(f"{name}: its weights do not make up the model of its config: {_first(wrong)}")
    return model.eval(), info["unexpected_keys"]


def _check_rest(model: PreTrainedModel, unexpected: set[str], path: Path, name: str, allow_unused: bool) -> Unused:
    """What is left over and may be; BadWeights when a tensor of what is built is left over, or two stand for one."""
    stored, base = Stored(weight_files(path)), model.base_model_prefix
    if clashes := [*contradictions(stored, base), *without_scale(model, stored, base)]:
        raise BadWeights(f"{name}: its weights are not one model: {_first(clashes)}")
    rest = unused(model, unexpected, stored, base)
    adapter = path / "adapter_config.json"
    lies_beside = adapter.exists() and not getattr(model, "_hf_peft_config_loaded", False)
    if lies_beside and not allow_unused:
        raise BadWeights(
            f"{name}: an adapter lies beside its weights ({adapter.name}) and has not been applied: there is no peft. "
            f"--allow-unused {name} (in Python allow_unused=True) measures the model without it."
        )
    if rest.wrong and not allow_unused:
        raise BadWeights(
            f"{name}: its weights hold more than the model of its config has a place for: {_first(rest.wrong)}. "
            f"--allow-unused {name} (in Python allow_unused=True) measures the model without them."
        )
    return replace(rest, wrong=(*rest.wrong, adapter.name)) if lies_beside else rest


def _first(faults: Sequence[str]) -> str:
    return ", ".join(faults[:3]) + (f", and {len(faults) - 3} more" if len(faults) > 3 else "")
