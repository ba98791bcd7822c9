"""Captures equal the model's own outputs and TransformerLens's cache; a wrong name is told the right one."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask, add
from raymi.model.sites import NAMES, NoSuchPlace, UnknownSite, decoder_layers, parse
from tests import oracles
from tests.families import CONFIGS, PROMPT, Build, build, prompt

Hooked = Callable[[str], HookedModel]
SIDE_BY_SIDE = ("gpt_neox", "cohere", "phi", "codegen", "falcon", "gptj")
"""Families that compute attention and MLP from the same input: nothing is in the middle."""


def captured(model: HookedModel, ids_BT: Tensor, layer: int, names: list[str]) -> Mapping[str, Tensor]:
    cache = model.forward(ids_BT, capture=[f"blocks.{layer}.{name}" for name in names]).cache
    return {name: cache[f"blocks.{layer}.{name}"] for name in names}


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("family", CONFIGS)
def test_the_models_own_outputs(family: str, hooked: Hooked, plain: Build):
    """Residual streams and patterns are those that transformers hands out when asked."""
    model, ids_BT = hooked(family), prompt(rows=2)
    with torch.no_grad():
        theirs = plain(family)(ids_BT, use_cache=False, output_hidden_states=True, output_attentions=True)
    for layer in range(model.n_layers):
        ours = captured(model, ids_BT, layer, ["hook_resid_pre", "hook_resid_post"])
        close(ours["hook_resid_pre"], theirs.hidden_states[layer])
        if layer + 1 < model.n_layers:  # the last one that transformers hands out is normed
            close(ours["hook_resid_post"], theirs.hidden_states[layer + 1])
        if family not in oracles.OWN_ATTENTION:
            close(captured(model, ids_BT, layer, ["attn.hook_pattern"])["attn.hook_pattern"], theirs.attentions[layer])


@pytest.mark.oracle
@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "granite"])
def test_a_block_is_the_sum_of_its_parts(family: str, hooked: Hooked):
    names = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    for layer in range(4):
        before, attention, mlp, after = captured(hooked(family), prompt(rows=2), layer, names).values()
        assert float(attention.abs().max()) > 1e-2
        assert float(mlp.abs().max()) > 1e-2
        close(before + attention + mlp, after)
        if family not in SIDE_BY_SIDE:
            middle = captured(hooked(family), prompt(rows=2), layer, ["hook_resid_mid"])["hook_resid_mid"]
            close(before + attention, middle)


# What TransformerLens does not have under these names, or means differently by them.
MODULES = ("attn.hook_out", "mlp.hook_out")
_ROTATED = {"attn.hook_rot_q", "attn.hook_rot_k"}
ELSEWHERE = {
    "gpt2": _ROTATED,
    "gpt_neox": _ROTATED,
    "phi3": _ROTATED,
    "granite": {"hook_resid_mid", "hook_attn_out", "hook_mlp_out"},  # scaled before they are added
    **{family: set(MODULES) for family in ("bloom", "mpt")},  # the residual stream is added inside of them
    "falcon": {"hook_mlp_out"},  # its tensor is one that Falcon went on to change
    "olmo2": {"ln2.hook_normalized"},  # that of the norm behind its MLP; none stands before
}
ONE_NORM = {"codegen", "falcon", "phi"}
"""Attention and MLP are fed by one norm, which TransformerLens calls `ln1`."""


@pytest.mark.oracle
@pytest.mark.parametrize("family", oracles.BRIDGED)
def test_transformer_lens(family: str, hooked: Hooked):
    """The same names, shapes and numbers; causal masks are -inf here and a very low number there."""
    model, ids_BT = hooked(family), prompt(rows=2)
    theirs = oracles.bridge_cache(oracles.bridge(build(family)), ids_BT)
    missing = ELSEWHERE.get(family, set[str]()) | ({"hook_resid_mid"} if family in SIDE_BY_SIDE else set[str]())
    if family in oracles.OWN_ATTENTION:
        missing |= {name for name in NAMES if name.startswith("attn.") and name != "attn.hook_z"}
    for layer in (0, 3):
        for name in set(NAMES) - missing:
            ours, lens = (
                captured(model, ids_BT, layer, [name])[name],
                theirs[f"blocks.{layer}.{name.replace('ln2', 'ln1') if family in ONE_NORM else name}"],
            )
            assert ours.shape == lens.shape, name
            if name == "attn.hook_attn_scores":
                lens = lens.masked_fill(lens < torch.finfo(lens.dtype).min / 4, -torch.inf)
            # Before a post-norm, numbers may be as large as they like.
            close(ours, lens, 1e-6 * max(20.0, float(lens.abs().max())) if name in MODULES else 2e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("family", sorted(set(oracles.BRIDGED) - ONE_NORM - {"olmo2"}))
def test_what_a_norm_gives_before_its_weights(family: str):
    """TransformerLens's `hook_normalized`, with its weights where they are and in the matrices behind."""
    model, ids_BT = HookedModel(build(family, norms=True), family), prompt(rows=2)
    lens = oracles.bridge(build(family, norms=True))
    unfolded = dict(oracles.bridge_cache(lens, ids_BT))
    if family != "gpt_oss":  # folded, it is another model
        lens.enable_compatibility_mode(disable_warnings=True)
    folded = oracles.bridge_cache(lens, ids_BT)
    for layer in range(4):
        ours, fed = captured(model, ids_BT, layer, ["ln2.hook_normalized", "mlp.hook_in"]).values()
        for theirs in (unfolded, folded):
            close(ours, theirs[f"blocks.{layer}.ln2.hook_normalized"])
        assert float((ours - fed).abs().max()) > 0.05


MLPS = {
    "bloom": ("transformer.h.{}.mlp", "transformer.h.{}.post_attention_layernorm"),
    "codegen": ("transformer.h.{}.mlp", "transformer.h.{}.ln_1"),
    "cohere": ("model.layers.{}.mlp", "model.layers.{}.input_layernorm"),
    "falcon": ("transformer.h.{}.mlp", "transformer.h.{}.input_layernorm"),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("model.layers.{}.mlp", "model.layers.{}.pre_feedforward_layernorm")),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo"), ("transformer.h.{}.mlp", "transformer.h.{}.ln_2")),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", "gpt_neox.layers.{}.post_attention_layernorm"),
    "gptj": ("transformer.h.{}.mlp", "transformer.h.{}.ln_1"),
    "llama4_text": ("model.layers.{}.feed_forward", "model.layers.{}.post_attention_layernorm"),
    "mpt": ("transformer.blocks.{}.ffn", "transformer.blocks.{}.norm_2"),
    "olmo2": ("model.layers.{}.mlp", ""),  # has a norm behind its MLP alone
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.final_layer_norm"),
    "phi": ("model.layers.{}.mlp", "model.layers.{}.input_layernorm"),
}
"""Family -> its MLP, and the norm that feeds it."""


@pytest.mark.oracle
@pytest.mark.parametrize("family", [*CONFIGS, "gpt_bigcode"])
def test_what_the_mlp_is_fed(family: str, hooked: Hooked, plain: Build):
    """What a plain hook sees in front of the MLP: what the norm before it gives, its weights and bias included."""
    model, ids_BT, fed, gave = plain(family), prompt(rows=2), dict[int, Tensor](), dict[int, Tensor]()
    of_mlp, of_norm = MLPS.get(family, ("model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm"))
    handles = list[torch.utils.hooks.RemovableHandle]()
    for layer in range(4):
        mlp = model.get_submodule(of_mlp.format(layer))
        handles.append(mlp.register_forward_pre_hook(lambda _, args, layer=layer: fed.update({layer: args[0]})))
        if of_norm:
            norm = model.get_submodule(of_norm.format(layer))
            handles.append(norm.register_forward_hook(lambda *given, layer=layer: gave.update({layer: given[2]})))
    with torch.no_grad():
        model(ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(4):
        ours = captured(hooked(family), ids_BT, layer, ["mlp.hook_in"])["mlp.hook_in"]
        assert ours.shape == (2, PROMPT, 32)
        close(ours, fed[layer].view_as(ours))
        if of_norm:
            close(ours, gave[layer].view_as(ours))
        else:
            close(ours, captured(hooked(family), ids_BT, layer, ["hook_resid_mid"])["hook_resid_mid"])


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_embeddings(family: str, hooked: Hooked, plain: Build):
    """What the embedding gives, Gemma's scale included; positions are added afterwards."""
    with torch.no_grad():
        theirs = plain(family).get_input_embeddings()(prompt())
    close(hooked(family).forward(prompt(), capture=["hook_embed"]).cache["hook_embed"], theirs, atol=0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "gemma2"])
def test_a_cut_edge_shows_in_what_is_captured(family: str, hooked: Hooked):
    names = ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"]
    sites = [f"blocks.1.{name}" for name in names]
    every_key = tuple((PROMPT - 1, key) for key in range(PROMPT))
    masks = [(), (Mask(1, (2,), ((9, 8),)),), (Mask(1, (2,), every_key),)]
    cache = hooked(family).forward(prompt().expand(3, -1), masks, capture=sites).cache
    scores_BHQS, pattern_BHQS, z_BTHW = (cache[site] for site in sites)
    assert scores_BHQS[0, 2, 9, 8].isfinite()
    assert pattern_BHQS[0, 2, 9, 8] > 0
    assert scores_BHQS[1, 2, 9, 8] == -torch.inf
    assert pattern_BHQS[1, 2, 9, 8] == 0
    assert int((pattern_BHQS[1] != pattern_BHQS[0]).any(-1).sum()) == 1  # one line of one head
    if family != "gpt_oss":  # the rest takes over; elsewhere a sink takes part of it
        assert float(pattern_BHQS[1, 2, 9].sum()) == pytest.approx(1)
    assert scores_BHQS[2, 2, -1].isneginf().all()
    assert not pattern_BHQS[2, 2, -1].any()
    assert not z_BTHW[2, -1, 2].any()
    assert z_BTHW[2, -1, 1].any()


def test_a_capture_is_a_copy(hooked: Hooked):
    """What is done to a captured tensor does not come back in the next forward."""
    first = hooked("llama").forward(prompt(), capture=["blocks.0.hook_resid_pre"])
    first.cache["blocks.0.hook_resid_pre"].fill_(7.0)
    assert torch.equal(hooked("llama").forward(prompt()).logits_BV, first.logits_BV)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("blocks.1.attn.hook_atn_scores", "'blocks.1.attn.hook_attn_scores'"),
        ("blocks.3.attn.hook_scores", "'blocks.3.attn.hook_attn_scores'"),
        ("blocks.0.resid_post", "'blocks.0.hook_resid_post'"),
        ("embed", "'hook_embed'"),
        ("blocks.4.hook_mlp_out", "layers 0 to 3"),
        ("block.1.hook_mlp_out", "hook_mlp_out'"),
        ("", "did you mean"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(wrong: str, meant: str):
    with pytest.raises(UnknownSite, match=meant):
        parse(wrong, 4)


@pytest.mark.parametrize("name", ["hook_embed", *(f"blocks.3.{name}" for name in NAMES)])
def test_names_survive_parsing(name: str):
    assert str(parse(name, 4)) == name


@pytest.mark.parametrize(
    ("family", "site", "why"),
    [
        ("granite", "blocks.0.hook_attn_out", "granite .* hook_attn_out: .*multiplied by 0.5 before"),
        ("granite", "blocks.3.hook_mlp_out", "granite .* hook_mlp_out: .* multiplied by 0.5 .* mlp.hook_out"),
        ("bloom", "blocks.0.mlp.hook_out", "bloom .* mlp.hook_out: its MLP gives something else .* inside of it"),
        ("jamba", "blocks.0.ln2.hook_normalized", "jamba .* ln2.hook_normalized: this layer has no attention"),
        ("gpt_neox", "blocks.2.hook_resid_mid", "gpt_neox .* layer 2 .*hook_resid_mid: .*side by side"),
        ("bloom", "blocks.1.attn.hook_pattern", "bloom .*attn.hook_pattern.*own"),
    ],
)
def test_a_place_that_a_model_lacks_is_named_with_the_reason(family: str, site: str, why: str, hooked: Hooked):
    with pytest.raises(NoSuchPlace, match=why):
        hooked(family).forward(prompt(), capture=[site])
    hooked(family).forward(prompt())  # and the model is as it was


ADDS = {"gemma2": "post_attention_layernorm", "glm4": "post_self_attn_layernorm", "olmo2": "post_attention_layernorm"}
"""Post-norm families -> the module that gives what attention adds; the attention itself is `self_attn`."""


def with_large_channels(family: str, large: float, step: int) -> PreTrainedModel:
    """Every so many channels of the embedding are large, which weights of norms undo; the head is as it was."""
    model = build(family)
    one = 1.0 if family.startswith("gemma") else 0.0  # Gemma's norms add it to their weights
    with torch.no_grad():
        cast(Any, model).lm_head.weight = nn.Parameter(cast(Any, model).lm_head.weight.clone())
        cast(Any, model.get_input_embeddings()).weight[:, ::step] = large
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight[::step] = (weight[::step] + one) / large - one
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("large", [3e2, 1e4, 1e6])
@pytest.mark.parametrize("family", [*ADDS, "granite"])
def test_a_large_channel_hides_no_place(family: str, large: float, dtype: torch.dtype):
    """Beside it, what attention gives and what a norm makes of that are both nothing, in any dtype."""
    if large > torch.finfo(dtype).max or (family == "olmo2" and dtype == torch.float16):
        pytest.skip("no such number, or infinity in an MLP that is fed the stream itself")
    found = HookedModel(with_large_channels(family, large, step=3).to(dtype), family)
    for block in found.blocks:
        attention = block.module.get_submodule("self_attn")
        assert block.attn_module is attention
        assert block.attn_out is (block.module.get_submodule(ADDS[family]) if family in ADDS else None)


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 300.0), (torch.bfloat16, 3e3), (torch.float32, 1e5)])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "glm4"])
def test_edits_beside_a_large_channel(family: str, dtype: torch.dtype, large: float):
    """What a plain hook on the untouched model's post-norm, or on what stands before it, does to the logits."""
    paths = {
        "hook_attn_out": ADDS.get(family, "post_attention_layernorm"),
        "hook_mlp_out": "post_mlp_layernorm" if family == "glm4" else "post_feedforward_layernorm",
        "attn.hook_out": "self_attn",
        "mlp.hook_out": "mlp",
    }
    hooked, plain = (with_large_channels(family, large, step=32).to(dtype) for _ in range(2))
    ours, everywhere = HookedModel(hooked, family), tuple(range(PROMPT))
    value_D = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        clean_V = plain(prompt(), use_cache=False).logits[0, -1].float()
    scale = float(clean_V.abs().max())  # small where a norm has divided all by what is large
    for layer in range(4):
        for site, path in paths.items():
            module = plain.get_submodule(f"model.layers.{layer}.{path}")
            handle = module.register_forward_hook(
                lambda _, __, out: (out[0] + value_D, *out[1:]) if isinstance(out, tuple) else out + value_D
            )
            with torch.no_grad():
                theirs_V = plain(prompt(), use_cache=False).logits[0, -1].float()
            handle.remove()
            edit = add(layer, site, everywhere, value_D)
            out = ours.forward(prompt(), [(edit,)], own_attention=True).logits_BV[0]
            assert float((out - theirs_V).abs().max()) <= 1e-5 * scale
            assert float((theirs_V - clean_V).abs().max()) > 1e-3 * scale


class _Listed(nn.Module):
    """Norms in a list of their own beside the layers, each of which has as many parts as there are layers."""

    def __init__(self, norms: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3)) if norms else None
        self.layers = nn.ModuleList(_Parts() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers):
            x = layer(self.norms[at](x) if self.norms is not None else x)
        return x


class _Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_layers_are_never_the_first_list_that_would_do():
    def found(model: nn.Module) -> list[nn.Module]:
        return decoder_layers(model, 3, lambda: model(torch.ones(1, 2, 4)))

    plain = _Listed(norms=False)
    assert found(plain) == list(plain.layers)
    with pytest.raises(NoSuchPlace, match="2 lists of 3 modules could be its decoder layers: norms, layers"):
        found(_Listed(norms=True))
