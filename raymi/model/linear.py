"""Matrix products by oneDNN on processors that the library which torch calls leaves partly unused.

On x86, torch multiplies float32 matrices by MKL, which has AVX-512 for Intel's processors only. oneDNN, which torch
carries too and does not use here by itself (`mkldnn`, as `torch.compile` calls it), has it for all: 240 GFLOP/s against
110 on a core of AMD's Zen 5; on Zen 4, whose units are half as wide, 10 to 60 % more. Nothing is timed: one machine
always computes in one way.

oneDNN rounds twice as much as MKL does. Logits come out as near to float64's as those of plain float32 forwards
(7.7e-5 and 6.4e-5 at most on a Llama of 30 layers, where MKL in the cone gives 5.9e-5).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST = 16
"""Rows from which on it pays: fewer wait for memory, whoever multiplies them."""


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model whose products may be taken from elsewhere."""
    found = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module for module in found if type(module).forward is nn.Linear.forward]


@contextmanager
def quick_products(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """While inside, these layers take float32 products from the library that is fast on this processor."""
    # A forward of its own is accelerate's, which moves weights about, or this one, entered twice. Forwards are replaced
    # rather than `functional.linear` watched for: a TorchFunctionMode makes every call of torch slower.
    quick = [layer for layer in layers if "forward" not in layer.__dict__] if _pays() else []
    for layer in quick:
        layer.__dict__["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in quick:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    product = _by_onednn if _suits(x, layer.weight, layer.bias) else functional.linear
    return product(x, layer.weight, layer.bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (weight,) if bias is None else (weight, bias)
    # oneDNN reads past the gaps of what is not contiguous, and knows no tensor that is more than its numbers.
    plain = all(type(each) in _PLAIN and type(each.data) is Tensor and each.is_contiguous() for each in given)
    fits = all(each.device.type == "cpu" and each.dtype == torch.float32 for each in (x, *given))
    return plain and fits and x.numel() >= FEWEST * weight.shape[1] and not torch.is_grad_enabled()


_PLAIN = (Tensor, nn.Parameter)


@cache
def _pays() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        # No part of torch's documented interface: an older or a newer one may lack it.
        torch.ops.mkldnn._linear_pointwise.default  # noqa: B018
    except (OSError, AttributeError):
        return False
    return amd
