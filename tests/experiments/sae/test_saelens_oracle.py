"""Rows of quality against SAELens's own evaluation of the same autoencoder on the same tokens of the same model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.run import run
from raymi.experiments.unit import Unit
from raymi.model.engine import Capability, Engine
from raymi.model.hooked import HookedModel
from raymi.sae import load
from raymi.sae.metrics import metrics
from tests.experiments.sae.scene import GIVEN, text
from tests.experiments.sae.test_run import spec
from tests.families import build
from tests.oracles import bridge

pytestmark = pytest.mark.oracle

KEYS = (
    *("l0", "l1", "mse", "explained_variance", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio"),
    *("relative_reconstruction_bias", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation"),
    *("ce_loss_score", "kl_div_with_sae", "kl_div_with_ablation", "kl_div_score"),
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("blocks.1.hook_resid_post", {}),
    "jumprelu": ("blocks.2.hook_resid_pre", {}),
    "topk": ("blocks.1.hook_mlp_out", {"k": 7}),
    "gated": ("blocks.2.hook_resid_post", {}),
    "standard, z": ("blocks.2.attn.hook_z", {"reshape_activations": "hook_z"}),
    "standard, layer norm": ("blocks.0.hook_attn_out", {"normalize_activations": "layer_norm"}),
}


class Batches:
    """Stands for SAELens's store of activations: one batch of tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def get_batch_tokens(self, size: int) -> Tensor:
        return self.tokens


class Both(NamedTuple):
    """The same model twice."""

    engine: Engine
    lens: Any
    tokens: Tensor
    special: list[int]


@pytest.fixture(scope="session")
def tiny_pair() -> Both:
    pytest.importorskip("sae_lens")
    tokens = torch.randint(0, 90, (6, 13), generator=torch.Generator().manual_seed(5))
    return pair(build("llama"), build("llama"), tokens, [0, 7])


@pytest.fixture(scope="session")
def smollm(demo_models: Mapping[str, Path]) -> Both:
    pytest.importorskip("sae_lens")
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(
            demo_models["SmolLM2-135M-Instruct-Q4_1"], dtype=torch.float32, attn_implementation="eager"
        )
        for _ in range(2)
    )
    tokens = torch.randint(0, 49152, (3, 24), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 0
    return pair(ours, theirs, tokens, [0, 1, 2])


def pair(ours: PreTrainedModel, theirs: PreTrainedModel, tokens: Tensor, special: list[int]) -> Both:
    # Neither noise nor the cone has a part in quality: the capability need not be measured.
    capability = Capability("cone", True, "", 0.0, 0.0, 0.0, 0.0, 0)
    return Both(Engine(HookedModel(ours, "org/model"), capability, "cone"), bridge(theirs), tokens, special)


def saelens_sae(architecture: str, site: str, width: int, scale: float, folder: Path, **config: Any) -> Any:
    """One of SAELens's own, saved by it; weights random."""
    import sae_lens

    made = sae_lens.SAE.from_dict(
        {"architecture": architecture, "d_in": width, "d_sae": 2 * width, "metadata": {"hook_name": site}, **config}
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 or name == "b_dec" else scale)
    made.save_model(folder)
    return made


@torch.no_grad()
def evaluated(made: Any, both: Both) -> tuple[dict[str, float], dict[str, Any]]:
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler

    flags = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    common: dict[str, Any] = {
        "eval_batch_size_prompts": len(both.tokens), "ignore_tokens": both.special, "model_kwargs": {}, "n_batches": 1,
    }  # fmt: skip
    if made.hook_z_reshaping_mode:  # as its run_evals does
        made.turn_off_forward_pass_hook_z_reshaping()
    found, of_features = evals.get_sparsity_and_variance_metrics(
        made, both.lens, Batches(both.tokens), ActivationScaler(), **{f"compute_{f}": True for f in flags}, **common
    )
    further = evals.get_downstream_reconstruction_metrics(
        made, both.lens, Batches(both.tokens), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **common
    )
    return {**found, **further}, of_features


def compare(architecture: str, site: str, both: Both, folder: Path, scale: float, **config: Any) -> None:
    made = saelens_sae(architecture, site, both.engine.model.hidden_size, scale, folder, **config)
    theirs, of_features = evaluated(made, both)
    ours = load(folder)
    ref = SaeRef("one", str(folder), "v", site, None, ours.about.d_sae)
    texts = {f"t{row}": text(f"t{row}", ids) for row, ids in enumerate(both.tokens.tolist())}
    unit = Unit("u", "quality", tuple((name, (ref,)) for name in texts), 1)
    special = frozenset(both.special)
    [row] = run(both.engine, spec("quality"), unit, texts, lambda _: ours, **{**GIVEN, "special": special}).to_pylist()
    found = metrics(row)
    assert 0 < theirs["l0"] < ref.d_sae
    for key in KEYS:
        assert found[key] == pytest.approx(theirs[key], rel=1e-4), key
    density, consistency = torch.zeros(ref.d_sae), torch.full((ref.d_sae,), torch.nan)
    fired = torch.tensor(row["fired_features"])
    density[fired] = torch.tensor(row["fired_tokens"]) / row["tokens"]
    consistency[fired] = torch.tensor(row["fired_tokens"]) / torch.tensor(row["fired_texts"])
    torch.testing.assert_close(density, torch.tensor(of_features["feature_density"]))
    their_consistency = torch.tensor(of_features["consistent_activation_heuristic"])
    torch.testing.assert_close(consistency, their_consistency, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_models_quality_is_saelenss(case: str, tiny_pair: Both, tmp_path: Path) -> None:
    site, config = CASES[case]
    compare(case.split(",")[0], site, tiny_pair, tmp_path, 0.3, **config)


@pytest.mark.parametrize(
    ("architecture", "site"), [("jumprelu", "blocks.14.hook_resid_post"), ("topk", "blocks.20.attn.hook_z")]
)
def test_smollms_quality_is_saelenss(architecture: str, site: str, smollm: Both, tmp_path: Path) -> None:
    config = {"reshape_activations": "hook_z"} if "hook_z" in site else {}
    compare(architecture, site, smollm, tmp_path, 1.0, **config, **({"k": 20} if architecture == "topk" else {}))
