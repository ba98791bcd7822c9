"""Matrix products by oneDNN on processors that the library which torch calls leaves half unused.

On x86, torch multiplies float32 matrices by MKL, which has AVX-512 for Intel's processors only: one core of AMD's Zen 5
gives 110 GFLOP/s by MKL and 240 by oneDNN, which torch carries too and does not use here by itself (`mkldnn`, as
`torch.compile` calls it). Nothing is timed: one machine always computes in one way.

oneDNN adds up the whole of a product in one chain, which rounds more than MKL's blocks do. Long products are therefore
cut into parts, and logits then are as near to float64's as MKL's are (5.6e-5 and 4.1e-5 on a Llama of 30 layers).

Legend: R rows, I inputs, O outputs.
"""

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
FEWEST = 64
"""Rows from which on it pays to copy a weight's parts."""


def quick_products() -> AbstractContextManager[object]:
    """While inside, linear layers take float32 products from the library that is fast on this processor."""
    return _OneDNN() if _pays() else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and _suits(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


@cache
def _pays() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        # No part of torch's documented interface: an older or a newer one may lack it.
        torch.ops.mkldnn._linear_pointwise.binary  # noqa: B018
    except (OSError, AttributeError):
        return False
    return amd


def _suits(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    given = [x, weight_OI] if bias_O is None else [x, weight_OI, bias_O]
    if not all(each.device.type == "cpu" and each.dtype == torch.float32 for each in given):
        return False
    n_rows = x.numel() // max(1, x.shape[-1])
    enough = n_rows >= FEWEST if weight_OI.shape[1] > LONGEST else n_rows > 0
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
