"""How the demo's autoencoder is made: what it must not see, that it learns, and that what is shipped was made so."""

import hashlib
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch import Tensor

from demo import train_sae
from demo.models import DEMO_SAE, HELD_OUT
from raymi.sae import load

TINY = {
    "a": "One.\n\nTwo,\nof two lines.\n\n   \n\nThree.",
    "b": "Two,\nof two lines.\n\nFour.\n",
    "c": "Four.\n\n  Three.  \n\nFive.",
}


def paragraphs(text: str) -> set[str]:
    return {part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()}


def sparse_data(n: int = 4000, d: int = 24, features: int = 40) -> Tensor:
    """Sums of three of forty directions, of very different lengths now and then."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(features, d, generator=random)
    chosen = torch.rand(n, features, generator=random).topk(3).indices
    x = (directions[chosen] * (1 + torch.rand(n, 3, 1, generator=random))).sum(1) + 5
    x[::200] *= 100
    return x


def test_paragraphs_of_held_out_topics_are_not_trained_on_wherever_else_they_stand() -> None:
    assert train_sae.split(TINY, ["b"]) == ("One.\n\n  Three.  \n\nFive.\n", "Two,\nof two lines.\n\nFour.\n")
    with pytest.raises(KeyError, match="nowhere"):
        train_sae.split(TINY, ["nowhere"])


def test_the_text_that_ships_is_held_out_of_any_training_here() -> None:
    """Other versions of Python word their topics otherwise, but what is the same stays held out."""
    shipped = HELD_OUT.read_text(encoding="utf-8")
    assert 90_000 < len(shipped) < 200_000
    assert hashlib.sha256(shipped.encode()).hexdigest() in (DEMO_SAE.source / "README.md").read_text(encoding="utf-8")
    known = paragraphs("\n\n".join(topics[name] for name in train_sae.HELD_OUT))
    assert len(paragraphs(shipped) & known) > 0.8 * len(known)
    assert not paragraphs(train_sae.split(topics).training) & known


def test_it_learns_the_same_thing_twice_and_is_saved_as_it_is(tmp_path: Path) -> None:
    x, how = sparse_data(), train_sae.Training(steps=300, batch=256, rate=5e-3, dead_after=20_000)
    trained = train_sae.train(x, 80, 3, how)
    again = train_sae.train(x, 80, 3, how)
    assert all(torch.equal(trained[name], again[name]) for name in trained)

    train_sae.save(trained, 3, tmp_path)
    ordinary = x.view(40, 100, -1)[:, 1:]
    good = train_sae.quality(tmp_path, ordinary[::2], 0)
    untrained = train_sae.train(x, 80, 3, train_sae.Training(steps=0))
    train_sae.save(untrained, 3, tmp_path / "untrained")
    poor = train_sae.quality(tmp_path / "untrained", ordinary[::2], 0)
    assert good.explained_variance > 0.8 > poor.explained_variance
    assert good.tokens == 20 * 99
    assert 0 < good.l0 <= 3

    ours = load(tmp_path)
    assert np.allclose(ours.decoder_vectors(range(80)).norm(dim=-1), 1, atol=1e-3)
    long = x[::200]
    left = (ours.reconstruct(long) - long).norm(dim=-1) / long.norm(dim=-1)
    assert float(left.max()) < 0.5  # the long ones are learnt, too


def test_the_model_is_read_at_the_site_that_is_named(demo_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_models["glassllm-en"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states[3]
    assert torch.equal(train_sae.activations(model, ids, layer=2), expected)
    words = AutoTokenizer.from_pretrained(path)
    cut = train_sae.chunks(words, "Some words. " * 100)
    assert cut.shape[1] == train_sae.CONTEXT
    assert cut.flatten().tolist() == words("Some words. " * 100, add_special_tokens=False).input_ids[: cut.numel()]
