"""eai-sparsify's and dictionary_learning's own classes, with random weights saved as these libraries save them."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.sae import load

pytestmark = pytest.mark.oracle
D, F, K = 24, 160, 7


def close(ours: Tensor, theirs: Tensor) -> None:
    """Every row equal to 1e-5 of its largest number."""
    assert ours.shape == theirs.shape
    assert bool(((ours - theirs).abs().amax(-1) <= 1e-5 * theirs.abs().amax(-1)).all())


def randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            torch.nn.init.normal_(parameter, std=0.3 if name == "r_mag" else 0.5)


def inputs() -> Tensor:
    return torch.randn(18, D, generator=torch.Generator().manual_seed(1))


SPARSIFY: dict[str, dict[str, Any]] = {
    "autoencoder": {"num_latents": F},
    "width by expansion": {"expansion_factor": 6},
    "unnormalised, several k": {"num_latents": F, "normalize_decoder": False, "multi_topk": True},
    "transcoder": {"num_latents": F, "transcode": True},
    "skip transcoder": {"num_latents": F, "transcode": True, "skip_connection": True},
    "skip autoencoder": {"num_latents": F, "skip_connection": True},
}


@torch.no_grad()
@pytest.mark.parametrize("case", SPARSIFY)
def test_sparsify(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SPARSIFY_DISABLE_TRITON", "1")
    pytest.importorskip("sparsify")
    coder = import_module("sparsify.sparse_coder")
    config = import_module("sparsify.config").SparseCoderConfig(k=K, **SPARSIFY[case])
    theirs = coder.SparseCoder(D, config)
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/tiny", "ctx_len": 2048}))

    ours, x = load(tmp_path / "layers.3.mlp"), inputs()
    top = theirs.encode(x)
    dense = torch.zeros_like(top.pre_acts).scatter_(1, top.top_indices, top.top_acts)
    theirs.cfg.multi_topk = False  # a loss of training, which has forward() return the output of 4 k features
    output = theirs(x, torch.zeros_like(x)).sae_out

    assert ours.about.model_id == "org/tiny"
    assert (ours.about.site_out or ours.about.site) == "blocks.3.hook_mlp_out"
    close(ours.encode(x), dense)
    sparse = ours.encode_sparse(x)
    assert torch.equal(sparse.counts, (dense != 0).sum(1))
    close(ours.decode(sparse), theirs.decode(top.top_acts, top.top_indices))
    close(ours.reconstruct(x), output)


DICTIONARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoEncoder": ("dictionary", {}),
    "AutoEncoderNew": ("dictionary", {}),
    "GatedAutoEncoder": ("dictionary", {}),
    "JumpReluAutoEncoder": ("dictionary", {}),
    "AutoEncoderTopK": ("trainers.top_k", {"k": K}),
    "BatchTopKSAE": ("trainers.batch_top_k", {"k": K}),
    "MatryoshkaBatchTopKSAE": ("trainers.matryoshka_batch_top_k", {"k": K, "group_sizes": [40, F - 40]}),
}


def save_dictionary(name: str, folder: Path, *, threshold: float | None = None) -> None:
    """Saves one as dictionary_learning's training does."""
    pytest.importorskip("dictionary_learning")
    module, config = DICTIONARIES[name]
    dictionary = getattr(import_module(f"dictionary_learning.{module}"), name)(D, F, **config)
    randomise(dictionary)
    if threshold is not None:
        dictionary.threshold.fill_(threshold)
    folder.mkdir()
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 4, "lm_name": "org/tiny",
               "submodule_name": "resid_post_layer_4", **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "threshold"),
    [*((name, None) for name in DICTIONARIES), ("BatchTopKSAE", 2.5), ("MatryoshkaBatchTopKSAE", 2.5)],
)
def test_dictionary_learning(name: str, threshold: float | None, tmp_path: Path) -> None:
    """Against what the library's own loader makes of its file, thresholds never set (-1) included."""
    folder = tmp_path / "trainer_0"
    save_dictionary(name, folder, threshold=threshold)
    class_ = getattr(import_module(f"dictionary_learning.{DICTIONARIES[name][0]}"), name)
    theirs = class_.from_pretrained(folder / "ae.pt")  # as its load_dictionary does
    ours, x = load(folder), inputs()
    features = theirs.encode(x)
    assert ours.about.site == "blocks.4.hook_resid_post"
    assert 0 < int((features != 0).sum()) < features.numel()
    close(ours.encode(x), features)
    close(ours.decode(ours.encode_sparse(x)), theirs.decode(features))
    close(ours.reconstruct(x), theirs(x))
