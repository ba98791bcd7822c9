"""What a model of half precision gives in float32 arithmetic: its own weights, each part of it widened while it runs.

Half precision numbers are float32 numbers, so this is what the same weights give as a float32 model. Every decoder
layer is widened by itself and narrowed again, and so is whatever has weights outside of them (embedding, last norm,
head): it takes the memory of the largest of these in float32 more, and not that of the model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model.hooked import HookedModel
from raymi.model.sites import hidden_input

HALF = (torch.bfloat16, torch.float16)


class NoTruth(RuntimeError):
    """A model cannot be run in float32 part by part."""


@contextmanager
def in_float32(model: HookedModel) -> Iterator[None]:
    """While inside, forwards of a model compute in float32; its weights are afterwards what they were, bit by bit.

    Raises:
        NoTruth: where accelerate moves weights about, and where a layer is given something narrower all the same.
    """
    parts, wide = list(_parts(model)), _Wide()
    if any("_hf_hook" in module.__dict__ for module in model.model.modules()):
        raise NoTruth(f"{model.name}: its weights are moved about by accelerate, and cannot be widened as they run")

    def refuse_narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (dtype := hidden_input(args, kwargs).dtype) in HALF:
            raise NoTruth(f"{model.name}: a layer is given {dtype} though all before it ran in float32")

    with ExitStack() as stack:
        stack.callback(wide.narrow_all)
        for block in model.blocks:
            stack.callback(block.module.register_forward_pre_hook(refuse_narrow, with_kwargs=True).remove)
        for module, tensors in parts:
            stack.callback(
                module.register_forward_pre_hook(lambda *_, its=tensors: wide.widen(its), prepend=True).remove
            )
            stack.callback(module.register_forward_hook(lambda *_, its=tensors: wide.narrow(its)).remove)
        yield


def _parts(model: HookedModel) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Modules, each with the half-precision tensors that are to be wide while it runs."""
    inside: set[nn.Module] = set()
    for block in model.blocks:
        inside.update(block.module.modules())
        yield block.module, _narrow(block.module, recurse=True)
    for module in model.model.modules():
        if module not in inside and (tensors := _narrow(module, recurse=False)):
            yield module, tensors


def _narrow(module: nn.Module, *, recurse: bool) -> list[Tensor]:
    of_module = (*module.parameters(recurse), *module.buffers(recurse))
    return [each for each in of_module if each.dtype in HALF]


class _Wide:
    """The tensors that are wide at the moment, and what they were."""

    def __init__(self) -> None:
        self.were: dict[int, tuple[Tensor, Tensor, int]] = {}
        """id -> the tensor, its own data, how many of the modules that run need it wide."""

    def widen(self, tensors: list[Tensor]) -> None:
        for each in tensors:
            _, data, times = self.were.get(id(each), (each, each.data, 0))
            self.were[id(each)] = each, data, times + 1
            if not times:
                each.data = data.float()

    def narrow(self, tensors: list[Tensor]) -> None:
        for each in tensors:
            _, data, times = self.were.pop(id(each))
            if times > 1:
                self.were[id(each)] = each, data, times - 1
            else:
                each.data = data

    def narrow_all(self) -> None:
        """After a forward that an exception has left."""
        for each, data, _ in self.were.values():
            each.data = data
        self.were.clear()
