"""Norms without their weights, against the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from raymi.model.normalised import norm_among

D, EPS = 24, 1e-3


def expected(x: Tensor, *, centred: bool) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


NORMS: dict[str, tuple[Any, bool]] = {
    "llama": (lambda: LlamaRMSNorm(D, EPS), False),
    "gemma": (lambda: Gemma2RMSNorm(D, EPS), False),
    "torch": (lambda: nn.LayerNorm(D, EPS), True),
    "torch, no bias": (lambda: nn.LayerNorm(D, EPS, bias=False), True),
    "torch, rms": (lambda: nn.RMSNorm(D, EPS), False),
    "no weights": (lambda: nn.LayerNorm(D, EPS, elementwise_affine=False), True),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", NORMS)
def test_weights_are_left_out(kind: str, dtype: torch.dtype) -> None:
    made, centred = NORMS[kind]
    module = made().to(dtype)
    for parameter in module.parameters():
        parameter.normal_(0, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls: list[object] = []
    module.register_forward_hook(lambda *given: calls.append(given))
    x = (torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)) / 20 + 0.03).to(dtype)
    norm = norm_among([nn.Linear(D, D), nn.Identity(), module], x)
    assert norm is not None
    assert norm.module is module
    found = norm(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((found - expected(x, centred=centred)).abs().max()) < 1e-5
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Linear(D, D), nn.Tanh(), nn.GroupNorm(2, D), nn.Dropout(0.5), nn.RMSNorm(D // 2)],
)
def test_what_is_no_norm_over_the_width(module: nn.Module) -> None:
    assert norm_among([module], torch.zeros(2, 5, D)) is None


def test_a_norm_of_another_epsilon_keeps_it() -> None:
    x = torch.full((1, 1, D), 1e-4)
    x[..., ::2] *= -1
    [small] = (norm_among([OlmoLayerNorm(D)], x),)
    assert small is not None
    assert torch.equal(small(x), small.module(x))
