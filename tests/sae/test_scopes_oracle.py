"""Gemma Scope in numpy, as DeepMind's tutorial computes it; Gemma Scope 2 and Llama Scope as SAELens converts them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from raymi.sae import load

pytestmark = pytest.mark.oracle
D, F = 24, 160
Floats = NDArray[np.float32]


def close(ours: Tensor, theirs: Floats | Tensor) -> None:
    """Every row equal to 1e-5 of its largest number."""
    expected = torch.as_tensor(theirs, dtype=torch.float32)
    assert ours.shape == expected.shape
    assert bool(((ours - expected).abs().amax(-1) <= 1e-5 * expected.abs().amax(-1)).all())


def numbers(*shape: int, seed: int = 0) -> Floats:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 2).astype(np.float32)


def params(*, threshold: bool = True) -> dict[str, Floats]:
    found = {"W_enc": numbers(D, F), "W_dec": numbers(F, D), "b_enc": numbers(F), "b_dec": numbers(D)}
    return found | ({"threshold": numbers(F, seed=3) * 4} if threshold else {})  # some of them below zero


def encoded(x: Floats, p: Mapping[str, Floats]) -> Floats:
    before = x @ p["W_enc"] + p["b_enc"]
    return (before > p.get("threshold", 0)) * np.maximum(before, 0)


REPOS = {
    "google/gemma-scope-2b-pt-res": ("blocks.20.hook_resid_post", None, "google/gemma-2-2b"),
    "google/gemma-scope-9b-it-res": ("blocks.20.hook_resid_post", None, "google/gemma-2-9b-it"),
    "google/gemma-scope-9b-pt-mlp": ("blocks.20.hook_mlp_out", None, "google/gemma-2-9b"),
    "google/gemma-scope-2b-pt-att": ("blocks.20.attn.hook_z", None, "google/gemma-2-2b"),
    "google/gemma-scope-2b-pt-transcoders": (
        "blocks.20.ln2.hook_normalized",
        "blocks.20.hook_mlp_out",
        "google/gemma-2-2b",
    ),
}


def cached(cache: Path, repo: str, path: str) -> Path:
    """An empty folder where huggingface_hub would put a file of this path."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    folder = root / "snapshots" / ("a" * 40) / path
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("repo", REPOS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(repo: str, save: Any, tmp_path: Path) -> None:
    path = "layer_20/width_16k/average_l0_71"
    p, x = params(), numbers(5, 7, D, seed=1) * 2
    save(cached(tmp_path, repo, path) / "params.npz", **p)
    ours = load(f"{repo}:{path}", cache_dir=tmp_path)
    assert (ours.about.site, ours.about.site_out, ours.about.model_id) == REPOS[repo]
    features = encoded(x, p)
    close(ours.encode(torch.from_numpy(x)), features)
    close(ours.decode(ours.encode_sparse(torch.from_numpy(x))), features @ p["W_dec"] + p["b_dec"])
    close(ours.decoder_vector(9), p["W_dec"][9])


def test_gemma_scope_embeddings_are_scaled_by_the_models_width(tmp_path: Path) -> None:
    p, x = params(), numbers(7, D, seed=1)
    repo, path = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    np.savez(cached(tmp_path, repo, path) / "params.npz", **p)
    ours = load(repo=repo, path=path, cache_dir=tmp_path)
    scaled = p | {"W_enc": p["W_enc"] / D**0.5, "W_dec": p["W_dec"] * D**0.5}
    assert ours.about.site == "hook_embed"
    close(ours.reconstruct(torch.from_numpy(x)), encoded(x, scaled) @ scaled["W_dec"] + p["b_dec"])


def test_an_npz_without_thresholds_is_a_relu_and_without_a_path_has_no_site(tmp_path: Path) -> None:
    p, x = params(threshold=False), numbers(7, D, seed=1)
    np.savez(tmp_path / "params.npz", **p)
    ours = load(tmp_path / "params.npz")
    assert (ours.about.architecture, ours.about.site, ours.about.model_id) == ("standard", None, None)
    assert load(tmp_path, site="blocks.3.hook_resid_post").about.layer == 3
    close(ours.encode(torch.from_numpy(x)), encoded(x, p))


GEMMA_3 = {
    "resid_post/layer_9_width_16k_l0_small": ("blocks.9.hook_resid_post", None, False),
    "attn_out/layer_9_width_16k_l0_small": ("blocks.9.attn.hook_z", None, False),
    "mlp_out/layer_9_width_16k_l0_small": ("blocks.9.hook_mlp_out", None, False),
    "transcoder/layer_9_width_16k_l0_small": ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out", False),
    "transcoder/layer_9_width_16k_l0_big_affine": ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out", True),
}


@torch.no_grad()
@pytest.mark.parametrize("path", GEMMA_3)
@pytest.mark.parametrize("with_config", [True, False])
def test_gemma_scope_2(path: str, with_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, site_out, affine = GEMMA_3[path]
    repo = "google/gemma-scope-2-270m-pt"
    folder = cached(tmp_path, repo, path)
    tensors = {name.lower(): torch.from_numpy(array) for name, array in params().items()}
    if affine:
        tensors["affine_skip_connection"] = torch.from_numpy(numbers(D, D, seed=5))
    save_file(tensors, folder / "params.safetensors")
    if with_config:
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "affine_connection": affine}
        (folder / "config.json").write_text(json.dumps(config))
    ours, x = load(f"{repo}:{path}", cache_dir=tmp_path), torch.from_numpy(numbers(7, D, seed=1))
    theirs = converted("gemma_3_sae_huggingface_loader", repo, path, folder, monkeypatch)
    about = ours.about
    assert (about.site, about.site_out, about.model_id) == (site, site_out, "google/gemma-3-270m")
    assert about.skip == affine
    close(ours.encode(x), theirs.encode(x))
    close(ours.reconstruct(x), theirs(x))


@pytest.mark.parametrize(
    ("parents", "hook", "site"),
    [
        ("clt_exp/layer_3", "model.layers.5.self_attn.o_proj.input", "blocks.5.attn.hook_z"),
        ("attn_out_tries", "model.layers.5.output", "blocks.5.hook_resid_post"),
        ("x", "model.language_model.layers.7.post_feedforward_layernorm.output", "blocks.7.hook_mlp_out"),
        ("x", None, None),
    ],
)
def test_a_copy_of_gemma_scope_2_says_itself_where_it_belongs(
    parents: str, hook: str | None, site: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / parents / "copies" / "mine"
    folder.mkdir(parents=True)
    save_file(
        {name.lower(): torch.from_numpy(array) for name, array in params().items()}, folder / "params.safetensors"
    )
    config = {"architecture": "jump_relu", "hf_hook_point_in": hook} if hook else {"architecture": "jump_relu"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).about.site == site


def test_a_gemma_scope_folders_parents_do_not_say_which_layer(tmp_path: Path) -> None:
    folder = tmp_path / "embedding" / "layer_0_old" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **params())
    about = load(folder).about
    assert (about.site, about.model_id) == ("blocks.12.hook_resid_post", "google/gemma-2-2b")


def test_a_llama_scope_is_found_by_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "Llama3_1-8B-Base-L8R-8x"
    folder.mkdir()
    llama_scope(folder, out=6.3125)
    for where in (folder, folder / "checkpoints" / "final.safetensors", folder / "hyperparams.json"):
        assert load(where).about.site == "blocks.8.hook_resid_post"
    repo, path = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x"
    llama_scope(cached(tmp_path, repo, path), out=6.3125)
    about = load(f"{repo}:{path}/checkpoints/final.safetensors", cache_dir=tmp_path).about
    assert (about.site, about.source) == ("blocks.8.hook_resid_post", f"{repo}:{path}")


@torch.no_grad()
def test_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, path = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x"
    folder = cached(tmp_path, repo, path)
    llama_scope(folder, out=6.3125)
    ours, x = load(f"{repo}:{path}", cache_dir=tmp_path), torch.from_numpy(numbers(7, D, seed=1))
    theirs = converted("llama_scope_sae_huggingface_loader", repo, path, folder, monkeypatch)
    theirs.fold_activation_norm_scaling_factor(D**0.5 / 6.3125)
    assert (ours.about.site, ours.about.site_out) == ("blocks.8.hook_resid_post", None)
    assert ours.about.model_id == "meta-llama/Llama-3.1-8B"
    close(ours.encode(x), theirs.encode(x))
    close(ours.reconstruct(x), theirs(x))
    close(ours.decoder_vector(4), theirs.W_dec[4])


def test_a_llama_scope_transcoders_output_has_a_norm_of_its_own(tmp_path: Path) -> None:
    p = llama_scope(tmp_path, out=3.390625)
    ours, x = load(tmp_path), numbers(7, D, seed=1)
    scale_in, scale_out = D**0.5 / 6.3125, D**0.5 / 3.390625
    features = encoded(x * scale_in, p | {"threshold": np.float32(0.2 * scale_in) * np.ones(F, np.float32)})
    assert ours.about.transcoder
    close(ours.encode(torch.from_numpy(x)), features)
    close(ours.reconstruct(torch.from_numpy(x)), (features @ p["W_dec"] + p["b_dec"]) / np.float32(scale_out))


def llama_scope(folder: Path, *, out: float) -> dict[str, Floats]:
    """Writes one; it is a transcoder where norms in and out differ."""
    p = params(threshold=False)
    (folder / "checkpoints").mkdir()
    save_file(
        {
            "encoder.weight": torch.from_numpy(p["W_enc"]).T.contiguous(),
            "decoder.weight": torch.from_numpy(p["W_dec"]).T.contiguous(),
            "encoder.bias": torch.from_numpy(p["b_enc"]),
            "decoder.bias": torch.from_numpy(p["b_dec"]),
        },
        folder / "checkpoints" / "final.safetensors",
    )
    hyperparams = {
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.2, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.3125, "out": out}, "apply_decoder_bias_to_pre_encoder": False,
        "hook_point_in": "blocks.8.hook_resid_post" if out == 6.3125 else "blocks.8.ln2.hook_normalized",
        "hook_point_out": "blocks.8.hook_resid_post" if out == 6.3125 else "blocks.8.hook_mlp_out",
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams))
    return p


def converted(loader: str, repo: str, path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What SAELens makes of files that lie where it would have downloaded them to."""
    sae_lens = pytest.importorskip("sae_lens")
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def here(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        file = folder / (f"{subfolder}/{filename}" if subfolder else filename).removeprefix(f"{path}/")
        if not file.is_file():
            raise EntryNotFoundError(filename)
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(t.shape) for name, t in loaders.load_safetensors_weights(here(repo_id, filename)).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", here)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    config, state, _ = getattr(loaders, loader)(repo, path, cfg_overrides={"dtype": "float32"})
    sae = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    return sae
