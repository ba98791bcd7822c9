"""How good an autoencoder is: sums that merge exactly, and SAELens's metrics as functions of the sums.

Every definition is that of `sae_lens.evals` of today (6.54) unless it says otherwise; SAELens's own have changed over
the years, so `DEFINITIONS` belongs beside every number.

Legend: N tokens, D width of what is reconstructed, F features, T positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raymi.sae.autoencoder import Sparse
from raymi.sae.metrics import density_histogram as histogram_of
from raymi.sae.metrics import metrics as of_sums

DEFINITIONS = "sae_lens 6.54"
_SLICE = {"cpu": 1 << 19, "gpu": 1 << 24}
"""Logits that are compared at a time: on a CPU, few enough to stay in its caches."""
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

    def beside(self, spliced: tuple[float, float], ablated: tuple[float, float]) -> "Downstream":
        """The same tokens, with loss and divergence of the spliced and of the ablated model."""
        return replace(
            self,
            **dict(zip(("sum_loss_sae", "sum_kl_sae"), spliced, strict=True)),
            **dict(zip(("sum_loss_ablated", "sum_kl_ablated"), ablated, strict=True)),
        )

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


class Predictions:
    """What a model predicts behind some tokens, its log-probabilities made once however many others are compared."""

    def __init__(self, logits: Tensor, next_ids: Tensor) -> None:
        """Takes the clean predictions.

        Args:
            logits: [N, V], behind the tokens that count.
            next_ids: int64 [N], the token that follows each; -1 where the text ends.
        """
        self.log_p = logits.float().log_softmax(-1)
        self.p = self.log_p.exp()
        self.next_ids = next_ids.to(logits.device)

    @property
    def clean(self) -> Downstream:
        """The sums in which nothing but the clean predictions has a part."""
        followed = int((self.next_ids >= 0).sum())
        return Downstream(followed, sum_loss_clean=_loss(self.log_p, self.next_ids), tokens=len(self.log_p))

    @torch.no_grad()
    def compared(self, logits: Tensor) -> tuple[float, float]:
        """How far other predictions are off: in nats, the sum of their next-token losses and of KL(clean || other).

        Args:
            logits: [N, V], or [1, V] where they are the same behind every token.
        """
        if len(logits) == 1 < len(self.log_p):
            return self._compared_with_one(logits.float().log_softmax(-1))
        loss = divergence = 0.0
        step = max(1, _SLICE["cpu" if logits.device.type == "cpu" else "gpu"] // logits.shape[-1])
        for begin in range(0, len(logits), step):
            rows = slice(begin, begin + step)
            log_q = logits[rows].float().log_softmax(-1)
            loss += _loss(log_q, self.next_ids[rows])
            divergence += _divergence(self.p[rows], self.log_p[rows], log_q)
        return loss, divergence

    def _compared_with_one(self, log_q: Tensor) -> tuple[float, float]:
        # sum_n sum_v p (log p - log q), where q is the same for all n. It is far from p: nothing cancels.
        divergence = self._negentropy - float(self._mass @ log_q[0].cpu().double())
        return _loss(log_q.expand(len(self.log_p), -1), self.next_ids), divergence

    @cached_property
    def _negentropy(self) -> float:
        return _sum((self.p * self.log_p).sum(-1))

    @cached_property
    def _mass(self) -> Tensor:
        """Of every token of the vocabulary behind all of these tokens together, float64 [V]."""
        return self.p.sum(0).cpu().double()


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
    predictions = Predictions(clean[counts], following(tokens[None])[0][counts])
    return predictions.clean.beside(predictions.compared(spliced[counts]), predictions.compared(ablated[counts]))


def following(tokens: Tensor) -> Tensor:
    """The token that follows each one, int64 [B, T] as `tokens`; -1 behind the last."""
    return torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], 1)


def metrics(sums: Reconstruction, further: Downstream | None = None) -> dict[str, float | None]:
    """All metrics by SAELens's keys, as `raymi.sae.metrics.metrics` defines them."""
    return of_sums({**columns(sums), **(columns(further) if further else {})})


def density(sums: Reconstruction) -> Tensor:
    """The share of tokens at which each feature is active, float64 [F]."""
    return sums.fired.double() / max(sums.tokens, 1)


def consistency(sums: Reconstruction) -> Tensor:
    """SAELens's consistent_activation_heuristic, float64 [F]: how often a feature fires in prompts in which it does.

    NaN for features that never fire, as there.
    """
    return sums.fired.double() / sums.prompts_fired


def density_histogram(sums: Reconstruction, per_decade: int = 2) -> list[tuple[float, float, int]]:
    """How many features have which density: (from, below, features), `per_decade` steps to a power of ten."""
    return histogram_of(sums.fired.tolist(), sums.tokens, per_decade)


def columns(sums: Reconstruction | Downstream) -> dict[str, Any]:
    """Sums as plain values, under the names of table `sae_quality`; nothing is said of features that never fired."""
    values = record(sums)
    if isinstance(sums, Downstream):
        return {"kl_tokens" if name == "tokens" else name: value for name, value in values.items()}
    alive = sums.fired.nonzero()[:, 0]
    del values["fired"], values["prompts_fired"]
    return {
        **values,
        "d_sae": len(sums.fired),
        "fired_features": alive.tolist(),
        "fired_tokens": sums.fired[alive].tolist(),
        "fired_texts": sums.prompts_fired[alive].tolist(),
    }


def record(sums: Reconstruction | Downstream) -> dict[str, Any]:
    """Sums as plain values for a table; `from_record` takes them back."""
    values = {field.name: getattr(sums, field.name) for field in fields(sums)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def from_record(values: Mapping[str, Any]) -> Reconstruction:
    """Reconstruction sums out of what `record` made of them."""
    dtypes = {"sum_x": torch.float64, "fired": torch.int64, "prompts_fired": torch.int64}
    restored: dict[str, Any] = {n: torch.tensor(v, dtype=dtypes[n]) if n in dtypes else v for n, v in values.items()}
    return Reconstruction(**restored)


def _loss(log_q: Tensor, next_ids: Tensor) -> float:
    """Sum of the cross-entropies of the tokens that follow, in nats."""
    followed = (next_ids >= 0).nonzero()[:, 0]
    return -_sum(log_q[followed, next_ids[followed]])


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> float:
    """Sum of KL(p || q) in nats, termwise non-negative: sum p (expm1(d) - d) with d = log q - log p."""
    difference = log_q - log_p
    terms = difference.expm1().sub_(difference).mul_(p)
    if bool(difference.amax() > 80):  # where expm1 overflows, p is nothing: only q is left
        terms = torch.where(difference > 80, log_q.exp(), terms)
    return _sum(terms.sum(-1))


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
