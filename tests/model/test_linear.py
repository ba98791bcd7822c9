"""Linear layers by oneDNN: only where faster, and never other numbers."""

import pytest
import torch
from torch import nn

from raymi.model import linear
from raymi.model.loading import load


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Two:
    times = [2.0, 1.0]
    monkeypatch.setattr(linear, "_seconds", lambda work: times.pop(0))
    torch.manual_seed(0)
    model = Two()
    assert linear.quicken(model) == 2.0
    return model


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (0, 24), (1, 24)])
def test_the_same_numbers(quick: Two, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape)
    plain = Two()
    plain.load_state_dict(quick.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-6)


def test_it_really_is_another_way(quick: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_one_dnn", lambda layer, x: x.new_full((*x.shape[:-1], layer.out_features), 3.0))
    with torch.no_grad():
        assert quick(torch.randn(2, 24)).eq(3.0).all()


def test_gradients_and_other_dtypes_go_the_usual_way(quick: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(linear, "_one_dnn")
    quick(torch.randn(2, 24)).sum().backward()
    assert quick.up.weight.grad is not None
    with torch.no_grad():
        quick.double()(torch.randn(2, 24, dtype=torch.float64))


def test_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_seconds", lambda work: 1.0)
    model = Two()
    assert linear.quicken(model) == 1.0
    assert "forward" not in model.up.__dict__


def test_not_where_the_numbers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_one_dnn", lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias) + 1e-3)
    assert linear.quicken(Two()) == 1.0


def test_not_where_torch_has_it_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> torch.Tensor:
        raise AttributeError("mkldnn")

    monkeypatch.setattr(linear, "_one_dnn", gone)
    assert linear.quicken(Two()) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_only_float32(dtype: torch.dtype) -> None:
    assert linear.quicken(Two().to(dtype)) == 1.0


def test_loading_asks_for_it(demo_models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr("raymi.model.loading.quicken", asked.append)
    loaded = load(next(path for name, path in demo_models.items() if "glassllm-en" in name))
    assert asked == [loaded.model.model]
