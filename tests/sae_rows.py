"""Rows of what autoencoders give, for tests that have neither model nor autoencoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.rows import MODEL, REVISION

SAE = "org/sae:res"
D, F = 5, 8
ABOUT: dict[str, Any] = {
    "model_id": MODEL,
    "revision": REVISION,
    "dtype": "float32",
    "sae": SAE,
    "sae_version": "1" * 40,
    "site": "blocks.1.hook_resid_post",
}


class Tokens:
    """Tokens of a few texts, what an autoencoder made of them, and what the model did then."""

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self.x = rng.normal(3, 2, (n, D))
        self.out = self.x + rng.normal(0, 0.5, (n, D))
        self.features = np.where(rng.random((n, F)) < 0.3, rng.random((n, F)), 0)
        self.features[:, 6:] = 0
        self.clean, self.sae, self.zeros = rng.random(n), 1 + rng.random(n), 4 + rng.random(n)
        self.kl, self.kl_zeros = rng.random(n) / 10, 3 + rng.random(n)

    def row(self, unit: str, **more: Any) -> dict[str, Any]:
        """One text's row of table `sae_quality`; its last token has no next one."""
        norm_in, norm_out = np.linalg.norm(self.x, axis=1), np.linalg.norm(self.out, axis=1)
        inner = (self.x * self.out).sum(1)
        fired = (self.features > 0).sum(0)
        at = np.flatnonzero(fired)
        return {
            **ABOUT,
            "unit_id": unit,
            "experiment": "quality",
            "skipped": "special tokens",
            "definitions": "sae_lens 6.54",
            "engine": "cone",
            "texts": 1,
            "d_sae": F,
            "tokens": len(self.x),
            "sum_x": self.x.sum(0).tolist(),
            "sum_x2": (norm_in**2).sum(),
            "sum_residual2": ((self.x - self.out) ** 2).sum(),
            "sum_out2": (norm_out**2).sum(),
            "sum_x_out": inner.sum(),
            "sum_norm_in": norm_in.sum(),
            "sum_norm_out": norm_out.sum(),
            "sum_norm_ratio": (norm_out / norm_in).sum(),
            "sum_cosine": (inner / norm_in / norm_out).sum(),
            "sum_l0": float(fired.sum()),
            "sum_l1": self.features.sum(),
            "fired_features": at.tolist(),
            "fired_tokens": fired[at].tolist(),
            "fired_texts": [1] * len(at),
            "loss_tokens": len(self.x) - 1,
            "sum_loss_clean": self.clean[:-1].sum(),
            "sum_loss_sae": self.sae[:-1].sum(),
            "sum_loss_ablated": self.zeros[:-1].sum(),
            "kl_tokens": len(self.x),
            "sum_kl_sae": self.kl.sum(),
            "sum_kl_ablated": self.kl_zeros.sum(),
            **more,
        }


def injected(strength: float, prompt: str, **more: Any) -> dict[str, Any]:
    name = f"{prompt}.{strength}.{more.get('feature')}"
    return {
        **ABOUT,
        "unit_id": "i",
        "experiment": "injection",
        "ablation_id": name,
        "prompt_id": prompt,
        "feature": 3,
        "strength": strength,
        "positions": [4],
        "kl": 0.5,
        "engine": "cone",
        **more,
    }


def moved(**changes: float) -> list[dict[str, Any]]:
    return [
        {"token_id": int(token[1:]), "prob_clean": 0.25, "prob_ablated": 0.25 + by} for token, by in changes.items()
    ]


def ablated(feature: int | None, prompt: str, values: Sequence[float] = (1.0,), **more: Any) -> dict[str, Any]:
    return {
        **ABOUT,
        "unit_id": "a",
        "experiment": "ablation",
        "skipped": "special tokens",
        "ablation_id": f"{prompt}.{feature}" if feature is not None else None,
        "prompt_id": prompt,
        "feature": feature,
        "positions": [*range(len(values))] if feature is not None else None,
        "values": [*values] if feature is not None else None,
        "engine": "cone",
        **more,
    }


def seen(prompt: str, position: int | None, active: Mapping[int, float], **more: Any) -> dict[str, Any]:
    order = sorted(active, key=lambda feature: -active[feature])
    return {
        **ABOUT,
        "unit_id": "f",
        "experiment": "features",
        "skipped": "special tokens and the first 1",
        "prompt_id": prompt,
        "n_tokens": 30,
        "position": position,
        "features": order if position is not None else None,
        "values": [active[feature] for feature in order] if position is not None else None,
        **more,
    }


def text(prompt: str, tokens: Sequence[str]) -> dict[str, Any]:
    return {"model_id": MODEL, "revision": REVISION, "prompt_id": prompt, "tokens": [*tokens]}
