import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raymi.errors import UserError
from raymi.sae import check_fits, files, load
from tests.sae.making import D, F, saelens, weights


def rewrite(file: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) drops tensors of a safetensors file."""
    kept = {name: tensor for name, tensor in (load_file(file) | tensors).items() if tensor is not None}
    save_file(kept, file)


def gemma_scope(folder: Path, **arrays: Any) -> Path:
    made = {name: tensor.numpy() for name, tensor in weights("jumprelu").items()} | arrays
    np.savez(folder / "params.npz", **{name: array for name, array in made.items() if array is not None})
    return folder


def dictionary(folder: Path, *, saved: object = None, **trainer: Any) -> Path:
    linear = {"encoder.weight": torch.zeros(F, D), "encoder.bias": torch.zeros(F), "decoder.weight": torch.zeros(D, F)}
    torch.save(linear | {"b_dec": torch.zeros(D), "k": torch.tensor(5)} if saved is None else saved, folder / "ae.pt")
    about = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": 5, "layer": 1, "lm_name": "m"}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer}))
    return folder


def sparsify(folder: Path, **config: Any) -> Path:
    tensors = {"encoder.weight": torch.zeros(F, D), "encoder.bias": torch.zeros(F), "W_dec": torch.zeros(F, D)}
    save_file(tensors | {"b_dec": torch.zeros(D)}, folder / "sae.safetensors")
    about = {"activation": "topk", "num_latents": F, "k": 5, "d_in": D} | config
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return folder


def llama_scope(folder: Path, **config: Any) -> Path:
    (folder / "checkpoints").mkdir()
    linear = {"encoder.weight": torch.zeros(F, D), "encoder.bias": torch.zeros(F), "decoder.weight": torch.zeros(D, F)}
    save_file(linear | {"decoder.bias": torch.zeros(D)}, folder / "checkpoints" / "final.safetensors")
    about = {"act_fn": "jumprelu", "jump_relu_threshold": 0.1, "norm_activation": "dataset-wise",
             "hook_point_in": "blocks.0.hook_resid_post", "dataset_average_activation_norm": {"in": 1, "out": 1},
             **config}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(about))
    return folder


def gemma_scope_2(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name.lower(): tensor for name, tensor in weights("jumprelu").items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    rewrite(folder / "sae_weights.safetensors", **tensors)
    return folder


def truncated(folder: Path, name: str) -> Path:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-300])
    return folder


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-run"),))


MISTAKES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing tensor": (lambda p: saelens(p, without="b_dec"), ["sae_weights.safetensors", "'b_dec' is missing"]),
    "missing encoder": (lambda p: saelens(p, without="W_enc"), ["'W_enc' is missing", "W_dec"]),
    "missing threshold": (lambda p: saelens(p, "jumprelu", without="threshold"), ["'threshold' is missing"]),
    "misshaped tensor": (
        lambda p: with_tensors(saelens(p), W_dec=torch.zeros(D, F)),
        ["'W_dec' has shape [6, 40]", "expected [40, 40]"],
    ),
    "misshaped bias": (lambda p: with_tensors(saelens(p), b_enc=torch.zeros(3)), ["'b_enc'", "[3]", "[40]"]),
    "flat encoder": (lambda p: with_tensors(saelens(p), W_enc=torch.zeros(3)), ["'W_enc'", "expected 2 dimensions"]),
    "float64": (lambda p: with_tensors(saelens(p), b_dec=torch.zeros(D).double()), ["'b_dec' is float64", "bfloat16"]),
    "integers": (lambda p: with_tensors(saelens(p), b_enc=torch.zeros(F).int()), ["'b_enc' is int32"]),
    "unknown tensor": (lambda p: with_tensors(saelens(p), W_gate=torch.zeros(3)), ["what tensor 'W_gate' is for"]),
    "scaling factors": (
        lambda p: with_tensors(saelens(p), scaling_factor=torch.full((F,), 2.0)),
        ["'scaling_factor' is not all ones"],
    ),
    "TopK without k": (lambda p: saelens(p, "topk", k=None), ["cfg.json", "k is missing"]),
    "k above the width": (lambda p: saelens(p, "topk", k=F + 1), ["k is 41", "40 features"]),
    "k of text": (lambda p: saelens(p, "topk", k="five"), ["cfg.json: k: expected a whole number, found 'five'"]),
    "unknown architecture": (lambda p: saelens(p, architecture="temporal"), ["architecture is 'temporal'", "jumprelu"]),
    "training checkpoint": (lambda p: saelens(p, architecture="batchtopk"), ["batchtopk", "save_inference_model"]),
    "unknown normalisation": (
        lambda p: saelens(p, normalize_activations="covariance_whitening"),
        ["normalize_activations is 'covariance_whitening'", "layer_norm"],
    ),
    "average norm that is nowhere": (
        lambda p: saelens(p, normalize_activations="expected_average_only_in"),
        ["average norm", "input_scale"],
    ),
    "sizes that are not the tensors'": (lambda p: saelens(p, d_in=99), ["cfg.json", "d_in is 99", "6, as the tensors"]),
    "k of zero": (lambda p: saelens(p, "topk", k=0), ["cfg.json", "k is 0"]),
    "metadata that is no object": (lambda p: saelens(p, metadata="x"), ["metadata: expected an object", "'x'"]),
    "unknown reshaping": (lambda p: saelens(p, reshape_activations="hook_q"), ["reshape_activations is 'hook_q'"]),
    "old activation": (
        lambda p: saelens(p, activation_fn_str="tanh-relu", metadata={"sae_lens_version": "5.0.0"}),
        ["activation_fn is 'tanh-relu'"],
    ),
    "config that is no JSON": (
        lambda p: (saelens(p) / "cfg.json").write_text("{") and p,
        ["cfg.json: cannot be read as JSON"],
    ),
    "truncated safetensors": (lambda p: truncated(saelens(p), "sae_weights.safetensors"), ["truncated file"]),
    "truncated npz": (lambda p: truncated(gemma_scope(p), "params.npz"), ["params.npz: not a sound npz"]),
    "npz without decoder": (lambda p: gemma_scope(p, W_dec=None), ["params.npz", "'W_dec' is missing"]),
    "npz of float64": (lambda p: gemma_scope(p, b_enc=np.zeros(F)), ["'b_enc' is float64"]),
    "npz of objects": (lambda p: gemma_scope(p, b_enc=np.array([Evil()])), ["params.npz"]),
    "pickle with code": (lambda p: dictionary(p, saved={"a": Evil()}), ["ae.pt", "refused"]),
    "pickle of a module": (lambda p: dictionary(p, saved=torch.nn.Linear(2, 2)), ["ae.pt", "refused"]),
    "pickle that is no dictionary": (lambda p: dictionary(p, saved=[1, 2]), ["ae.pt", "found list"]),
    "pickle that is none": (lambda p: (dictionary(p) / "ae.pt").write_bytes(b"hello") and p, ["ae.pt"]),
    "unknown class": (lambda p: dictionary(p, dict_class="IdentityDict"), ["dict_class is 'IdentityDict'", "AutoEnc"]),
    "k that differs": (lambda p: dictionary(p, k=6), ["'k' is 5", "config says 6"]),
    "sparsify without k": (lambda p: sparsify(p, k=None), ["cfg.json", "k is missing"]),
    "sparsify with groups": (lambda p: sparsify(p, activation="groupmax"), ["activation is 'groupmax'", "topk"]),
    "sparsify of another width": (lambda p: sparsify(p, num_latents=80), ["'encoder.weight' has 40 rows", "80"]),
    "sparsify without its skip": (lambda p: sparsify(p, skip_connection=True), ["'W_skip' is missing"]),
    "llama scope with TopK": (lambda p: llama_scope(p, act_fn="topk"), ["hyperparams.json", "act_fn is 'topk'"]),
    "llama scope with GLU": (lambda p: llama_scope(p, use_glu_encoder=True), ["use_glu_encoder is True"]),
    "llama scope without norms": (
        lambda p: llama_scope(p, dataset_average_activation_norm={}),
        ["dataset_average_activation_norm.in is missing"],
    ),
    "gemma scope 2, unknown": (lambda p: gemma_scope_2(p, architecture="relu"), ["architecture is 'relu'"]),
    "gemma scope 2, without its skip": (
        lambda p: gemma_scope_2(p, affine_connection=True),
        ["'affine_skip_connection' is missing"],
    ),
    "gemma scope 2, another layer": (
        lambda p: gemma_scope_2(p / "resid_post" / "layer_9_w", hf_hook_point_in="model.layers.5.output"),
        ["'model.layers.5.output'", "contradicts its folder", "layer_9_w"],
    ),
    "gemma scope 2, another place": (
        lambda p: gemma_scope_2(
            p / "resid_post" / "layer_5_w", hf_hook_point_in="model.layers.5.post_feedforward_layernorm.output"
        ),
        ["post_feedforward_layernorm", "contradicts its folder"],
    ),
    "cross-layer transcoder": (lambda p: gemma_scope_2(p / "clt" / "layer_3"), ["clt is not supported"]),
    "nothing there": (lambda p: p, ["no SAE in a format that raymi knows"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        load(make(tmp_path))
    for word in words:
        assert word in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not Path("evil-was-run").exists()


def test_the_evil_pickle_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))  # noqa: S301
    assert Path("evil-was-run").exists()


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    saelens(tmp_path)
    for call, word in [
        (lambda: load(), "where"),
        (lambda: load(tmp_path, dtype="float64"), "float64"),
        (lambda: load(tmp_path / "elsewhere"), "no folder or file"),
        (lambda: load(tmp_path, input_scale=2.0), "not scaled by an average"),
        (lambda: load("org/none:there", cache_dir=tmp_path), "no repository 'org/none'"),
    ]:
        with pytest.raises(UserError, match=word):
            call()


def test_nothing_is_read_that_is_not_used(tmp_path: Path) -> None:
    """Mapped files: opening an autoencoder of 160 MB, and one decoder row of it, touches next to none of them."""
    d_sae = 400_000
    empty = {"W_enc": np.zeros((50, d_sae), np.float32), "W_dec": np.zeros((d_sae, 50), np.float32)}
    np.savez(tmp_path / "params.npz", **empty, b_enc=np.zeros(d_sae, np.float32), b_dec=np.zeros(50, np.float32))
    made = weights("relu")
    before = resident()
    sae = load(tmp_path)
    sae.decoder_vector(d_sae - 1)
    assert resident() - before < 20e6
    sae.encode_sparse(torch.zeros(1, 50))
    assert resident() - before > 60e6  # the encoder: the measure can tell
    del made


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def test_npz_members_are_mapped_at_any_byte(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7, dtype=np.float32), "odd name": np.ones((3, 5), np.float32), "none": np.zeros((0, 2))}
    np.savez(tmp_path / "some.npz", **arrays)
    found, described = files.tensors(tmp_path / "some.npz"), files.members(tmp_path / "some.npz")
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array)
        assert described[name].shape == array.shape
    assert any((described[name].offset or 0) % 4 for name in ("a", "odd name"))


FITS = {"model_id": "org/Tiny", "hidden_size": D, "n_layers": 2}


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({}, {}, []),
        ({}, {"model_id": "other/tiny"}, []),
        ({}, {"model_id": "org/small"}, ["trained on tiny, not on org/small"]),
        ({}, {"model_id": "org/small", "any_model": True}, []),
        ({}, {"hidden_size": 7}, ["takes 6 numbers at blocks.1.hook_resid_post", "has 7"]),
        ({}, {"n_layers": 1}, ["no blocks.1.hook_resid_post", "0 to 0"]),
        ({"hook_name": "blocks.0.mlp.hook_post"}, {}, ["no site 'blocks.0.mlp.hook_post'", "hook_resid_post"]),
        ({"hook_name": None}, {}, ["do not say at which site"]),
        ({"hook_name": "hook_embed"}, {}, []),
        ({"hook_name": "blocks.0.attn.hook_z"}, {"hidden_size": 9, "n_heads": 2, "head_dim": 3}, []),
        ({"hook_name": "blocks.0.attn.hook_z"}, {"n_heads": 3, "head_dim": 3}, ["takes 6 numbers", "has 9"]),
        ({"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}, {"n_heads": 3, "head_dim": 6}, []),
    ],
)
def test_what_fits_a_model(config: dict[str, Any], model: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    about = load(saelens(tmp_path, metadata=config)).about
    if not words:
        check_fits(about, **FITS | model)
        return
    with pytest.raises(UserError) as caught:
        check_fits(about, **FITS | model)
    for word in [*words, "sae_weights.safetensors"]:
        assert word in str(caught.value)


def test_sites_of_autoencoders_are_sites_of_models() -> None:
    from raymi.model.sites import NAMES
    from raymi.sae.description import MLP_INPUT, SITES

    assert {*SITES, MLP_INPUT} <= set(NAMES)


def test_an_mlps_input_is_where_transcoders_read(tmp_path: Path) -> None:
    about = replace(load(saelens(tmp_path)).about, site="blocks.1.ln2.hook_normalized")
    check_fits(replace(about, site_out="blocks.1.hook_mlp_out"), **FITS)
    with pytest.raises(UserError, match=r"no site 'blocks\.1\.ln2\.hook_normalized'"):
        check_fits(about, **FITS)  # no autoencoder can write there
    with pytest.raises(UserError, match=r"no site 'blocks\.1\.ln2\.hook_normalized'"):
        check_fits(replace(about, site_out=about.site), **FITS)
    with pytest.raises(UserError, match=r"no blocks\.2\.ln2\.hook_normalized"):
        check_fits(replace(about, site="blocks.2.ln2.hook_normalized", site_out="blocks.1.hook_mlp_out"), **FITS)


def test_the_gpt2_of_transformer_lens_is_the_hubs(tmp_path: Path) -> None:
    about = load(saelens(tmp_path, metadata={"model_name": "gpt2-small"})).about
    check_fits(about, model_id="openai-community/gpt2", hidden_size=D, n_layers=2)
