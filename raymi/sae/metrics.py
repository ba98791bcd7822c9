"""SAELens's metrics as functions of sums, and sums that add up. No torch: reports are made without it.

The sums are those of a row of table `sae_quality`, under its names; `raymi.sae.evaluate` makes them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OF_FEATURES = ("fired_features", "fired_tokens", "fired_texts")
SUMMED = (
    *("texts", "tokens", "sum_x2", "sum_residual2", "sum_out2", "sum_x_out"),
    *("sum_norm_in", "sum_norm_out", "sum_norm_ratio", "sum_cosine", "sum_l0", "sum_l1"),
    *("loss_tokens", "sum_loss_clean", "sum_loss_sae", "sum_loss_ablated"),
    *("kl_tokens", "sum_kl_sae", "sum_kl_ablated"),
)
"""What is one number a row, and adds up as it stands."""


def merged(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of all texts of some rows: what one row over all these texts would hold.

    Args:
        rows: of one autoencoder on one model with one definition of what counts, no text in two of them.

    Returns:
        `SUMMED`, `sum_x`, `d_sae` and the three lists of features that fired.

    Raises:
        ValueError: there are no rows, or they are of autoencoders of different widths.
    """
    listed = list(rows)
    if len({(row["d_sae"], len(row["sum_x"])) for row in listed}) != 1:
        raise ValueError("rows of one autoencoder can be added, and there must be one")
    tokens, texts = Counter[int](), Counter[int]()
    for row in listed:
        tokens.update(dict(zip(row["fired_features"], row["fired_tokens"], strict=True)))
        texts.update(dict(zip(row["fired_features"], row["fired_texts"], strict=True)))
    features = sorted(tokens)
    return {
        **{name: sum(row[name] for row in listed) for name in SUMMED},
        "sum_x": [math.fsum(column) for column in zip(*(row["sum_x"] for row in listed), strict=True)],
        "d_sae": listed[0]["d_sae"],
        "fired_features": features,
        "fired_tokens": [tokens[feature] for feature in features],
        "fired_texts": [texts[feature] for feature in features],
    }


def metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics by SAELens's keys; None where one is not defined (a division by zero).

    Beside them `mse_per_element` (`mse` is a sum over the width), `fvu` (1 - explained variance), `dead_features`,
    those that fired at no token, and `frac_alive`, SAEBench's. `relative_reconstruction_bias` is the ratio of the means
    over all tokens, where SAELens averages the ratios of batches.

    Args:
        values: sums by the names of table `sae_quality`; without `loss_tokens`, nothing is said of the model's output.
    """
    n, width = values["tokens"], len(values["sum_x"])
    variance = _over(values["sum_x2"], n, minus=math.fsum((x / max(n, 1)) ** 2 for x in values["sum_x"]))
    mse = _over(values["sum_residual2"], n)
    unexplained = _unexplained(mse, variance)
    dead = values["d_sae"] - len(values["fired_features"])
    found: dict[str, float | None] = {
        "l0": _over(values["sum_l0"], n),
        "l1": _over(values["sum_l1"], n),
        "mse": mse,
        "mse_per_element": None if mse is None else mse / width,
        "explained_variance": None if unexplained is None else 1 - unexplained,
        "fvu": unexplained,
        "cossim": _over(values["sum_cosine"], n),
        "l2_norm_in": _over(values["sum_norm_in"], n),
        "l2_norm_out": _over(values["sum_norm_out"], n),
        "l2_ratio": _over(values["sum_norm_ratio"], n),
        "relative_reconstruction_bias": _over(values["sum_out2"], values["sum_x_out"]),
        "dead_features": float(dead),
        "frac_alive": 1 - dead / values["d_sae"],
    }
    return found | _downstream(values) if "loss_tokens" in values else found


def density_histogram(fired: Sequence[int], tokens: int, per_decade: int = 2) -> list[tuple[float, float, int]]:
    """How many features have which density, in equal steps of its logarithm.

    Args:
        fired: at how many tokens each feature fired; those that never did may be left out.
        tokens: how many there were.
        per_decade: steps from one power of ten to the next.

    Returns:
        (from, below, features), ending with densities of 1. Dead features are in none of them.
    """
    # A little above the edge, so that a density of exactly 10^-k is not lost to rounding.
    steps = Counter(math.floor(math.log10(count / tokens) * per_decade + 1e-9) for count in fired if count)
    if not steps:
        return []
    return [
        (10 ** (step / per_decade), 10 ** ((step + 1) / per_decade), steps[step])
        for step in range(min(steps), max(steps) + 1)
    ]


def _downstream(values: Mapping[str, Any]) -> dict[str, float | None]:
    n, m = values["loss_tokens"], values["kl_tokens"]
    recovered = values["sum_loss_ablated"] - values["sum_loss_sae"]
    return {
        "ce_loss_without_sae": _over(values["sum_loss_clean"], n),
        "ce_loss_with_sae": _over(values["sum_loss_sae"], n),
        "ce_loss_with_ablation": _over(values["sum_loss_ablated"], n),
        "ce_loss_score": _over(recovered, values["sum_loss_ablated"] - values["sum_loss_clean"]),
        "kl_div_with_sae": _over(values["sum_kl_sae"], m),
        "kl_div_with_ablation": _over(values["sum_kl_ablated"], m),
        "kl_div_score": _over(values["sum_kl_ablated"] - values["sum_kl_sae"], values["sum_kl_ablated"]),
    }


def _unexplained(mse: float | None, variance: float | None) -> float | None:
    if mse is None or variance is None:
        return None
    if variance < 1e-10:
        return 0.0 if mse < 1e-10 else 1.0
    return mse / variance


def _over(total: float, n: float, *, minus: float = 0.0) -> float | None:
    return None if n == 0 else total / n - minus
