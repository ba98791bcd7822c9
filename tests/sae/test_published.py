"""Figures that candle-mi, the program whose job this is, published for one autoencoder of Gemma Scope.

"The capital of France is", Gemma 2 2B, residual stream behind layer 0. They stand in two columns, of a Python script
with transformers and of the Rust program itself. They run when model and autoencoder are in the user's Hugging Face
cache, and are skipped by name otherwise.

The two columns differ by 2e-4 of the activation's length, far more than float32 makes of it: transformers may have left
out the attention's softcap there. So lengths, errors and large features are held to 1e-3 of either column, and what is
small to the same share of the largest. The tenth feature, near its threshold, is not compared: it is another in Rust.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from raymi import catalog
from raymi.errors import UserError
from raymi.model.loading import load as load_model
from raymi.model.restart import Restart
from raymi.sae import SAE, check_fits, load

pytestmark = [pytest.mark.oracle, pytest.mark.published, pytest.mark.timeout(900)]

MODEL = "google/gemma-2-2b"
SCOPE = "google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_105"
SITE = "blocks.0.hook_resid_post"
MSE = {"Python": 6.912656307, "Rust": 6.912613}
LENGTH = {"Python": 61.81248, "Rust": 61.7991}
"""Of the last token's activation."""
LENGTH_OUT = {"Python": 59.74587, "Rust": 59.7376}
LENGTH_FEATURES = 49.71500
N_ACTIVE = 14
TOP = (
    (10492, 44.07236), (8920, 16.87286), (6887, 8.59761), (5542, 6.81045), (6085, 6.25804), (6735, 5.71367),
    (14856, 3.56552), (11517, 3.36605), (10034, 3.11904),
)  # fmt: skip
"""Of the last token, in Python; the largest is 44.0694 in Rust."""
FIRST_IN = (-0.467738, 0.018951, -0.466550, -0.070825, -0.143891, 0.101481, -0.324585, -2.141545, -1.441127, 0.143555)
FIRST_OUT = (-0.675145, -0.208533, -0.248438, -0.081067, -0.190639, 0.358414, -0.305646, -2.596615, -1.153959, 0.200287)


@pytest.fixture(scope="module")
def sae(user_cache: Path) -> SAE:
    try:
        return load(SCOPE, cache_dir=user_cache)
    except UserError as error:
        pytest.skip(f"{SCOPE} is not in {user_cache} ({error.what})")


@pytest.fixture(scope="module")
def x_TD(user_cache: Path, sae: SAE) -> torch.Tensor:
    try:
        found = catalog.find(MODEL, user_cache)
    except UserError:
        pytest.skip(f"{MODEL} is not in {user_cache}")
    if found.reason:
        pytest.skip(f"{MODEL} cannot run: {found.reason}")
    model = load_model(found.path, name=MODEL, device="cpu").model
    check_fits(sae.about, model_id=MODEL, hidden_size=model.hidden_size, n_layers=model.n_layers)
    ids = AutoTokenizer.from_pretrained(found.path)("The capital of France is", return_tensors="pt").input_ids
    assert ids.shape == (1, 6)
    return Restart(model, ids, [SITE], stop=True).sites[SITE][0]


def test_what_it_is(sae: SAE) -> None:
    about = sae.about
    assert (about.d_in, about.d_sae, about.architecture, about.site) == (2304, 16384, "jumprelu", SITE)


@pytest.mark.parametrize("by", ["Python", "Rust"])
def test_lengths_and_errors(sae: SAE, x_TD: torch.Tensor, by: str) -> None:
    out_TD = sae.reconstruct(x_TD)
    assert sae.reconstruction_error(x_TD) == pytest.approx(MSE[by], rel=1e-3)
    assert float(x_TD[-1].norm()) == pytest.approx(LENGTH[by], rel=1e-3)
    assert float(out_TD[-1].norm()) == pytest.approx(LENGTH_OUT[by], rel=1e-3)


def test_features_of_the_last_token(sae: SAE, x_TD: torch.Tensor) -> None:
    indices, values = sae.encode_sparse(x_TD[-1:]).row(0)
    assert len(indices) == pytest.approx(N_ACTIVE, abs=1)
    assert indices[: len(TOP)].tolist() == [feature for feature, _ in TOP]
    published = [value for _, value in TOP]
    assert values[: len(TOP)].tolist() == pytest.approx(published, rel=1e-3, abs=2e-4 * published[0])
    assert float(values.norm()) == pytest.approx(LENGTH_FEATURES, rel=1e-3)


def test_first_numbers_of_the_last_token(sae: SAE, x_TD: torch.Tensor) -> None:
    for ours, published in ((x_TD[-1], FIRST_IN), (sae.reconstruct(x_TD)[-1], FIRST_OUT)):
        largest = max(map(abs, published))
        assert ours[:10].tolist() == pytest.approx(published, rel=1e-3, abs=1e-3 * largest)
