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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

LONGEST = 640
"""Inputs that are added up in one chain."""
FEWEST = 16
"""Rows from which on it pays: fewer wait for memory, whoever multiplies them."""
FEWEST_IN_PARTS = 64
"""Rows from which on it pays to copy a weight's parts."""
ZEN_5 = 26
"""The family of AMD's processors from which on they have units as wide as AVX-512."""


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model whose products may be taken from elsewhere."""
    found = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module for module in found if type(module).forward is nn.Linear.forward]


@contextmanager
def quick_products(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """While inside, these layers take float32 products from the library that is fast on this processor."""
    longest = _longest()
    # A forward of its own is accelerate's, which moves weights about, or this one, entered twice. Forwards are replaced
    # rather than `functional.linear` watched for: a TorchFunctionMode makes every call of torch slower.
    quick = [layer for layer in layers if "forward" not in layer.__dict__] if longest else []
    for layer in quick:
        layer.__dict__["forward"] = partial(_forward, layer, longest)
    try:
        yield
    finally:
        for layer in quick:
            del layer.__dict__["forward"]


def _forward(layer: nn.Linear, longest: int, x: Tensor) -> Tensor:
    product = _linear if _suits(longest, x, layer.weight, layer.bias) else functional.linear
    return product(x, layer.weight, layer.bias)


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


def _suits(longest: int, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    given = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    if not all(each.device.type == "cpu" and each.dtype == torch.float32 for each in given):
        return False
    n_inputs = weight_OI.shape[1]
    fewest = FEWEST if n_inputs <= LONGEST else FEWEST_IN_PARTS
    enough = n_inputs <= longest and x.numel() >= fewest * n_inputs
    return enough and weight_OI.is_contiguous() and not torch.is_grad_enabled()


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
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
