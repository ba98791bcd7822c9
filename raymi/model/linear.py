"""Linear layers by oneDNN on CPUs where that is faster than the library that torch calls for float32.

torch multiplies float32 matrices on x86 by MKL, which leaves half of some processors unused (AMD's Zen 5: 95 GFLOP/s a
core, where oneDNN, which torch carries too, reaches 200). Which is faster is measured on the model's own layers.
"""

import time
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 96
"""Of the product that is timed: what a sweep of ablations typically has at a layer."""
WORTH = 1.15
"""How many times faster oneDNN has to be."""


def quicken(model: nn.Module) -> float:
    """Let the model's float32 linear layers compute by oneDNN if that is faster here and gives the same numbers.

    Returns:
        How many times faster the layers have become; 1.0 where nothing was changed.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _suits(m)]
    if not layers or not torch.backends.mkldnn.is_available():
        return 1.0
    largest = max((m for m in layers if m.out_features < 32_768), key=lambda m: m.weight.numel(), default=layers[0])
    x_RI = torch.linspace(-1, 1, ROWS * largest.in_features).view(ROWS, -1)
    try:
        faster = _gain(largest, x_RI)
    except (RuntimeError, AttributeError, NotImplementedError):  # the operator is torch's own affair, and may go
        return 1.0
    if faster < WORTH:
        return 1.0
    for layer in layers:
        cast(Any, layer).forward = partial(_forward, layer)
    return faster


def _suits(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _one_dnn(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != torch.float32:
        return functional.linear(x, layer.weight, layer.bias)
    return _one_dnn(layer, x)


@torch.no_grad()
def _gain(layer: nn.Linear, x_RI: Tensor) -> float:
    """How many times faster oneDNN is on a layer; 0 where it gives other numbers."""
    wanted, found = functional.linear(x_RI, layer.weight, layer.bias), _one_dnn(layer, x_RI)
    if float((wanted - found).abs().max()) > 2e-5 * float(wanted.abs().max()):
        return 0.0
    return _seconds(lambda: functional.linear(x_RI, layer.weight, layer.bias)) / _seconds(lambda: _one_dnn(layer, x_RI))


def _seconds(work: Any, times: int = 7) -> float:
    """The best of a few: the least disturbed."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(times))
