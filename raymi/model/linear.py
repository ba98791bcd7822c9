"""Matrix products by oneDNN on processors that the library which torch calls leaves partly unused.

On x86, torch multiplies float32 matrices by MKL, which has AVX-512 for Intel's processors only. oneDNN, which torch
carries too and does not use here by itself (`mkldnn`, as `torch.compile` calls it), has it for all: 240 GFLOP/s against
110 on a core of AMD's Zen 5; on Zen 4, whose units are half as wide, 10 to 60 % more. Nothing is timed: one machine
always computes in one way.

It copies a weight into an order of its own for every product, which takes a tenth of the time of one with 100 rows.
Weights that are stored column by column are nearer to that order, or need no copy at all: products take 5 to 15 % less.
Packing them beforehand gains hardly more, takes their memory twice, and would go stale unseen.

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

FEWEST = 2
"""Rows from which on it pays: a single one waits for memory, whoever multiplies it."""


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model whose products may be taken from elsewhere."""
    found = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module for module in found if type(module).forward is nn.Linear.forward]


def lay_out(model: nn.Module) -> None:
    """Store the weights of linear layers as quick products read them best: the same tensors, with other strides.

    Only where quick products pay. What something else than linear layers uses, too (an embedding that is the head),
    stays as it is, and so does a weight that is no plain contiguous float32 tensor.
    """
    if not _pays():
        return
    layers = linear_layers(model)
    ours = {id(layer) for layer in layers}
    others = {id(p) for module in model.modules() if id(module) not in ours for p in module.parameters(recurse=False)}
    for layer in layers:
        weight = layer.weight
        if id(weight) not in others and _is_plain(weight) and weight.dtype == torch.float32 and weight.is_contiguous():
            weight.data = weight.data.t().contiguous().t()


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
    # oneDNN reads past the gaps of what is not contiguous.
    whole = weight.is_contiguous() or (weight.stride(0) == 1 and weight.stride(1) == weight.shape[0])
    if not (whole and _is_plain(weight) and weight.dtype == x.dtype == torch.float32 and x.device.type == "cpu"):
        return False
    if bias is not None and not (_is_plain(bias) and bias.dtype == torch.float32 and bias.is_contiguous()):
        return False
    return x.numel() >= FEWEST * weight.shape[1] and not torch.is_grad_enabled()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is in memory and no more than its numbers, as a quantised one is."""
    return type(tensor) in _PLAIN and type(tensor.data) is Tensor and tensor.device.type == "cpu"


_PLAIN = (Tensor, nn.Parameter)


@cache
def _pays() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        # No part of torch's documented interface: an older or a newer one may lack it.
        return amd and _multiplies()
    except (OSError, AttributeError, RuntimeError):
        return False


@torch.no_grad()
def _multiplies() -> bool:
    """Whether it takes weights of either order for what they are, which no documentation promises."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 48), (64, 48), (64,)))
    wanted = functional.linear(x, weight, bias)
    return all(
        torch.allclose(_by_onednn(x, each, bias), wanted, atol=1e-4, rtol=0)
        for each in (weight, weight.t().contiguous().t())
    )
