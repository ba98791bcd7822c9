"""SAELens's own classes, with random weights saved by SAELens itself: the same features and the same outputs."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.sae import load

pytestmark = pytest.mark.oracle
D, F, OUT = 24, 160, 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard, not centred": ("standard", {"apply_b_dec_to_input": False}),
    "standard, constant norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard, layer norm": ("standard", {"normalize_activations": "layer_norm"}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu, layer norm": ("jumprelu", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": 7}),
    "topk, rescaled": ("topk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "topk, larger than what is positive": ("topk", {"k": F - 3}),
    "gated": ("gated", {}),
    "gated, not centred": ("gated", {"apply_b_dec_to_input": False}),
    "transcoder": ("transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "transcoder, layer norm": (
        "transcoder",
        {"d_out": OUT, "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
    ),
    "skip transcoder": ("skip_transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "jumprelu transcoder": ("jumprelu_transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
    "jumprelu skip transcoder": ("jumprelu_skip_transcoder", {"d_out": OUT, "apply_b_dec_to_input": False}),
}


def make(architecture: str, **config: Any) -> Any:
    """One of SAELens's own, every parameter random, thresholds of both signs."""
    sae_lens = pytest.importorskip("sae_lens")
    about = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", **config.pop("metadata", {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.from_dict({"architecture": architecture, "d_in": D, "d_sae": F, "metadata": about, **config})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            torch.nn.init.normal_(parameter, std=0.3 if name == "r_mag" else 0.5)
    return sae


def inputs() -> Tensor:
    """Two texts of nine tokens, one of them with the huge activations that first tokens have."""
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 300
    return x


def close(ours: Tensor, theirs: Tensor) -> None:
    """Every row equal to 1e-5 of its largest number."""
    assert ours.shape == theirs.shape
    assert bool(((ours - theirs).abs().amax(-1) <= 1e-5 * theirs.abs().amax(-1)).all())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_features_and_outputs_are_saelenss(case: str, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    theirs = make(architecture, **config)
    theirs.save_model(tmp_path)
    ours, x = load(tmp_path), inputs()
    features = theirs.encode(x)
    output = theirs.decode(features)

    assert (ours.about.d_in, ours.about.d_sae, ours.about.site) == (D, F, "blocks.1.hook_resid_post")
    assert 0 < int((features != 0).sum()) < features.numel()  # a test in which all or nothing fires shows little
    close(ours.encode(x), features)
    assert torch.equal(ours.encode(x) != 0, features != 0)
    close(ours.decode(features, like=x), output)
    close(ours.decode(ours.encode_sparse(x), like=x), output)
    theirs_whole = theirs(x)
    close(ours.reconstruct(x), theirs_whole)
    target = torch.randn(theirs_whole.shape) if ours.about.transcoder else x
    error = float((theirs_whole - target).double().square().mean())
    assert ours.reconstruction_error(x, target) == pytest.approx(error, rel=1e-5)
    close(ours.decoder_vector(5), theirs.W_dec[5])


@torch.no_grad()
def test_joined_heads_come_apart_again(tmp_path: Path) -> None:
    theirs = make("standard", reshape_activations="hook_z", metadata={"hook_name": "blocks.0.attn.hook_z"})
    theirs.save_model(tmp_path)
    ours, x = load(tmp_path), inputs().unflatten(-1, (4, D // 4))
    expected = theirs.encode(x)
    close(ours.encode(x), expected)
    close(ours.encode(x.flatten(-2)), expected)
    assert ours.reconstruct(x).shape == x.shape
    close(ours.reconstruct(x), theirs.decode(expected))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_halves_are_computed_in_float32(dtype: str, tmp_path: Path) -> None:
    theirs = make("jumprelu").to(getattr(torch, dtype))
    theirs.save_model(tmp_path)
    ours, x = load(tmp_path), inputs()
    assert ours.about.dtype == dtype
    close(ours.encode(x), theirs.to(torch.float32).encode(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_batch_topk_is_saved_by_saelens_as_a_threshold(kind: str, rescaled: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    widths = {"matryoshka_widths": [40, F]} if kind.startswith("Matryoshka") else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=D, d_sae=F, k=9, rescale_acts_by_decoder_norm=rescaled, **widths
    )
    training = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    torch.manual_seed(0)
    for parameter in training.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    training.topk_threshold = torch.tensor(2.5, dtype=torch.double)
    training.save_inference_model(tmp_path)
    ours, theirs, x = load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), inputs()
    assert ours.about.activation == "jumprelu"
    close(ours.encode(x), theirs.encode(x))
    close(ours.reconstruct(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "flat"),
    [
        ("standard", {"activation_fn_str": "relu"}),
        ("standard", {"activation_fn_str": "relu", "apply_b_dec_to_input": False, "normalize_activations": False}),
        ("topk", {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}),
        ("jumprelu", {"architecture": "jumprelu", "normalize_activations": "layer_norm"}),
        ("gated", {"architecture": "gated"}),
        ("standard", {"hook_point": "blocks.2.attn.hook_z"}),
    ],
)
def test_configs_from_before_version_6(architecture: str, flat: dict[str, Any], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    make(architecture, **({"k": 7} if architecture == "topk" else {})).save_model(tmp_path)
    old = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "model_name": "tiny", "hook_point_layer": 2,
           "hook_point": "blocks.2.hook_resid_pre", "sae_lens_version": "5.10.0", **flat}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    ours, theirs, x = load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), inputs()
    if "hook_z" in old["hook_point"]:
        x = x.unflatten(-1, (4, D // 4))
    assert (ours.about.format, ours.about.site, ours.about.model_id) == ("saelens<6", old["hook_point"], "tiny")
    close(ours.encode(x), theirs.encode(x))
    close(ours.reconstruct(x), theirs(x))


@torch.no_grad()
def test_an_average_norm_is_folded_as_saelens_folds_it(tmp_path: Path) -> None:
    theirs = make("jumprelu", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    ours, x = load(tmp_path, input_scale=0.37), inputs()
    theirs.fold_activation_norm_scaling_factor(0.37)
    close(ours.encode(x), theirs.encode(x))
    close(ours.reconstruct(x), theirs(x))
    close(ours.decoder_vector(3), theirs.W_dec[3])


@torch.no_grad()
def test_the_error_term_and_clamping_are_saelenss(tmp_path: Path) -> None:
    theirs = make("topk", k=7, rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm")
    theirs.save_model(tmp_path)
    ours, x = load(tmp_path), inputs()
    features = theirs.encode(x)
    whole = theirs.decode(features.clone())
    active = int(features[1, 4].argmax())
    features[..., active], features[..., 11] = 0.0, 3.0
    theirs.encode(x)  # SAELens keeps the norm of its last input for the next decode
    clamped = theirs.decode(features)
    clamp = {active: 0.0, 11: 3.0}
    close(ours.splice(x), whole)
    close(ours.splice(x, clamp=clamp), clamped)
    close(ours.splice(x, clamp=clamp, error_term=True), clamped + (x - whole))
    assert torch.equal(ours.splice(x, error_term=True), x)
