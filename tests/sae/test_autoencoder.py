import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymi.sae import autoencoder
from raymi.sae.autoencoder import SAE
from raymi.sae.description import Activation
from raymi.sae.evaluate import reconstruction
from raymi.sae.largest import top_k
from tests.device import NAMED
from tests.sae.making import D, F, sae

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that neither the rows nor the features of these tests are a multiple of."""
    monkeypatch.setattr(autoencoder, "ROWS", 3)
    monkeypatch.setattr(autoencoder, "FEATURES", 7)


def slow_largest(activations: Tensor, k: int) -> Tensor:
    """The k largest of every row kept, by the definition: of equals, those of lower index."""
    kept = torch.zeros_like(activations)
    for row in range(len(activations)):
        ranked = sorted(range(activations.shape[1]), key=lambda f: (-float(activations[row, f]), f))
        kept[row, ranked[:k]] = activations[row, ranked[:k]]
    return kept


def by_definition(made: SAE, x: Tensor) -> Tensor:
    """All activations, each formula written out."""
    w = made._stored
    x = x - w["b_dec"] * made.about.apply_b_dec_to_input
    before = x @ w["W_enc"] + w.get("b_enc", torch.zeros(made.about.d_sae))
    match made.about.activation:
        case "relu":
            return before.clamp(min=0)
        case "jumprelu":
            return torch.where((before > w["threshold"]) & (before > 0), before, 0.0)
        case "gated":
            on = x @ w["W_enc"] + w["b_gate"] > 0
            return torch.where(on, ((x @ w["W_enc"]) * w["r_mag"].exp() + w["b_mag"]).clamp(min=0), 0.0)
        case "topk":
            return slow_largest(before.clamp(min=0), made.about.k or 0)


activations = st.sampled_from(ACTIVATIONS)
sizes = st.fixed_dictionaries(
    {"seed": st.integers(0, 10_000), "rows": st.integers(0, 8), "d_sae": st.integers(1, 30), "coarse": st.booleans()}
)


@settings(max_examples=150, deadline=None)
@given(activation=activations, size=sizes, k=st.integers(1, 12))
def test_sparse_and_dense_are_one_thing(activation: Activation, size: dict[str, Any], k: int) -> None:
    """Ties (coarse weights make many), empty rows, no rows, and k above the number of features in a block included."""
    options = {"k": min(k, size["d_sae"])} if activation == "topk" else {}
    made = sae(activation, d_sae=size["d_sae"], coarse=size["coarse"], seed=size["seed"], **options)
    generator = torch.Generator().manual_seed(size["seed"] + 1)
    x = torch.randint(-1, 2, (size["rows"], D), generator=generator).float()
    dense, sparse = made.encode(x), made.encode_sparse(x)

    torch.testing.assert_close(dense, by_definition(made, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(sparse.dense(), dense)
    assert torch.equal(sparse.counts, (dense != 0).sum(-1))
    for row in range(size["rows"]):
        indices, values = sparse.row(row)
        assert sorted(zip((-values).tolist(), indices.tolist(), strict=True)) == list(
            zip((-values).tolist(), indices.tolist(), strict=True)
        )
    torch.testing.assert_close(made.decode(sparse), made.decode(dense), rtol=1e-5, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4), k=st.integers(1, 9))
def test_top_k_takes_the_lowest_of_equals_in_order(rows: list[list[int]], k: int) -> None:
    table = torch.tensor(rows, dtype=torch.float32)
    values, indices = top_k(table, k)
    assert torch.equal(torch.zeros_like(table).scatter(1, indices, values), slow_largest(table, k))
    for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True):
        positive = [(-v, i) for v, i in zip(row_values, row_indices, strict=True) if v > 0]
        assert positive == sorted(positive)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_in_which_nothing_is_active(activation: Activation) -> None:
    made = sae(activation)
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in made._stored:
            made._stored[name].fill_(-1e6)
    if activation == "jumprelu":
        made._stored["threshold"].fill_(-1e9)  # a negative threshold lets nothing negative through
    x = torch.randn(4, D)
    assert not made.encode(x).any()
    assert made.encode_sparse(x).counts.tolist() == [0, 0, 0, 0]
    assert torch.equal(made.reconstruct(x), made._stored["b_dec"].expand(4, D))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: Activation) -> None:
    made = sae(activation)
    x = torch.randn(3, D)
    x[1, 2] = math.nan
    assert made.encode(x)[1].isnan().any()
    assert made.reconstruct(x)[1].isnan().all()
    assert not made.reconstruct(x)[[0, 2]].isnan().any()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_dimensions_are_kept(activation: Activation, lead: tuple[int, ...]) -> None:
    made, x = sae(activation), torch.randn(*lead, D)
    assert made.encode(x).shape == (*lead, F)
    assert made.encode_sparse(x).dense().shape == (*lead, F)
    assert made.encode_sparse(x).counts.shape == lead
    assert made.reconstruct(x).shape == x.shape
    if lead == (2, 3):
        torch.testing.assert_close(made.encode(x)[1, 2], made.encode(x[1, 2]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_some_features_alone(activation: Activation) -> None:
    made, x = sae(activation, apply_b_dec_to_input=True), torch.randn(2, 5, D)
    chosen = [31, 0, 7, 8, 9]
    torch.testing.assert_close(made.activations(x, chosen), made.encode(x)[..., chosen])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("about", [{}, {"normalisation": "constant_norm_rescale"}, {"normalisation": "layer_norm"}])
def test_clamping_is_decoding_of_edited_features(activation: Activation, about: dict[str, Any]) -> None:
    made, x = sae(activation, apply_b_dec_to_input=True, **about), torch.randn(2, 5, D) * 3
    features = made.encode(x)
    strongest = int(features.sum((0, 1)).argmax())
    clamp = {strongest: 0.0, 3: 2.5}
    features[..., strongest], features[..., 3] = 0.0, 2.5
    expected = made.decode(features, like=x)
    whole = made.reconstruct(x)
    assert (expected - whole).abs().max() > 0.1
    torch.testing.assert_close(made.splice(x, clamp=clamp), expected, rtol=1e-4, atol=1e-4)
    with_error = made.splice(x, clamp=clamp, error_term=True)
    torch.testing.assert_close(with_error, expected + x - whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.splice(x, error_term=True), x)
    assert torch.equal(made.splice(x), whole)


def test_injection_places_strength_times_decoder_rows() -> None:
    made = sae("relu")
    decoder = made._stored["W_dec"]
    added = made.injection({4: 50.0, 7: -2.0}, positions=[0, -1], n_positions=5)
    expected = torch.zeros(5, D)
    expected[[0, 4]] = 50 * decoder[4] - 2 * decoder[7]
    torch.testing.assert_close(added, expected)
    assert torch.equal(made.decoder_vector(4), decoder[4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "about",
    [
        {},
        {"normalisation": "constant_norm_rescale"},
        {"normalisation": "layer_norm", "rescale_by_decoder_norm": True},
        {"normalisation": "expected_average_only_in", "input_scale": 0.4, "output_scale": 0.4},
    ],
)
def test_contributions_are_what_the_output_loses(activation: Activation, about: dict[str, Any]) -> None:
    made, x = sae(activation, apply_b_dec_to_input=True, **about), torch.randn(7, D) * 3
    dense = made.encode(x)
    feature = int(dense.sum(0).argmax())
    without = dense.clone()
    without[:, feature] = 0
    expected = made.decode(dense, like=x) - made.decode(without, like=x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(made.contributions([feature] * 7, dense[:, feature], x), expected, rtol=1e-4, atol=1e-4)


def test_reconstructing_from_features_that_are_known() -> None:
    made, x = sae("topk"), torch.randn(2, 5, D)
    assert torch.equal(made.reconstruct(x, made.encode_sparse(x)), made.reconstruct(x))
    nothing = made.encode_sparse(x[:0])
    assert made.reconstruct(x[:0], nothing).shape == (0, 5, D)


def test_reading_decoder_rows_leaves_the_decoder_where_it_is() -> None:
    made = sae("relu")
    made.decoder_vectors([1, 2])
    assert not made._ready
    made.encode(torch.randn(1, D))
    assert "W_dec" not in made._ready


def test_reconstruction_error_is_the_mean_over_all_elements() -> None:
    made, x = sae("topk"), torch.randn(2, 5, D)
    difference = (made.reconstruct(x) - x).numpy().astype("float64")
    assert made.reconstruction_error(x) == pytest.approx((difference**2).mean(), rel=1e-9)


@pytest.mark.parametrize("feature", [-1, F])
def test_features_that_there_are_not(feature: int) -> None:
    made, x = sae("relu"), torch.randn(2, D)
    for call in (
        lambda: made.decoder_vector(feature),
        lambda: made.injection({feature: 1.0}, positions=[0], n_positions=1),
        lambda: made.splice(x, clamp={feature: 0.0}),
    ):
        with pytest.raises(IndexError, match=f"no feature {feature}"):
            call()


def test_calls_that_make_no_sense() -> None:
    made = sae("relu", normalisation="layer_norm")
    with pytest.raises(IndexError, match="no position 5 among 5"):
        made.injection({0: 1.0}, positions=[5], n_positions=5)
    with pytest.raises(ValueError, match=r"width 6, not of shape \[2, 5\]"):
        made.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="give `like`"):
        made.decode(torch.zeros(1, F))
    with pytest.raises(ValueError, match="give what it should predict"):
        sae("relu", site_out="blocks.0.hook_mlp_out").splice(torch.zeros(1, D), error_term=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_halves(activation: Activation, dtype: torch.dtype) -> None:
    made = sae(activation)
    half = SAE(made.about, made._stored, dtype=dtype)
    x = torch.randn(5, D).to(dtype)
    assert half.encode(x).dtype == dtype
    assert torch.equal(half.encode_sparse(x).dense(), half.encode(x))
    if activation in ("relu", "gated"):  # the others jump where rounding crosses a threshold
        torch.testing.assert_close(half.reconstruct(x).float(), made.reconstruct(x), rtol=0.1, atol=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not (NAMED or torch.cuda.is_available()), reason="no CUDA device")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("coarse", [False, True])
def test_a_gpu_computes_the_same(activation: Activation, coarse: bool) -> None:
    """Coarse weights tie, which a GPU's own topk would settle otherwise."""
    about = sae(activation, coarse=coarse, apply_b_dec_to_input=True)
    made = SAE(about.about, about._stored, device=torch.device("cpu"))
    gpu = SAE(about.about, about._stored, device=torch.device(NAMED or "cuda"))
    x = torch.randint(-1, 2, (9, D), device="cpu").float() if coarse else torch.randn(9, D, device="cpu")
    sparse, there = made.encode_sparse(x), gpu.encode_sparse(x)
    assert torch.equal(there.indices.cpu(), sparse.indices)
    assert torch.equal(there.offsets.cpu(), sparse.offsets)
    torch.testing.assert_close(gpu.encode(x).cpu(), made.encode(x))
    torch.testing.assert_close(gpu.reconstruct(x).cpu(), made.reconstruct(x))
    torch.testing.assert_close(gpu.splice(x, clamp={1: 2.0}).cpu(), made.splice(x, clamp={1: 2.0}))
    torch.testing.assert_close(gpu.decoder_vectors([3, 4]).cpu(), made.decoder_vectors([3, 4]))
    sums, expected = (reconstruction(x, m.reconstruct(x), m.encode_sparse(x)) for m in (gpu, made))
    assert torch.equal(sums.fired, expected.fired)
    assert sums.sum_residual2 == pytest.approx(expected.sum_residual2, rel=1e-4)
