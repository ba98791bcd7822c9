"""Linear layers by oneDNN: the same numbers, only inside, only where they suit."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raymi.model import linear

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="oneDNN is for x86 here"
)


asked_anew = linear._longest.__wrapped__
"""What is said of this processor, not remembered and not replaced."""


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On every processor, so that all of them test it."""
    monkeypatch.setattr(linear, "_longest", lambda: sys.maxsize)
    with torch.no_grad():
        yield


def difference(layer: nn.Linear, x: Tensor) -> float:
    with linear.quick_products():
        found = layer(x)
    wanted = functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert found.shape == wanted.shape
    assert found.dtype == x.dtype
    return float((found - wanted).abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,), (1,), (70,), (2, 35)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (640, 9), (641, 9), (1536, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers(shape: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*shape, inputs)
    plain = functional.linear(x, layer.weight, layer.bias).double()
    exact = functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    usual = float((plain - exact).abs().max()) if x.numel() else 0.0
    assert difference(layer, x) <= max(5e-6, 3 * usual)


def test_it_really_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_linear", lambda x, weight, bias=None: x.new_full((len(x), len(weight)), 3.0))
    layer, x = nn.Linear(24, 40), torch.randn(linear.FEWEST, 24)
    with linear.quick_products():
        assert layer(x).eq(3.0).all()
    assert not layer(x).eq(3.0).any()


def test_long_products_are_added_up_in_parts() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8 * linear.LONGEST, 64, bias=False), torch.randn(linear.FEWEST_IN_PARTS, 8 * linear.LONGEST)
    in_parts = difference(layer, x)
    in_one = torch.ops.mkldnn._linear_pointwise(x, layer.weight, None, "none", [], "")
    exact = functional.linear(x.double(), layer.weight.double())
    assert in_parts < float((in_one - exact).abs().max())


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(50, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)),
        (torch.randn(50, 24, dtype=torch.bfloat16), torch.randn(5, 24, dtype=torch.bfloat16)),
        (torch.randn(50, 24), torch.randn(24, 5).T),
        (torch.randn(linear.FEWEST - 1, 24), torch.randn(5, 24)),
        (torch.randn(linear.FEWEST_IN_PARTS - 1, linear.LONGEST + 1), torch.randn(5, linear.LONGEST + 1)),
    ],
    ids=["float64", "bfloat16", "a weight that is a view", "few rows", "few rows of many inputs"],
)
def test_what_does_not_suit_goes_the_usual_way(x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(linear, "_linear")
    with linear.quick_products():
        assert functional.linear(x, weight).equal(functional.linear(x, weight))


def test_gradients_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(linear, "_linear")
    layer = nn.Linear(24, 40)
    with torch.enable_grad(), linear.quick_products():
        layer(torch.randn(50, 24)).sum().backward()
    assert layer.weight.grad is not None


def test_long_products_only_where_copies_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_longest", lambda: linear.LONGEST)
    monkeypatch.setattr(linear, "_linear", lambda x, weight, bias=None: x.new_full((len(x), len(weight)), 3.0))
    for inputs, quick in ((linear.LONGEST, True), (linear.LONGEST + 1, False)):
        with linear.quick_products():
            product = functional.linear(torch.randn(linear.FEWEST_IN_PARTS, inputs), torch.randn(5, inputs))
        assert bool(product.eq(3.0).all()) == quick


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "longest"),
    [
        ("AuthenticAMD", 26, "AVX512", sys.maxsize),
        ("AuthenticAMD", 25, "AVX512", linear.LONGEST),
        ("AuthenticAMD", 25, "AVX2", 0),
        ("GenuineIntel", 6, "AVX512", 0),
    ],
)
def test_which_processors_it_pays_on(
    vendor: str, family: int, capability: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"
    monkeypatch.setattr(Path, "read_text", lambda _: told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asked_anew() == longest


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_longest", lambda: 0)
    assert isinstance(linear.quick_products(), nullcontext)
