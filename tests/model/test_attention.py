"""The attention function by itself, against sums written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raymi.model.attention import IGNORED, Tap, UnsupportedAttention, attach, attention, cuts

B, H, K, T, D, DV = 2, 4, 2, 6, 8, 5


class Module(nn.Module):
    layer_idx = 3
    is_causal = True


def inputs(seed: int = 0, width: int = D, value_width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, width), (B, K, T, width), (B, K, T, value_width))
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)  # pyright: ignore[reportReturnType]


CAUSAL = np.tril(np.ones((T, T), dtype=bool))


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: np.ndarray = CAUSAL,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, T, H, Dv] and pattern [B, H, T, T]; `allowed` broadcasts to the pattern."""
    q, k, v = (states.double().numpy() for states in (query, key, value))
    k, v = (np.repeat(states, H // K, axis=1) for states in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * (scaling or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double().numpy()
    weights = np.exp(scores) * np.broadcast_to(allowed, scores.shape)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.double().numpy())[None, :, None, None]
    pattern = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return (pattern @ v).transpose(0, 2, 1, 3), pattern


def run(*states: Tensor, mask: Tensor | None = None, cut: list[tuple[int, int, int, int]] | None = None, **given: Any):
    """Output, captured pattern and the tap, which tells what fired."""
    module, tap = Module(), Tap()
    attach(module, tap)
    tap.begin(B, torch.device("cpu"))
    tap.captures[3, "pattern"] = None
    if cut:
        tap.cuts |= cuts(torch.tensor([(3, *edge) for edge in cut]).T, B, torch.device("cpu"))
    out, _ = attention(module, *states, mask, **given)
    return out, tap.captures[3, "pattern"], tap


def close(ours: Tensor | None, theirs: np.ndarray) -> None:
    assert ours is not None
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


MASKS = {
    "none": None,
    "bool": torch.from_numpy(CAUSAL)[None, None],
    "float": torch.where(torch.from_numpy(CAUSAL), 0.0, torch.finfo(torch.float32).min)[None, None],
    "minus infinity": torch.where(torch.from_numpy(CAUSAL), 0.0, -torch.inf)[None, None],
    "a head each": torch.from_numpy(CAUSAL).expand(B, H, T, T),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "given",
    [{}, {"scaling": 0.3}, {"softcap": 1.5}, {"softcap": 1.5, "scaling": 2.0}, {"s_aux": torch.linspace(-1, 2, H)}],
    ids=lambda given: "+".join(given) or "plain",
)
def test_what_families_pass(mask: str, given: dict[str, Any]):
    states = inputs(value_width=DV)
    ours, pattern, _ = run(*states, mask=MASKS[mask], **given)
    wanted = {"sinks" if name == "s_aux" else name: value for name, value in given.items()}
    output, weights = expected(*states, **wanted)
    close(ours, output)
    close(pattern, weights)


@pytest.mark.parametrize("heads", [1, H])
def test_a_position_bias_is_added_to_the_scores(heads: int):
    bias = torch.randn(1, heads, T, T, generator=torch.Generator().manual_seed(3))
    states = inputs()
    close(run(*states, mask=MASKS["bool"], position_bias=bias)[0], expected(*states, bias=bias)[0])


def test_a_mask_may_carry_a_bias():
    """Alibi comes this way in some families: numbers that are not just allowed or forbidden."""
    bias = torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(3))
    states = inputs()
    close(run(*states, mask=bias.masked_fill(~torch.from_numpy(CAUSAL), -3e38))[0], expected(*states, bias=bias)[0])


def test_a_module_that_is_not_causal_sees_everything():
    module, states = Module(), inputs()
    module.is_causal = False
    close(attention(module, *states, None)[0], expected(*states, allowed=np.ones((T, T), dtype=bool))[0])


EDGES = [(0, 1, 4, 2), (0, 1, 4, 0), (0, 3, 5, 5), (1, 0, 3, 1)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("given", [{}, {"softcap": 1.5}, {"s_aux": torch.linspace(-1, 2, H)}], ids=str)
def test_cut_edges_of_rows_and_heads(mask: str, given: dict[str, Any]):
    states = inputs()
    ours, pattern, tap = run(*states, mask=MASKS[mask], cut=EDGES, **given)
    allowed = np.broadcast_to(CAUSAL, (B, H, T, T)).copy()
    for row, head, query, key in EDGES:
        allowed[row, head, query, key] = False
    wanted = {"sinks" if name == "s_aux" else name: value for name, value in given.items()}
    output, weights = expected(*states, allowed=allowed, **wanted)
    close(ours, output)
    close(pattern, weights)
    assert tap.fired_B is not None
    assert tap.fired_B.tolist() == [3, 1]
    assert tap.empty_B is not None
    assert tap.empty_B.tolist() == [0, 0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("given", [{}, {"softcap": 1.5}, {"s_aux": torch.linspace(-1, 2, H)}], ids=str)
def test_a_line_without_keys_attends_to_nothing(mask: str, given: dict[str, Any]):
    cut = [(1, 2, 3, key) for key in range(4)] + [(0, 0, 0, 0)]
    ours, pattern, tap = run(*inputs(), mask=MASKS[mask], cut=cut, **given)
    assert not ours[1, 3, 2].any()
    assert not ours[0, 0, 0].any()
    assert pattern is not None
    assert not pattern[1, 2, 3].any()
    assert ours.isfinite().all()
    assert tap.empty_B is not None
    assert tap.empty_B.tolist() == [1, 1]
    assert int((ours == 0).all(-1).sum()) == 2  # and no other line of any head


@pytest.mark.parametrize("name", ["indices", "head_mask", "attn_bias", "something_new"])
def test_an_unknown_argument_fails(name: str):
    with pytest.raises(UnsupportedAttention, match=f"Module passes {name}"):
        run(*inputs(), **{name: torch.zeros(1)})
    run(*inputs(), **{name: None})  # absent, by another name


def test_what_is_ignored_changes_nothing():
    assert torch.equal(run(*inputs())[0], run(*inputs(), **dict.fromkeys(IGNORED, 3))[0])


def test_masks_of_one_forward_are_told_apart():
    """Whether a mask forbids anything is looked at once a forward: another one at the same address is another one."""
    module, tap, (query, key, value) = Module(), Tap(), inputs()
    attach(module, tap)
    tap.begin(B, torch.device("cpu"))
    mask = torch.from_numpy(CAUSAL.copy())[None, None]
    attention(module, query, key[:, :, :1], value[:, :, :1], mask[..., :1])  # a column that forbids nothing
    close(attention(module, query, key, value, mask)[0], expected(query, key, value)[0])

    for _ in range(20):  # freed memory is given out again
        attention(module, query, key, value, torch.ones(1, 1, T, T, dtype=torch.bool))
        causal = torch.from_numpy(CAUSAL)[None, None].clone()
        close(attention(module, query, key, value, causal)[0], expected(query, key, value)[0])
