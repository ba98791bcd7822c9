"""The trained autoencoder of the demo, by its own files and plain NumPy: what the reference program promises, tighter.

The reference (candle-mi) checks sizes, signs and orders, and lets values differ by far; here every number has to be the
one that arithmetic on the file's tensors gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.models import DEMO_MODELS, DEMO_SAE, HELD_OUT
from raymi.model.interventions import add
from raymi.model.loading import Loaded
from raymi.model.loading import load as load_model
from raymi.sae import SAE, check_fits, load
from raymi.sae.evaluate import metrics, reconstruction

pytestmark = pytest.mark.oracle
Array = NDArray[np.float32]
LAYER, D, F, K = 15, 576, 2304, 32
SITE = f"blocks.{LAYER}.hook_resid_post"
MODEL = DEMO_MODELS[0].name
CONTEXT, CHUNKS = 128, 24


@dataclass(frozen=True)
class Numpy:
    """The autoencoder once more, from its file."""

    W_enc: Array
    W_dec: Array
    b_enc: Array
    b_dec: Array

    @classmethod
    def read(cls, file: Path) -> "Numpy":
        stored = load_file(file)
        assert {name: tensor.dtype for name, tensor in stored.items()} == dict.fromkeys(stored, np.dtype("float16"))
        return cls(**{name: tensor.astype(np.float32) for name, tensor in stored.items()})

    def before(self, x_ND: Array) -> Array:
        return (x_ND - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x_ND: Array) -> Array:
        before_NF = self.before(x_ND)
        features_NK = np.argsort(-before_NF, axis=1, kind="stable")[:, :K]
        out_NF = np.zeros_like(before_NF)
        np.put_along_axis(out_NF, features_NK, np.take_along_axis(before_NF, features_NK, 1), 1)
        return np.maximum(out_NF, 0)

    def clear(self, x_ND: Array) -> NDArray[np.bool_]:
        """Rows in which rounding cannot decide which features are the k largest."""
        ordered_NF = -np.sort(-self.before(x_ND), axis=1)
        return ordered_NF[:, K - 1] - ordered_NF[:, K] > 1e-5 * ordered_NF[:, 0]

    def decode(self, features_NF: Array) -> Array:
        return features_NF @ self.W_dec + self.b_dec


@pytest.fixture(scope="module")
def sae(demo_cache: Path) -> SAE:
    return load(DEMO_SAE.id, cache_dir=demo_cache)


@pytest.fixture(scope="module")
def by_numpy() -> Numpy:
    return Numpy.read(DEMO_SAE.source / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def demo(demo_models: Mapping[str, Path]) -> Loaded:
    return load_model(demo_models[MODEL], name=MODEL, device="cpu")


@pytest.fixture(scope="module")
def read_by_transformers(demo_models: Mapping[str, Path]) -> Mapping[str, Array]:
    """What the layer hands on in a model that raymi has not seen, [N, T, D]: of a prompt, and of held-out text."""
    path = demo_models[MODEL]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: LAYER + 2]  # the last of the hidden states is normalised
    held_out = tokenizer(HELD_OUT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    spread = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    texts = {
        "prompt": tokenizer("The capital of France is", return_tensors="pt").input_ids,
        "held out": spread[:: len(spread) // CHUNKS],
    }

    @torch.inference_mode()
    def states(ids: torch.Tensor) -> Array:
        return model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1].numpy()

    return {name: states(ids) for name, ids in texts.items()}


def close(ours: torch.Tensor, numpy: Array) -> None:
    """To 1e-4 of the largest number of the row."""
    assert ours.shape == numpy.shape
    assert bool((np.abs(ours.numpy() - numpy).max(-1) <= 1e-4 * np.abs(numpy).max(-1)).all())


def test_what_it_is_stands_in_its_files(sae: SAE, demo: Loaded) -> None:
    about, model = sae.about, demo.model
    assert (about.d_in, about.d_sae, about.d_out, about.k) == (D, F, D, K)
    assert (about.site, about.layer, about.site_out) == (SITE, LAYER, None)
    assert (about.format, about.architecture, about.dtype) == ("saelens", "topk", "float16")
    assert about.model_id == DEMO_MODELS[0].id
    assert about.revision == DEMO_SAE.revision
    check_fits(about, model_id=DEMO_MODELS[0].id, hidden_size=model.hidden_size, n_layers=model.n_layers)
    assert sum(file.stat().st_size for file in DEMO_SAE.files) < 6_000_000


@pytest.mark.parametrize("text", ["prompt", "held out"])
def test_every_value_is_numpys(sae: SAE, by_numpy: Numpy, read_by_transformers: Mapping[str, Array], text: str) -> None:
    x_ND = read_by_transformers[text][:4].reshape(-1, D)
    clear = by_numpy.clear(x_ND)
    assert clear.mean() >= 0.8
    x_ND = x_ND[clear]
    features_NF = by_numpy.encode(x_ND)
    out_ND = by_numpy.decode(features_NF)
    x = torch.from_numpy(x_ND)[None]

    dense, sparse = sae.encode(x), sae.encode_sparse(x)
    assert dense.shape == (*x.shape[:2], F)
    assert bool((dense >= 0).all())
    close(dense.flatten(0, 1), features_NF)
    for row, numbers_F in enumerate(features_NF):
        indices, values = sparse.row(row)
        assert len(indices) == int((dense.flatten(0, 1)[row] != 0).sum()) == np.count_nonzero(numbers_F)
        assert 0 < len(indices) <= K
        assert bool((values > 0).all())
        assert bool((values.diff() <= 0).all())
        assert sorted(indices.tolist()) == np.flatnonzero(numbers_F).tolist()
        assert values.numpy() == pytest.approx(numbers_F[indices.numpy()], abs=1e-4 * float(numbers_F.max()))

    for decoded in (sae.decode(dense), sae.decode(sparse), sae.reconstruct(x)):
        assert decoded.shape == x.shape
        close(decoded.flatten(0, 1), out_ND)
    norms = np.linalg.norm(out_ND, axis=-1)
    assert sae.reconstruct(x).flatten(0, 1).norm(dim=-1).numpy() == pytest.approx(norms, rel=1e-4)
    shrinkage = norms / np.linalg.norm(x_ND, axis=-1)
    assert shrinkage.min() > 0.5
    assert shrinkage.max() < 2
    error = float(np.square(out_ND.astype(np.float64) - x_ND).mean())
    assert sae.reconstruction_error(x) == pytest.approx(error, rel=1e-4)


def test_decoder_vectors_are_those_of_the_file(sae: SAE, by_numpy: Numpy) -> None:
    vectors = sae.decoder_vectors(range(F)).numpy()
    assert np.array_equal(vectors, by_numpy.W_dec)
    assert np.linalg.norm(vectors, axis=-1) == pytest.approx(np.ones(F), abs=1e-3)


def test_an_injected_feature_moves_the_logits(
    sae: SAE, by_numpy: Numpy, demo: Loaded, demo_models: Mapping[str, Path], read_by_transformers: Mapping[str, Array]
) -> None:
    """The prompt's strongest feature at its last token, at strength 50: by raymi, and by a hook on a plain model."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(demo_models[MODEL])("The capital of France is").input_ids])
    last_D = read_by_transformers["prompt"][0, -1]
    feature = int(by_numpy.encode(last_D[None])[0].argmax())
    added = sae.injection({feature: 50.0}, positions=[-1], n_positions=ids.shape[1])
    assert bool((added[:-1] == 0).all())
    assert added[-1].numpy() == pytest.approx(50 * by_numpy.W_dec[feature], rel=1e-6)

    clean, moved = demo.model.forward(
        ids.expand(2, -1), [(), (add(LAYER, "hook_resid_post", (ids.shape[1] - 1,), added[-1:]),)]
    ).logits_BV
    assert float((moved - clean).abs().max()) > 0.1

    plain = AutoModelForCausalLM.from_pretrained(demo_models[MODEL], dtype=torch.float32).eval()

    def write(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, -1] += 50 * torch.from_numpy(by_numpy.W_dec[feature])
        return changed

    plain.model.layers[LAYER].register_forward_hook(write)
    with torch.inference_mode():
        theirs = plain(ids).logits[0, -1]
    assert moved.numpy() == pytest.approx(theirs.numpy(), abs=1e-3)


@pytest.mark.parametrize("skipped", [1, 8])
def test_it_explains_most_of_what_it_has_never_seen(
    sae: SAE, by_numpy: Numpy, read_by_transformers: Mapping[str, Array], skipped: int
) -> None:
    """Explained variance of held-out text by NumPy; by raymi it is the same."""
    x_ND = read_by_transformers["held out"][:, skipped:].reshape(-1, D)
    features_NF = by_numpy.encode(x_ND)
    left = np.square(x_ND.astype(np.float64) - by_numpy.decode(features_NF)).sum()
    explained = 1 - left / np.square(x_ND - x_ND.astype(np.float64).mean(0)).sum()
    assert explained >= 0.80

    x = torch.from_numpy(x_ND)
    features = sae.encode_sparse(x)
    ours = metrics(reconstruction(x, sae.decode(features), features))
    assert ours["explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert ours["l0"] == pytest.approx(np.count_nonzero(features_NF) / len(x_ND), abs=1e-3)
    dead = int((features_NF == 0).all(0).sum())
    assert ours["dead_features"] == pytest.approx(dead, abs=2)
    assert dead < 0.05 * F


def test_saelens_reads_it_alike(sae: SAE, by_numpy: Numpy, read_by_transformers: Mapping[str, Array]) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.SAE.load_from_disk(DEMO_SAE.source)
    assert (theirs.cfg.d_in, theirs.cfg.d_sae, theirs.cfg.k, theirs.cfg.metadata.hook_name) == (D, F, K, SITE)
    x_ND = read_by_transformers["held out"].reshape(-1, D)
    x = torch.from_numpy(x_ND[by_numpy.clear(x_ND)])
    with torch.inference_mode():
        features = theirs.encode(x)
        output = theirs.decode(features)
    for ours, expected in ((sae.encode(x), features), (sae.reconstruct(x), output)):
        assert bool(((ours - expected).abs().amax(-1) <= 1e-5 * expected.abs().amax(-1)).all())
