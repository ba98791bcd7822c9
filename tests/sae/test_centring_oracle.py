"""SAELens's autoencoders of activations of TransformerLens's centred model, fed from the model as it stands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.run import run
from raymi.experiments.sae.spec import SaeSpec
from raymi.experiments.unit import Unit
from raymi.model.engine import Capability, Engine
from raymi.model.hooked import HookedModel
from raymi.sae import load
from raymi.sae.metrics import metrics
from tests.experiments.sae.scene import GIVEN, text
from tests.families import build

pytestmark = pytest.mark.oracle
LAYER, WIDTH = 1, 32
SITES = ["hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out"]


def centred_lens(model: Any) -> Any:
    """TransformerLens's model of the same weights, loaded with `center_writing_weights`."""
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = model.config
    cfg = lens.HookedTransformerConfig(
        n_layers=config.n_layer, d_model=WIDTH, n_ctx=config.n_positions, d_head=WIDTH // config.n_head,
        n_heads=config.n_head, d_mlp=config.n_inner, act_fn="gelu_new", d_vocab=config.vocab_size,
        eps=config.layer_norm_epsilon, normalization_type="LN", use_attn_scale=True,
    )  # fmt: skip
    made = lens.HookedTransformer(cfg)
    made.load_and_process_state_dict(
        convert_gpt2_weights(model, cfg), fold_ln=False, center_unembed=False, fold_value_biases=False
    )
    return made


def loss(logits: Tensor, ids: Tensor) -> float:
    """Mean next-token loss in nats."""
    log_q = logits[:, :-1].double().log_softmax(-1)
    return -float(log_q.gather(-1, ids[:, 1:, None]).mean())


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_centred_activations(site: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    model = build("gpt2")
    model.transformer.wte.weight += 1.5  # a mean that is seen
    lens = centred_lens(model)
    ids = torch.randint(2, 97, (4, 12), generator=torch.Generator().manual_seed(8))
    hook = f"blocks.{LAYER}.{site}"
    metadata = {"hook_name": hook, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    theirs: Any = sae_lens.SAE.from_dict({"architecture": "standard", "d_in": WIDTH, "d_sae": 64, "metadata": metadata})
    torch.manual_seed(2)
    for _, parameter in sorted(theirs.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_model(tmp_path)

    clean, cache = lens.run_with_cache(ids)
    x = cache[hook]
    out = theirs(x)
    spliced = lens.run_with_hooks(ids, fwd_hooks=[(hook, lambda *_, **__: out)])
    ours, engine = load(tmp_path), _engine(model)
    raw = engine.model.forward(ids, capture=[hook]).cache[hook]
    assert float(raw.mean(-1).abs().max()) > 0.01
    torch.testing.assert_close(ours.encode(raw), theirs.encode(x), rtol=1e-4, atol=1e-4)
    back = ours.reconstruct(raw)
    torch.testing.assert_close(back - raw.mean(-1, keepdim=True), out, rtol=1e-4, atol=1e-4)

    ref = SaeRef("one", str(tmp_path), "v", hook, None, 64, centred=True)
    texts = {f"t{row}": text(f"t{row}", row_ids) for row, row_ids in enumerate(ids.tolist())}
    unit = Unit("u", "quality", tuple((name, (ref,)) for name in texts), 1)
    spec = SaeSpec.model_validate({"kind": "sae", "measure": "quality", "saes": "org/x:y", "skip": {"special": False}})
    given = {**GIVEN, "special": frozenset[int]()}
    found = metrics(run(engine, spec, unit, texts, lambda _: ours, **given).to_pylist()[0])
    flat, flat_out = x.flatten(0, 1).double(), out.flatten(0, 1).double()
    unexplained = (flat - flat_out).square().sum() / (flat - flat.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(1 - float(unexplained), rel=1e-4)
    assert found["l2_norm_in"] == pytest.approx(float(flat.norm(dim=-1).mean()), rel=1e-4)
    assert found["ce_loss_without_sae"] == pytest.approx(loss(clean, ids), rel=1e-4)
    assert found["ce_loss_with_sae"] == pytest.approx(loss(spliced, ids), rel=1e-4)
    assert abs(loss(spliced, ids) - loss(clean, ids)) > 1e-3

    raw_fed = load(tmp_path, centred=False)
    assert not torch.allclose(raw_fed.encode(raw), theirs.encode(x), atol=1e-2)  # the mean would be seen


def _engine(model: Any) -> Engine:
    return Engine(HookedModel(model, "org/tiny"), Capability("cone", True, "", 0.0, 0.0, 0.0, 0.0, 0), "cone")
