"""Tensors of a checkpoint that the built model has no use for: constants, parts beside it, and what it should have had.

transformers drops what it has no place for without a word. A bias on a layer that the config says has none, or a fourth
decoder layer where the config says three, is a model that computes something else than the one that was trained.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raymi import parts
from raymi.model.stored import INTEGERS, Stored

_CONSTANTS = re.compile(
    r"(original_)?inv_freq|position_ids|token_type_ids|(cos|sin)_cached|num_batches_tracked|version"
)
"""Buffers that older releases of transformers stored and that are made anew from the config."""


@dataclass(frozen=True, slots=True)
class Unused:
    """What a checkpoint holds and the model does not, constants left out."""

    wrong: tuple[str, ...]
    """Tensors that belong inside a module that was built, and decoder layers beyond the config's count."""
    parts: tuple[str, ...]
    """Whole parts that are not built: towers, prediction heads."""


def unused(model: nn.Module, unexpected: Collection[str], stored: Stored, base: str) -> Unused:
    """Tells apart what transformers had no place for.

    Args:
        model: as loaded.
        unexpected: the tensors, as the model would call them, without those that transformers lists as ignorable.
        stored: the files.
        base: the name of the part of the model that a checkpoint may leave out of its names (`base_model_prefix`).
    """
    modules = dict(model.named_modules())
    containers = _containers(modules)
    prefixed = any(name.startswith(f"{base}.") for name in stored.places)
    wrong: list[str] = []
    beside: dict[str, None] = {}
    further: dict[str, list[str]] = {}
    for name in sorted(unexpected):
        path = name.split(".")
        if base and path[0] not in dict(model.named_children()) and f"{base}.{path[0]}" in modules:
            path = [base, *path]
        depth = next(depth for depth in range(len(path) - 1, -1, -1) if ".".join(path[:depth]) in modules)
        home, rest = ".".join(path[:depth]), path[depth:]
        if _constant(modules[home], rest[-1], stored.read(name)):
            continue
        in_tower = any(parts.is_media(component) for component in _outside_layers(path[:depth]))
        if in_tower or (home in containers and parts.is_part(rest[0])) or parts.is_part(_last_outside(path, rest)):
            beside[".".join(path[: depth + 1])] = None
        elif isinstance(modules[home], nn.ModuleList) and rest[0].isdecimal():
            further.setdefault(f"{home}.{rest[0]}", []).append(name)
        elif home == "" and len(rest) > 1 and prefixed:
            beside[rest[0]] = None  # beside the language model, not in it
        else:
            wrong.append(name)
    for layer, names in further.items():
        if parts.joins_next_token(names):
            beside[layer] = None
        else:
            wrong += names
    return Unused(tuple(sorted(wrong)), tuple(beside))


def without_scale(model: nn.Module, stored: Stored, base: str) -> Iterator[str]:
    """Weights stored as integers, as quantised ones are: transformers takes them for the numbers they stand for."""
    numbers = {name for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    for name, kind in sorted(stored.kinds.items()):
        if kind in INTEGERS and not numbers.isdisjoint((name, f"{base}.{name}", name.removeprefix(f"{base}."))):
            yield f"{name} is stored as integers ({kind}), whose scale is not known"


def contradictions(stored: Stored, base: str) -> Iterator[str]:
    """What transformers would settle silently: a tensor that is stored twice with different values (in two files, or
    with and without the name of the base model), and lists of experts with a gap, which it would close.
    """
    spelt: dict[str, list[tuple[str, Path]]] = {}
    for name, places in stored.places.items():
        spelt.setdefault(name.removeprefix(f"{base}.") if base else name, []).extend((name, place) for place in places)
    for copies in spelt.values():
        values = [stored.read(name, place) for name, place in copies] if len(copies) > 1 else []
        if any(not _equal(values[0], other) for other in values[1:]):
            names = " also as ".join(dict.fromkeys(name for name, _ in copies))
            yield f"{names} is stored more than once, with different values"
    lists: dict[str, set[int]] = {}
    for name in stored.places:
        path = name.split(".")
        for depth, component in enumerate(path):
            if component.isdecimal() and depth and path[depth - 1].endswith("experts"):
                lists.setdefault(".".join(path[:depth]), set()).add(int(component))
    for name, indices in sorted(lists.items()):
        lacking = sorted(set(range(max(indices))) - indices)
        if lacking:
            yield f"{name}.{lacking[0]} is missing"


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _containers(modules: Mapping[str, nn.Module]) -> set[str]:
    """What holds the lists of layers: the model, its base model, its decoder."""
    found = {""}
    for name, module in modules.items():
        path = name.split(".")
        if isinstance(module, nn.ModuleList) and len(_outside_layers(path)) == len(path):
            found |= {".".join(path[:depth]) for depth in range(len(path))}
    return found


def _outside_layers(path: Sequence[str]) -> Sequence[str]:
    """A path up to its first number."""
    return path[: next((depth for depth, component in enumerate(path) if component.isdecimal()), len(path))]


def _last_outside(path: Sequence[str], rest: Sequence[str]) -> str:
    """What is not built, where it stands in no layer: `seq_relationship` of `cls.seq_relationship.weight`."""
    return rest[0] if len(rest) > 1 and len(_outside_layers(path)) == len(path) else ""


def _constant(home: nn.Module, name: str, value: Tensor | None) -> bool:
    """Whether a tensor is none that was learnt: one that the model makes itself, or the mask of an older release."""
    made = dict(home.named_buffers(recurse=False)).get(name)
    if made is not None:
        same_shape = value is None or made.shape == value.shape
        return same_shape and (value is None or torch.allclose(made.float(), value.float(), rtol=0.01))
    if _CONSTANTS.fullmatch(name):
        return True
    if value is None or name not in ("bias", "masked_bias", "causal_mask", "mask"):
        return False
    if name == "masked_bias":
        return value.numel() == 1
    square = value.dim() == 4 and value.shape[:2] == (1, 1) and value.shape[2] == value.shape[3]
    return square and not torch.triu(value[0, 0].float(), diagonal=1).any()
