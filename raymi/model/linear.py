"""Matrix products by oneDNN on processors that the library which torch calls leaves partly unused.

On x86, torch multiplies float32 matrices by MKL, which has AVX-512 for Intel's processors only. oneDNN, which torch
carries too and does not use here by itself (`mkldnn`, as `torch.compile` calls it), has it for all: 240 GFLOP/s against
110 on a core of AMD's Zen 5; on Zen 4, whose units are half as wide, 10 to 60 % more. Nothing is timed: one machine
always computes in one way.

oneDNN adds up the whole of a product in one chain, which rounds more than MKL's blocks do. Long products are therefore
cut into parts, and logits then are as near to float64's as MKL's are (5.6e-5 and 4.1e-5 on a Llama of 30 layers). That
costs copies, which pay only where oneDNN is twice as fast.

Legend: R rows, I inputs, O outputs.
"""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LONGEST = 640
"""Inputs that are added up in one chain."""
FEWEST = 16
"""Rows from which on it pays: fewer wait for memory, whoever multiplies them."""
FEWEST_IN_PARTS = 64
"""Rows from which on it pays to copy a weight's parts."""
ZEN_5 = 26
"""The family of AMD's processors from which on they have units as wide as AVX-512."""


def quick_products() -> AbstractContextManager[object]:
    """While inside, linear layers take float32 products from the library that is fast on this processor."""
    longest = _longest()
    return _OneDNN(longest) if longest else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and _suits(self.longest, *args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


@cache
def _longest() -> int:
    """Inputs of the longest product that it pays for on this processor; 0 where it never does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return 0
    try:
        told = Path("/proc/cpuinfo").read_text()
        # No part of torch's documented interface: an older or a newer one may lack it.
        torch.ops.mkldnn._linear_pointwise.binary  # noqa: B018
    except (OSError, AttributeError):
        return 0
    family = re.search(r"^cpu family\s*: (\d+)$", told, re.MULTILINE)
    if "AuthenticAMD" not in told or family is None:
        return 0
    return sys.maxsize if int(family[1]) >= ZEN_5 else LONGEST


def _suits(longest: int, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    given = [x, weight_OI] if bias_O is None else [x, weight_OI, bias_O]
    if not all(each.device.type == "cpu" and each.dtype == torch.float32 for each in given):
        return False
    n_inputs = weight_OI.shape[1]
    fewest = FEWEST if n_inputs <= LONGEST else FEWEST_IN_PARTS
    enough = n_inputs <= longest and x.numel() >= fewest * n_inputs
    return enough and weight_OI.is_contiguous() and not torch.is_grad_enabled()


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`functional.linear`, [..., I] -> [..., O]."""
    product, n_inputs = torch.ops.mkldnn._linear_pointwise, weight_OI.shape[1]
    n_parts = -(-n_inputs // LONGEST)
    if n_parts == 1:
        return product(x, weight_OI, bias_O, "none", [], "")
    # Parts of equal length, each copied: on what is not contiguous oneDNN falls back to a loop.
    xs, weights = (each.tensor_split(n_parts, -1) for each in (x, weight_OI))
    y = product(xs[0].contiguous(), weights[0].contiguous(), bias_O, "none", [], "")
    for x_part, weight_part in zip(xs[1:], weights[1:], strict=True):
        y = product.binary(x_part.contiguous(), y, weight_part.contiguous(), None, "add")
    return y
