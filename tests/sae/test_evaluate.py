"""SAELens's evaluation of the same autoencoder on the same tokens of the same model; and what sums are good for."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymi.sae import SAE, evaluate, load
from raymi.sae.evaluate import Downstream, Predictions, Reconstruction, metrics, reconstruction
from tests.sae.making import D, F, sae

VOCABULARY, SKIPPED = 50, [0, 7]
SITE = "blocks.0.hook_resid_post"


class Batches:
    """Stands for SAELens's store of activations: batches of tokens, one after the other."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = list(batches)

    def get_batch_tokens(self, size: int) -> Tensor:
        return self.batches.pop(0)


class Evaluation(NamedTuple):
    theirs: dict[str, float]
    densities: dict[str, list[float]]
    ours: Reconstruction
    further: Downstream
    batches: list[Reconstruction]


@pytest.fixture(scope="module", params=["jumprelu", "topk"])
def evaluation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Three batches of four texts, through SAELens and through raymi."""
    evals = pytest.importorskip("sae_lens.evals")
    from sae_lens.training.activation_scaler import ActivationScaler

    folder, model = tmp_path_factory.mktemp("sae"), tiny_model()
    theirs = saelens_sae(request.param, folder)
    batches = list(torch.randint(0, VOCABULARY, (3, 4, 12), generator=torch.Generator().manual_seed(4)))
    common: dict[str, Any] = {
        "eval_batch_size_prompts": 4,
        "ignore_tokens": SKIPPED,
        "model_kwargs": {},
        "n_batches": 3,
    }
    flags = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    everything = {f"compute_{flag}": True for flag in flags}
    found, densities = evals.get_sparsity_and_variance_metrics(
        theirs, model, Batches(batches), ActivationScaler(), **everything, **common
    )
    found |= evals.get_downstream_reconstruction_metrics(
        theirs, model, Batches(batches), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **common
    )
    sums = [measure(load(folder), model, batch) for batch in batches]
    whole, further = sums[0][0] + sums[1][0] + sums[2][0], sums[0][1] + sums[1][1] + sums[2][1]
    return Evaluation(found, densities, whole, further, [batch for batch, _ in sums])


def tiny_model() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2, d_model=D, n_ctx=16, d_head=3, n_heads=2, d_vocab=VOCABULARY, act_fn="gelu", seed=0,
            normalization_type="LN", init_weights=True, initializer_range=0.5, device="cpu",
        )
    )  # fmt: skip


def saelens_sae(architecture: str, folder: Path) -> Any:
    from sae_lens import SAE as Theirs

    made = Theirs.from_dict(
        {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": {"hook_name": SITE}}
        | ({"k": 4} if architecture == "topk" else {})
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_model(folder)
    return made


@torch.no_grad()
def measure(made: SAE, model: Any, batch: Tensor) -> tuple[Reconstruction, Downstream]:
    """What raymi makes of a batch: masked positions keep their activation, the ablation zeroes them all."""
    counts = torch.isin(batch, torch.tensor(SKIPPED), invert=True)
    clean, cache = model.run_with_cache(batch)
    x = cache[SITE]

    def run(replacement: Tensor) -> Tensor:
        return model.run_with_hooks(batch, fwd_hooks=[(SITE, lambda *_, **__: replacement)])

    spliced, ablated = run(torch.where(counts[..., None], made.reconstruct(x), x)), run(torch.zeros_like(x))
    features = made.encode_sparse(x[counts])
    prompts = torch.arange(len(batch))[:, None].expand_as(batch)[counts]
    sums = reconstruction(x[counts], made.decode(features), features, prompts)
    further = Downstream()
    for row in range(len(batch)):
        further += evaluate.downstream(batch[row], clean[row], spliced[row], ablated[row], counts[row])
    return sums, further


@pytest.mark.oracle
@pytest.mark.parametrize(
    "key",
    ["l0", "l1", "mse", "explained_variance", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio", "ce_loss_without_sae",
     "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score", "kl_div_with_sae", "kl_div_with_ablation",
     "kl_div_score"],
)  # fmt: skip
def test_metrics_are_saelenss(key: str, evaluation: Evaluation) -> None:
    assert metrics(evaluation.ours, evaluation.further)[key] == pytest.approx(evaluation.theirs[key], rel=1e-4)


@pytest.mark.oracle
def test_features_statistics_are_saelenss(evaluation: Evaluation) -> None:
    densities, ours = evaluation.densities, evaluation.ours
    torch.testing.assert_close(
        evaluate.density(ours).float(), torch.tensor(densities["feature_density"]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        evaluate.consistency(ours).float(),
        torch.tensor(densities["consistent_activation_heuristic"]),
        rtol=1e-5,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.oracle
def test_the_bias_is_saelenss_within_a_batch(evaluation: Evaluation) -> None:
    """SAELens averages the ratios of batches."""
    key = "relative_reconstruction_bias"
    ours = [metrics(batch)[key] or 0 for batch in evaluation.batches]
    assert sum(ours) / len(ours) == pytest.approx(evaluation.theirs[key], rel=1e-4)


def activations(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) + 3


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 100))
def test_shards_merge_exactly(cuts: list[int], seed: int) -> None:
    """Shards of any size, empty ones included, as long as no prompt is cut."""
    x, made = activations(30, seed), sae("jumprelu", seed=seed)
    features = made.encode_sparse(x)
    whole = reconstruction(x, made.decode(features), features, torch.arange(30))
    edges = [0, *sorted(cuts), 30]
    merged = None
    for begin, end in pairwise(edges):
        part = made.encode_sparse(x[begin:end])
        sums = reconstruction(x[begin:end], made.decode(part), part, torch.arange(begin, end))
        merged = sums if merged is None else merged + sums
    assert merged is not None
    assert torch.equal(merged.fired, whole.fired)
    assert torch.equal(merged.prompts_fired, whole.prompts_fired)
    ours, expected = metrics(merged), metrics(whole)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == (None if value is None else pytest.approx(value, rel=1e-5)), key
    assert evaluate.record(evaluate.from_record(evaluate.record(whole))) == evaluate.record(whole)


def test_explained_variance_is_about_the_mean() -> None:
    """Predicting the mean explains nothing, whatever the mean; predicting all of it explains everything."""
    x, made = activations(200, 1) + 100, sae("topk")
    features = made.encode_sparse(x)
    assert metrics(reconstruction(x, x.mean(0).expand_as(x), features))["explained_variance"] == pytest.approx(
        0, abs=1e-3
    )
    assert metrics(reconstruction(x, x, features))["explained_variance"] == 1
    assert metrics(reconstruction(x, x, features))["fvu"] == 0
    noise = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    expected = 1 - float((noise - x).double().square().sum() / (x.double() - x.double().mean(0)).square().sum())
    assert metrics(reconstruction(x, noise, features))["explained_variance"] == pytest.approx(expected, abs=1e-3)


def test_what_is_not_defined_is_none_and_what_is_zero_is_no_nan() -> None:
    made = sae("topk")
    none = reconstruction(torch.zeros(0, D), torch.zeros(0, D), made.encode_sparse(torch.zeros(0, D)))
    found = metrics(none, Downstream())
    assert {key for key, value in found.items() if value is not None} == {"dead_features", "frac_alive"}
    assert (found["dead_features"], found["frac_alive"]) == (F, 0)
    x = torch.zeros(3, D)
    found = metrics(reconstruction(x, x, made.encode_sparse(x)))
    assert (found["cossim"], found["l2_ratio"], found["explained_variance"]) == (0, 0, 1)
    assert metrics(reconstruction(x / 0, x, made.encode_sparse(x)))["cossim"] != found["cossim"]  # NaN stays NaN


def test_densities_by_decade() -> None:
    fired = torch.tensor([0, 1, 9, 10, 100, 999, 1000])
    made = sae("topk")
    x = activations(1, 0)
    sums = reconstruction(x, x, made.encode_sparse(x))
    counted = Reconstruction(**{**{n: getattr(sums, n) for n in sums.__slots__}, "tokens": 1000, "fired": fired})
    histogram = evaluate.density_histogram(counted, per_decade=1)
    assert [count for *_, count in histogram] == [2, 1, 2, 1]
    assert [(round(low, 9), round(high, 9)) for low, high, _ in histogram] == [
        (0.001, 0.01), (0.01, 0.1), (0.1, 1), (1, 10),
    ]  # fmt: skip
    assert metrics(counted)["dead_features"] == 1


def test_the_same_prediction_for_every_token_need_not_be_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(n, VOCABULARY, generator=generator) * 4 for n in (9, 1))
    next_ids = torch.tensor([3, -1, 5, 5, 0, -1, 49, 2, 1])
    predictions = Predictions(logits, next_ids)
    assert predictions.compared(other) == pytest.approx(predictions.compared(other.expand(9, -1)), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2 * VOCABULARY, 1 << 20])
def test_predictions_are_compared_in_slices_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_SLICE", {"cpu": size, "gpu": size})
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, VOCABULARY, generator=generator) * 4
    next_ids = torch.tensor([3, -1, 5, 5, 0, 49, -1])
    loss, divergence = Predictions(logits, next_ids).compared(other)
    log_p, log_q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    assert loss == pytest.approx(-sum(float(log_q[i, n]) for i, n in enumerate(next_ids.tolist()) if n >= 0), rel=1e-5)
    assert divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    assert Predictions(logits, next_ids).clean.loss_tokens == 5


def test_divergence_of_predictions_that_are_far_apart() -> None:
    """Where one is certain of what the other rules out, nothing overflows."""
    clean, other = torch.zeros(1, 4), torch.zeros(1, 4)
    clean[0, 0], other[0, 1] = 300.0, 300.0
    _, divergence = Predictions(clean, torch.tensor([-1])).compared(other)
    assert divergence == pytest.approx(300, rel=1e-5)
    assert Predictions(clean, torch.tensor([-1])).compared(clean) == (0.0, 0.0)
