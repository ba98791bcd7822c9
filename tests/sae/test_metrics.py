"""Sums as plain values: what they add up to, and what is said of them without torch."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymi.sae import evaluate
from raymi.sae.evaluate import Downstream, Reconstruction, columns, reconstruction
from raymi.sae.metrics import SUMMED, density_histogram, merged, metrics
from tests.sae.making import D, F, sae


def sums(rows: int, seed: int) -> tuple[Reconstruction, Downstream]:
    generator = torch.Generator().manual_seed(seed)
    x, made = torch.randn(rows, D, generator=generator), sae("jumprelu", seed=2)
    made._stored["threshold"].add_(4)  # so that many features never fire
    features = made.encode_sparse(x)
    numbers = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    return reconstruction(x, made.decode(features), features, torch.arange(rows) // 3), Downstream(
        rows // 2, *numbers[:3], rows, *numbers[3:]
    )


def row(one: Reconstruction, two: Downstream) -> dict[str, Any]:
    return {"texts": 2, **columns(one), **columns(two)}


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 50))
def test_rows_add_up_as_sums_do(sizes: list[int], seed: int) -> None:
    shards = [sums(size, seed + i) for i, size in enumerate(sizes)]
    whole, further = shards[0]
    for one, two in shards[1:]:
        whole, further = whole + one, further + two
    total, expected = merged(row(*shard) for shard in shards), row(whole, further)
    expected["texts"] *= len(sizes)
    assert total.keys() == expected.keys()
    for name, value in expected.items():
        assert total[name] == (pytest.approx(value) if name.startswith("sum_") else value), name
    ours, theirs = metrics(total), evaluate.metrics(whole, further)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == pytest.approx(theirs[key]) for key in ours)
    assert set(SUMMED) <= total.keys()


def test_features_that_never_fired_are_counted_and_not_listed() -> None:
    one, two = sums(6, 1)
    values = row(one, two)
    alive = int((one.fired > 0).sum())
    assert 0 < alive < F
    assert len(values["fired_features"]) == len(values["fired_tokens"]) == len(values["fired_texts"]) == alive
    assert values["d_sae"] == F
    assert metrics(values)["dead_features"] == F - alive
    assert metrics(values)["frac_alive"] == pytest.approx(alive / F)


def test_without_the_models_output_nothing_is_said_of_it() -> None:
    one, two = sums(6, 1)
    assert set(metrics(row(one, two))) - set(metrics(columns(one))) == {
        *(f"ce_loss_{name}" for name in ("without_sae", "with_sae", "with_ablation", "score")),
        *(f"kl_div_{name}" for name in ("with_sae", "with_ablation", "score")),
    }


def test_other_autoencoders_cannot_be_added() -> None:
    values = row(*sums(6, 1))
    for wrong in ([values, {**values, "d_sae": 1}], [values, {**values, "sum_x": [0.0]}], []):
        with pytest.raises(ValueError, match="rows of one autoencoder"):
            merged(wrong)


def test_densities_of_counts() -> None:
    assert density_histogram([1, 9, 10, 0, 1000], 1000, per_decade=1) == [
        (pytest.approx(0.001), pytest.approx(0.01), 2),
        (pytest.approx(0.01), pytest.approx(0.1), 1),
        (pytest.approx(0.1), pytest.approx(1), 0),
        (1, 10, 1),
    ]
    assert density_histogram([0, 0], 5) == []


def test_it_needs_no_torch() -> None:
    code = "import sys, raymi.sae.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
