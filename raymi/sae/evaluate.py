"""How good an autoencoder is: sums that merge exactly, and SAELens's metrics as functions of the sums.

Every definition is that of `sae_lens.evals` of today (6.54) unless it says otherwise; SAELens's own have changed over
the years, so `DEFINITIONS` belongs beside every number.

Legend: N tokens, D width of what is reconstructed, F features, T positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from raymi.sae.autoencoder import Sparse

DEFINITIONS = "sae_lens 6.54"
_SLICE = 1 << 24
"""Logits that are compared at a time."""
_TINY = 1e-4
"""SAELens divides by 1 in place of a norm below it."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Sums over tokens of what an autoencoder made of their activations. `a + b` is of the tokens of both."""

    tokens: int
    sum_x: Tensor
    """float64 [D]"""
    sum_x2: float
    """Of squared norms, as are the next two."""
    sum_residual2: float
    sum_out2: float
    sum_x_out: float
    """Of inner products of activation and reconstruction."""
    sum_norm_in: float
    sum_norm_out: float
    sum_norm_ratio: float
    sum_cosine: float
    sum_l0: float
    sum_l1: float
    fired: Tensor
    """int64 [F]: tokens at which each feature is active."""
    prompts_fired: Tensor
    """int64 [F]: prompts in which it is. Prompts must not be split between two sums."""

    def __add__(self, other: "Reconstruction") -> "Reconstruction":
        return Reconstruction(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Downstream:
    """Sums over tokens of what happened to the model's output. `a + b` is of the tokens of both."""

    loss_tokens: int = 0
    """Tokens that have a next one."""
    sum_loss_clean: float = 0.0
    sum_loss_sae: float = 0.0
    sum_loss_ablated: float = 0.0
    tokens: int = 0
    sum_kl_sae: float = 0.0
    sum_kl_ablated: float = 0.0

    def __add__(self, other: "Downstream") -> "Downstream":
        return Downstream(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@torch.no_grad()
def reconstruction(x: Tensor, out: Tensor, features: Sparse, prompts: Tensor | None = None) -> Reconstruction:
    """Sums of some tokens; leave out those that should not count.

    Args:
        x: [N, D], what was to be reconstructed.
        out: [N, D], the reconstruction.
        features: of the same N tokens.
        prompts: [N], any number for each prompt; None when they are all of one.
    """
    n_features, device = features.shape[-1], features.indices.device
    x, out = x.to(device, torch.float32), out.to(device, torch.float32)
    # The variance is what is left of squared norms: in float32 little, where the mean is large.
    norm_in, norm_out, inner = x.double().norm(dim=-1), out.double().norm(dim=-1), (x * out).sum(-1)
    ratio = norm_out / torch.where(norm_in < _TINY, 1.0, norm_in)
    # Where SAELens has NaN, for an activation or a reconstruction of nothing but zeros, the cosine is 0.
    norms = norm_in * norm_out
    cosine = torch.where(norms > 0, inner / norms, torch.where(norms.isnan(), norms, 0.0))
    prompts = torch.zeros(len(x), dtype=torch.int64) if prompts is None else prompts
    fired_in = torch.unique(prompts.to(device, torch.int64)[features.rows] * n_features + features.indices) % n_features
    return Reconstruction(
        tokens=len(x),
        sum_x=x.sum(0, dtype=torch.float64).cpu(),
        sum_x2=_sum(norm_in.square()),
        sum_residual2=_sum((x - out).square()),
        sum_out2=_sum(norm_out.square()),
        sum_x_out=_sum(inner),
        sum_norm_in=_sum(norm_in),
        sum_norm_out=_sum(norm_out),
        sum_norm_ratio=_sum(ratio),
        sum_cosine=_sum(cosine),
        sum_l0=float(len(features.indices)),
        sum_l1=_sum(features.values.abs()),
        fired=torch.bincount(features.indices, minlength=n_features).cpu(),
        prompts_fired=torch.bincount(fired_in, minlength=n_features).cpu(),
    )


@torch.no_grad()
def downstream(tokens: Tensor, clean: Tensor, spliced: Tensor, ablated: Tensor, counts: Tensor) -> Downstream:
    """Sums of one text.

    Args:
        tokens: int64 [T].
        clean: the model's logits, [T, V].
        spliced: those with the autoencoder in its way, [T, V]. Where a token does not count, SAELens leaves the
            activation as it was.
        ablated: those with zeros in place of all activations, [T, V].
        counts: bool [T], which tokens count: by the token that is read, not the one that is predicted.
    """
    last = counts.clone()
    last[-1:] = False
    return Downstream(
        loss_tokens=int(last.sum()),
        sum_loss_clean=_loss(clean, tokens, last),
        sum_loss_sae=_loss(spliced, tokens, last),
        sum_loss_ablated=_loss(ablated, tokens, last),
        tokens=int(counts.sum()),
        sum_kl_sae=_divergence(clean, spliced, counts),
        sum_kl_ablated=_divergence(clean, ablated, counts),
    )


def metrics(sums: Reconstruction, further: Downstream | None = None) -> dict[str, float | None]:
    """All metrics by SAELens's keys; None where one is not defined (a division by zero).

    Beside them `mse_per_element` (`mse` is a sum over the width), `fvu` (1 - explained variance), `dead_features`,
    those that fired at no token, and `frac_alive`, SAEBench's. `relative_reconstruction_bias` is the ratio of the means
    over all tokens, where SAELens averages the ratios of batches.
    """
    n = sums.tokens
    variance = _over(sums.sum_x2, n, minus=float((sums.sum_x / max(n, 1)).square().sum()))
    mse = _over(sums.sum_residual2, n)
    unexplained = _unexplained(mse, variance)
    dead = int((sums.fired == 0).sum())
    found: dict[str, float | None] = {
        "l0": _over(sums.sum_l0, n),
        "l1": _over(sums.sum_l1, n),
        "mse": mse,
        "mse_per_element": None if mse is None else mse / len(sums.sum_x),
        "explained_variance": None if unexplained is None else 1 - unexplained,
        "fvu": unexplained,
        "cossim": _over(sums.sum_cosine, n),
        "l2_norm_in": _over(sums.sum_norm_in, n),
        "l2_norm_out": _over(sums.sum_norm_out, n),
        "l2_ratio": _over(sums.sum_norm_ratio, n),
        "relative_reconstruction_bias": _over(sums.sum_out2, sums.sum_x_out),
        "dead_features": float(dead),
        "frac_alive": 1 - dead / len(sums.fired),
    }
    return found | _downstream_metrics(further) if further else found


def density(sums: Reconstruction) -> Tensor:
    """The share of tokens at which each feature is active, float64 [F]."""
    return sums.fired.double() / max(sums.tokens, 1)


def consistency(sums: Reconstruction) -> Tensor:
    """SAELens's consistent_activation_heuristic, float64 [F]: how often a feature fires in prompts in which it does.

    NaN for features that never fire, as there.
    """
    return sums.fired.double() / sums.prompts_fired


def density_histogram(sums: Reconstruction, per_decade: int = 2) -> list[tuple[float, float, int]]:
    """How many features have which density, in equal steps of its logarithm.

    Args:
        sums: of the tokens.
        per_decade: steps from one power of ten to the next.

    Returns:
        (from, below, features), ending with densities of 1. Dead features are in none of them.
    """
    alive = density(sums)[sums.fired > 0]
    if not len(alive):
        return []
    # A little above the edge, so that a density of exactly 10^-k is not lost to rounding.
    steps = (alive.log10() * per_decade + 1e-9).floor().long()
    counts = torch.bincount(steps - steps.min())
    first = int(steps.min())
    return [
        (10 ** ((first + i) / per_decade), 10 ** ((first + i + 1) / per_decade), int(c)) for i, c in enumerate(counts)
    ]


def record(sums: Reconstruction | Downstream) -> dict[str, Any]:
    """Sums as plain values for a table; `from_record` takes them back."""
    values = {field.name: getattr(sums, field.name) for field in fields(sums)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def from_record(values: Mapping[str, Any]) -> Reconstruction:
    """Reconstruction sums out of what `record` made of them."""
    dtypes = {"sum_x": torch.float64, "fired": torch.int64, "prompts_fired": torch.int64}
    restored: dict[str, Any] = {n: torch.tensor(v, dtype=dtypes[n]) if n in dtypes else v for n, v in values.items()}
    return Reconstruction(**restored)


def _downstream_metrics(sums: Downstream) -> dict[str, float | None]:
    n, m = sums.loss_tokens, sums.tokens
    recovered = sums.sum_loss_ablated - sums.sum_loss_sae
    return {
        "ce_loss_without_sae": _over(sums.sum_loss_clean, n),
        "ce_loss_with_sae": _over(sums.sum_loss_sae, n),
        "ce_loss_with_ablation": _over(sums.sum_loss_ablated, n),
        "ce_loss_score": _over(recovered, sums.sum_loss_ablated - sums.sum_loss_clean),
        "kl_div_with_sae": _over(sums.sum_kl_sae, m),
        "kl_div_with_ablation": _over(sums.sum_kl_ablated, m),
        "kl_div_score": _over(sums.sum_kl_ablated - sums.sum_kl_sae, sums.sum_kl_ablated),
    }


def _loss(logits: Tensor, tokens: Tensor, counts: Tensor) -> float:
    """Sum of the cross-entropies of the next tokens, in nats."""
    total = 0.0
    positions = counts.nonzero()[:, 0]
    for chosen in positions.split(max(1, _SLICE // logits.shape[-1])):
        log_q = logits[chosen].float().log_softmax(-1)
        total -= _sum(log_q.gather(1, tokens.to(log_q.device)[chosen + 1][:, None]))
    return total


def _divergence(clean: Tensor, other: Tensor, counts: Tensor) -> float:
    """Sum of KL(clean || other) in nats, termwise non-negative: sum p (expm1(d) - d) with d = log q - log p."""
    total = 0.0
    positions = counts.nonzero()[:, 0]
    for chosen in positions.split(max(1, _SLICE // clean.shape[-1])):
        log_p, log_q = clean[chosen].float().log_softmax(-1), other[chosen].float().log_softmax(-1)
        difference = log_q - log_p
        total += _sum(log_p.exp() * (difference.expm1() - difference))
    return total


def _unexplained(mse: float | None, variance: float | None) -> float | None:
    if mse is None or variance is None:
        return None
    if variance < 1e-10:
        return 0.0 if mse < 1e-10 else 1.0
    return mse / variance


def _over(total: float, n: float, *, minus: float = 0.0) -> float | None:
    return None if n == 0 else total / n - minus


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
