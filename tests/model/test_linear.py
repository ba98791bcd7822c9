"""Linear layers by oneDNN: the same numbers, only inside, only where they suit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raymi.model import linear

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="oneDNN is for x86 here"
)


asked_anew = linear._pays.__wrapped__
"""What is said of this processor, not remembered and not replaced."""


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On every processor, so that all of them test it."""
    monkeypatch.setattr(linear, "_pays", lambda: True)
    with torch.no_grad():
        yield


def difference(layer: nn.Linear, x: Tensor) -> float:
    with linear.quick_products([layer]):
        found = layer(x)
    wanted = functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert found.shape == wanted.shape
    assert found.dtype == x.dtype
    return float((found - wanted).abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("shape", [(7,), (0,), (1,), (16,), (70,), (2, 35)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (640, 9), (5000, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers(shape: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*shape, inputs)
    plain = functional.linear(x, layer.weight, layer.bias).double()
    exact = functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    usual = float((plain - exact).abs().max()) if x.numel() else 0.0
    assert difference(layer, x) <= max(5e-6, 4 * usual)
    linear.lay_out(layer)
    assert difference(layer, x) <= max(5e-6, 4 * usual)


def three(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What nothing else would give."""
    return x.new_full((*x.shape[:-1], len(weight)), 3.0)


def is_quick(layer: nn.Linear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patch, linear.quick_products([layer]):
        patch.setattr(linear, "_by_onednn", three)
        return bool(layer(x).eq(3.0).all())


def test_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(linear.FEWEST, 24)
    monkeypatch.setattr(linear, "_by_onednn", three)
    with linear.quick_products([layer]):
        assert layer(x).eq(3.0).all()
        with pytest.raises(RuntimeError), linear.quick_products([layer]):
            layer(torch.randn(1, 2))
        assert layer(x).eq(3.0).all()
    assert not layer(x).eq(3.0).any()


@pytest.mark.parametrize(
    ("rows", "inputs", "dtype"),
    [(50, 24, torch.float64), (50, 24, torch.bfloat16), (linear.FEWEST - 1, 24, torch.float32)],
    ids=["float64", "bfloat16", "few rows"],
)
def test_what_does_not_suit_goes_the_usual_way(
    rows: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(inputs, 5, dtype=dtype), torch.randn(rows, inputs, dtype=dtype)
    assert not is_quick(layer, x, monkeypatch)
    with linear.quick_products([layer]):
        assert layer(x).equal(functional.linear(x, layer.weight, layer.bias))


class Numbers(Tensor):
    """As quantised weights are."""


@pytest.mark.parametrize("bias", [torch.randn(10)[::2], Numbers(torch.randn(5))], ids=["a view", "of another class"])
def test_a_bias_that_is_no_plain_row_of_numbers_goes_the_usual_way(
    bias: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(24, 5), torch.randn(50, 24)
    layer.bias = nn.Parameter(bias)
    assert not is_quick(layer, x, monkeypatch)
    with linear.quick_products([layer]):
        assert layer(x).equal(functional.linear(x, layer.weight, layer.bias))


def test_a_weight_with_gaps_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 5)
    assert is_quick(layer, torch.randn(50, 24), monkeypatch)
    for weight in (torch.randn(24, 10).T[::2], torch.randn(5, 48)[:, ::2], torch.randn(48, 5)[::2].T):
        layer.weight = nn.Parameter(weight)
        assert not is_quick(layer, torch.randn(50, 24), monkeypatch)


def test_weights_are_laid_out_where_nothing_else_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner, self.half = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 24).half()
            self.head, self.one, self.same = nn.Linear(24, 40), nn.Linear(24, 8), nn.Linear(24, 8)
            self.head.weight, self.same.weight = self.embedding.weight, self.one.weight

    model = Model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    linear.lay_out(model)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    assert strides["embedding.weight"] == (24, 1)
    assert strides["half.weight"] == (24, 1)
    assert strides["inner.weight"] == (1, 24)
    assert strides["one.weight"] == (1, 8)
    assert model.same.weight is model.one.weight
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name])
    assert is_quick(model.inner, torch.randn(50, 24), monkeypatch)
    monkeypatch.setattr(linear, "_pays", lambda: False)
    linear.lay_out(other := nn.Linear(24, 24))
    assert other.weight.is_contiguous()


def test_gradients_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 40)
    with torch.enable_grad(), linear.quick_products([layer]):
        layer(torch.randn(50, 24)).sum().backward()
    assert layer.weight.grad is not None


def test_only_layers_that_are_plainly_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain, other, moved = nn.Linear(24, 40), Twice(24, 40), nn.Linear(24, 40)
    moved.forward = lambda x: x + 7  # as accelerate does
    x = torch.randn(50, 24)
    monkeypatch.setattr(linear, "_by_onednn", three)
    with linear.quick_products(linear.linear_layers(nn.Sequential(plain, other, moved))):
        assert plain(x).eq(3.0).all()
        assert not other(x).eq(6.0).any()
        assert moved(x).equal(x + 7)
    assert moved(x).equal(x + 7)


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_which_processors_it_pays_on(vendor: str, capability: str, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id\t: {vendor}\ncpu family\t: 25\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asked_anew() == pays


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_pays", lambda: False)
    assert not is_quick(nn.Linear(24, 40), torch.randn(50, 24), monkeypatch)
