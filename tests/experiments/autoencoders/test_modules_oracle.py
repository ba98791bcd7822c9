"""sparsify's and dictionary_learning's own autoencoders of modules, from file to rows, where norms stand behind these.

What is right is what plain hooks on the module of transformers' untouched model and the library's own code make of it.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from raymi import catalog
from raymi.errors import UserError
from raymi.experiments.autoencoders.places import confirm_places
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.autoencoders.resolve import refs, resolve
from raymi.experiments.sae.run import run
from raymi.experiments.sae.spec import SaeSpec, work
from raymi.experiments.unit import Unit
from raymi.model.engine import Capability, Engine
from raymi.model.hooked import HookedModel
from raymi.sae import load
from raymi.sae.metrics import metrics
from tests.conformance.configs import build
from tests.experiments.sae.scene import GIVEN, text
from tests.fakes import TOKENIZER, TOKENIZER_CONFIG, add_folder

pytestmark = pytest.mark.oracle
F, K, LAYER, FEATURE, STRENGTH = 64, 6, 1, 11, 3.0
BEHIND = ["gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"]
CODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {}),
    "attention": ("self_attn", {}),
    "skip transcoder": ("mlp", {"transcode": True, "skip_connection": True}),
}


class Made(NamedTuple):
    library: Any
    """Activations read -> (what it makes of them, its decoder's rows)."""
    folder: Path
    module: str
    reads_input: bool


def sparsify(case: str, width: int, folder: Path) -> Made:
    pytest.importorskip("sparsify")
    module, config = CODERS[case]
    coder = import_module("sparsify.sparse_coder").SparseCoder(
        width, import_module("sparsify.config").SparseCoderConfig(k=K, num_latents=F, **config)
    )
    _randomise(coder)
    coder.save_to_disk(folder / f"layers.{LAYER}.{module}")
    return Made(
        lambda x: (coder(x, torch.zeros_like(x)).sae_out, coder.W_dec),
        folder / f"layers.{LAYER}.{module}",
        module,
        "transcode" in config,
    )


def dictionary(width: int, folder: Path) -> Made:
    pytest.importorskip("dictionary_learning")
    made = import_module("dictionary_learning.dictionary").AutoEncoderNew(width, F)
    _randomise(made)
    folder.mkdir()
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderNew", "activation_dim": width, "dict_size": F, "layer": LAYER,
               "lm_name": "org/tiny", "submodule_name": f"mlp_out_layer_{LAYER}"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "ctx_len": 12}}))
    return Made(lambda x: (made(x), made.decoder.weight.T), folder, "mlp", False)


def _randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(4)
    for _, parameter in sorted(module.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.3)


class Plain:
    """The untouched model, and one module of one of its layers."""

    def __init__(self, family: str, made: Made) -> None:
        self.model, self.made = build(family), made
        self.module = getattr(self.model.model.layers[LAYER], made.module)

    def logits(self, ids: Tensor, change: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and what the module was given and gave; `change` of (given, gave) is what it gives instead."""
        seen: list[Tensor] = []

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            gave = output[0] if isinstance(output, tuple) else output
            seen[:] = [given.clone(), gave.clone()]
            if change is None:
                return None
            new = change(given, gave)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.module.register_forward_hook(hook, with_kwargs=True)
        try:
            return self.model(ids, use_cache=False).logits, seen[0], seen[1]
        finally:
            handle.remove()


def loss(logits: Tensor, ids: Tensor) -> float:
    return -float(logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())


def found(family: str, made: Made, tmp_path: Path, **fields: Any) -> tuple[SaeRef, SaeSpec]:
    """What a plan finds, from the model's files and the autoencoder's."""
    build(family).save_pretrained(tmp_path / "model")
    for name, content in (("tokenizer.json", TOKENIZER), ("tokenizer_config.json", TOKENIZER_CONFIG)):
        (tmp_path / "model" / name).write_text(json.dumps(content))
    add_folder(tmp_path / "hub", "org/tiny", tmp_path / "model")
    given = {"kind": "sae", "saes": str(made.folder), **fields}
    spec = SaeSpec.model_validate(given, context={"folder": tmp_path})
    records = resolve([spec], catalog.find("org/tiny", tmp_path / "hub"), cache_dir=tmp_path / "hub")
    [ref] = refs(records)[spec.name]
    return ref, spec


@torch.no_grad()
def compare(family: str, made: Made, tmp_path: Path, *, behind: bool) -> None:
    ref, spec = found(family, made, tmp_path, measure="quality", skip={"special": False})
    own = {"mlp": "mlp.hook_out", "self_attn": "attn.hook_out"}[made.module]
    assert (ref.written == f"blocks.{LAYER}.{own}") == behind
    plain, model = Plain(family, made), HookedModel(build(family), "org/tiny")
    confirm_places(model, [ref])
    engine = Engine(model, Capability("cone", True, "", 0.0, 0.0, 0.0, 0.0, 0), "cone")
    sae = load(ref.where, site=ref.site, site_out=ref.site_out)
    ids = torch.randint(2, 90, (3, 11), generator=torch.Generator().manual_seed(6))
    texts = {f"t{row}": text(f"t{row}", its) for row, its in enumerate(ids.tolist())}
    given = {**GIVEN, "special": frozenset[int]()}

    def out(given_: Tensor, gave: Tensor) -> Tensor:
        x = given_ if made.reads_input else gave
        return made.library(x.flatten(0, 1))[0].reshape(gave.shape)

    clean, given_BTD, gave_BTD = plain.logits(ids)
    expected = out(given_BTD, gave_BTD)
    unit = Unit("u", spec.name, tuple((name, (ref,)) for name in texts), 1)
    values = metrics(run(engine, spec, unit, texts, lambda _: sae, **given).to_pylist()[0])
    flat = gave_BTD.flatten(0, 1).double()
    unexplained = (flat - expected.flatten(0, 1)).square().sum() / (flat - flat.mean(0)).square().sum()
    assert values["explained_variance"] == pytest.approx(1 - float(unexplained), rel=1e-4, abs=1e-4)
    spliced = loss(plain.logits(ids, out)[0], ids)
    zeroed = loss(plain.logits(ids, lambda _, gave: torch.zeros_like(gave))[0], ids)
    assert abs(spliced - loss(clean, ids)) > 1e-3
    assert values["ce_loss_with_sae"] == pytest.approx(spliced, rel=1e-4)
    assert values["ce_loss_with_ablation"] == pytest.approx(zeroed, rel=1e-4)

    injection = SaeSpec.model_validate(
        {"kind": "sae", "measure": "injection", "saes": "org/x:y", "features": FEATURE, "strengths": STRENGTH}
    )
    row_of = made.library(gave_BTD.flatten(0, 1))[1][FEATURE]
    [name, *_] = texts
    unit = Unit("u", "injection", ((name, work(injection, texts[name], [ref])),), 1)
    [row] = run(engine, injection, unit, texts, lambda _: sae, **given).to_pylist()

    def added(_: Tensor, gave: Tensor) -> Tensor:
        gave = gave.clone()
        gave[:, -1] += STRENGTH * row_of
        return gave

    shift = (plain.logits(ids[:1], added)[0] - clean[:1])[0, -1].abs().max()
    assert float(shift) > 1e-3
    assert row["logit_shift"] == pytest.approx(float(shift), rel=1e-3)


@pytest.mark.parametrize("case", CODERS)
@pytest.mark.parametrize("family", BEHIND)
def test_sparsify_of_modules_with_norms_behind(
    family: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "SPARSIFY_DISABLE_TRITON", "1")
    compare(family, sparsify(case, 32, tmp_path / "sae"), tmp_path, behind=True)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_dictionaries_of_modules_with_norms_behind(family: str, tmp_path: Path) -> None:
    compare(family, dictionary(32, tmp_path / "sae"), tmp_path, behind=True)


@pytest.mark.parametrize("case", CODERS)
def test_where_nothing_stands_behind_sites_are_as_ever(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "SPARSIFY_DISABLE_TRITON", "1")
    compare("llama", sparsify(case, 32, tmp_path / "sae"), tmp_path, behind=False)


def test_a_place_that_the_plan_took_for_another_is_refused_by_name() -> None:
    model = HookedModel(build("olmo2"), "org/tiny")
    site = f"blocks.{LAYER}"
    wrong = SaeRef("x", "/x", "v", f"{site}.hook_mlp_out", None, F, plain=f"{site}.mlp.hook_out")
    with pytest.raises(UserError, match=rf"x: its files mean .*mlp\.hook_out.*\n.*`site: {site}\.mlp\.hook_out`"):
        confirm_places(model, [wrong])
    confirm_places(HookedModel(build("llama"), "org/tiny"), [wrong])
