"""Forwards that go on from an activation equal whole forwards of an untouched model in which plain hooks write it.

float32 to the tolerance that follows from noise measured at the last position, and to four times that at the others,
where states (Qwen3-Next's, OLMo Hybrid's) may amplify rounding more; never beyond 5e-4. float64 to 1e-10 everywhere.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymi.model.engine import Capability, measure_capability
from raymi.model.hooked import HookedModel, NotFinite, NotFired
from raymi.model.loading import Loaded
from raymi.model.restart import Restart
from raymi.model.sites import NoSuchPlace, UnknownSite
from tests.families import CONFIGS, ODD, PROMPT, Build, build, prompt
from tests.model import cells as drawn
from tests.model.cells import Widened

Hooked = Callable[[str], HookedModel]

WORST, EXACT, EFFECT = 5e-4, 1e-10, 1e-3
NO_MIDDLE = ("gpt_neox", "cohere", "cohere2", "phi", "codegen", "falcon", "gptj")
"""Families that compute attention and MLP from the same input."""


# ---- the oracle: transformers' eager attention and plain hooks -------------------------------------------------------


def where_counted(x: Tensor, value: Tensor, counts_BT: Tensor) -> Tensor:
    """Some families flatten rows and positions; at z, heads are side by side."""
    n_rows, n_tokens = counts_BT.shape
    shaped = x.reshape(n_rows, n_tokens, -1)
    return torch.where(counts_BT[..., None], value.reshape(shaped.shape), shaped).reshape(x.shape)


@torch.no_grad()
def by_plain_hooks(
    model: PreTrainedModel, family: str, ids_BT: Tensor, site: str, value: Tensor, counts_BT: Tensor
) -> Tensor:
    """[B, T, V] logits of all positions."""
    given: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (where_counted(args[0], value, counts_BT), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": where_counted(kwargs["hidden_states"], value, counts_BT)}

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        # The stream in the middle is what the layer was given and what its attention adds.
        put = value - given[0] if given else value
        if isinstance(output, tuple):
            return (where_counted(output[0], put, counts_BT), *output[1:])
        return where_counted(output, put, counts_BT)

    with ExitStack() as stack:
        if site == "hook_embed":
            stack.callback(model.get_input_embeddings().register_forward_hook(after).remove)
        else:
            layer, name = int(site.split(".")[1]), site.split(".", 2)[2]
            if name == "hook_resid_mid":
                block = drawn.module(model, family, layer, "hook_resid_pre")
                stack.callback(
                    block.register_forward_pre_hook(
                        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    ).remove
                )
            place = drawn.module(model, family, layer, "hook_attn_out" if name == "hook_resid_mid" else name)
            if name in ("hook_resid_pre", "attn.hook_z"):
                stack.callback(place.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                stack.callback(place.register_forward_hook(after).remove)
        return model(ids_BT, use_cache=False).logits


def sites_of(model: HookedModel, family: str) -> list[str]:
    """Every kind of site, in the lowest and in the highest layer that has it."""
    names = list(drawn.sites(family))
    if "hook_attn_out" in names and family not in NO_MIDDLE:
        names.append("hook_resid_mid")
    of_any = "hook_resid_pre", "hook_resid_post"
    found = ["hook_embed"]
    for name in names:
        layers = range(model.n_layers) if name in of_any else model.attention_layers
        found += [f"blocks.{layer}.{name}" for layer in (layers[0], layers[-1])]
    return found


def other(clean: Tensor, seed: int) -> Tensor:
    """Activations of the size of those that are there, and not those."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return clean.roll(1, 0) + noise.to(clean.dtype) * clean.std() / 2


def some(n_rows: int, n_tokens: int, seed: int) -> Tensor:
    """[B, T] booleans: in the first row all, in the last none where there are three."""
    counts_BT = torch.rand(n_rows, n_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    counts_BT[0] = True
    counts_BT[2:] = False
    return counts_BT


def all_logits(restart: Restart, hidden_BTD: Tensor) -> Tensor:
    return restart.unembed(hidden_BTD.flatten(0, 1)).unflatten(0, hidden_BTD.shape[:2])


def compare(
    model: HookedModel, plain: PreTrainedModel, family: str, layers: bool, rows: int, at_last: float, atol: float
) -> None:
    """At every site, everywhere and where it counts."""
    ids_BT = prompt(rows=rows)
    restart = Restart(model, ids_BT, sites_of(model, family), layers=layers)
    with torch.no_grad():
        clean_BTV = plain(ids_BT, use_cache=False).logits
    assert off(all_logits(restart, restart.hidden_BTD), clean_BTV) <= atol
    for i, (site, clean) in enumerate(restart.sites.items()):
        value = other(clean, seed=i)
        for counts_BT in (None, some(rows, PROMPT, seed=i)):
            ours_BTV = all_logits(restart, restart.again(site, value, counts_BT))
            everywhere = torch.ones(rows, PROMPT, dtype=torch.bool)
            at_BT = everywhere if counts_BT is None else counts_BT
            theirs_BTV = by_plain_hooks(plain, family, ids_BT, site, value, at_BT)
            assert off(ours_BTV, theirs_BTV) <= atol, (site, counts_BT)
            assert off(ours_BTV[:, -1], theirs_BTV[:, -1]) <= at_last, (site, counts_BT)
            changed_B = (theirs_BTV - clean_BTV).abs().amax((1, 2))
            assert (changed_B > EFFECT).tolist() == at_BT.any(1).tolist(), site


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def capability(hooked: Hooked) -> Callable[[str], Capability]:
    return cache(lambda family: measure_capability(hooked(family), PROMPT))


@pytest.mark.oracle
@pytest.mark.parametrize("family", [*CONFIGS, *ODD])
def test_every_site(family: str, hooked: Hooked, plain: Build, capability: Callable[[str], Capability]):
    found = capability(family)
    at_last, elsewhere = min(WORST, found.tolerance), min(WORST, 4 * found.tolerance)
    compare(hooked(family), plain(family), family, found.way != "full", 3, at_last, elsewhere)


@pytest.mark.oracle
@pytest.mark.parametrize("family", [*CONFIGS, *ODD])
def test_in_float64_only_rounding_is_left(family: str, capability: Callable[[str], Capability]):
    layers = capability(family).way != "full"
    with Widened():
        models = [build(family).double() for _ in range(2)]
        for each in models:
            each.set_experts_implementation("eager")  # torch's grouped matrix product knows no float64
        compare(HookedModel(models[0], family), models[1], family, layers, 2, EXACT, EXACT)


# ---- what is left out, and what is kept ------------------------------------------------------------------------------


def computed(model: HookedModel) -> tuple[list[int], ExitStack]:
    """Fills with the layers whose attention computes."""
    layers, stack = list[int](), ExitStack()
    for layer, block in enumerate(model.blocks):
        assert block.attention is not None
        hook = block.attention.register_forward_hook(lambda *_, layer=layer: layers.append(layer))
        stack.callback(hook.remove)
    return layers, stack


@pytest.mark.parametrize(
    ("site", "layers"),
    [
        ("hook_embed", [0, 1, 2, 3]),
        ("blocks.2.hook_resid_pre", [2, 3]),
        ("blocks.2.hook_resid_mid", [2, 3]),
        ("blocks.2.attn.hook_z", [2, 3]),
        ("blocks.2.hook_resid_post", [3]),
        ("blocks.3.hook_mlp_out", [3]),
        ("blocks.3.hook_resid_post", []),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_layers_above_compute(family: str, site: str, layers: list[int], hooked: Hooked):
    restart = Restart(hooked(family), prompt(rows=2), [site])
    whole = Restart(hooked(family), prompt(rows=2), [site], layers=False)
    value = other(restart.sites[site], seed=3)
    ran, stack = computed(hooked(family))
    with stack:
        hidden_BTD = restart.again(site, value)
        assert ran == layers
        ran.clear()
        torch.testing.assert_close(hidden_BTD, whole.again(site, value), atol=2e-5, rtol=1e-5)
        assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sites", "inputs", "without_layers"),
    [
        (["blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.3.hook_attn_out"], {1, 3}, set()),
        (["blocks.0.hook_resid_post", "hook_embed", "blocks.2.ln2.hook_normalized"], set(), set()),
        (["blocks.2.hook_resid_mid", "blocks.1.hook_resid_pre"], {1, 2}, {2}),
    ],
)
def test_only_inputs_that_are_needed_are_kept(
    sites: list[str], inputs: set[int], without_layers: set[int], hooked: Hooked
):
    for layers, expected in ((True, inputs), (False, without_layers)):
        restart = Restart(hooked("llama"), prompt(), sites, layers=layers)
        assert set(restart._inputs) == expected
        assert list(restart.sites) == sites
        for name, kept in restart.sites.items():
            alone = hooked("llama").forward(prompt(), capture=[name]).cache[name]
            torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-5)
            # A stream that was asked for is not kept a second time.
            layer = int(name.split(".")[1]) if name.endswith("resid_pre") else None
            assert layer not in restart._inputs or restart._inputs[layer] is kept
    assert not Restart(hooked("llama"), prompt(), sites, stop=True)._inputs


@pytest.mark.parametrize("family", ["llama", "mpt", "gemma3n_text"])
@pytest.mark.parametrize(
    ("sites", "layers"),
    [(["hook_embed"], []), (["blocks.2.attn.hook_z", "blocks.0.attn.hook_z"], [0, 1])],
)
def test_a_forward_that_is_stopped(family: str, sites: list[str], layers: list[int], hooked: Hooked):
    model, ids_BT = hooked(family), prompt(rows=3)
    expected = model.forward(ids_BT, capture=sites).cache
    ran, stack = computed(model)
    with stack:
        restart = Restart(model, ids_BT, sites, stop=True)
    assert ran == layers  # the attention of the highest is left before it returns
    assert list(restart.sites) == sites
    for site in sites:
        torch.testing.assert_close(restart.sites[site], expected[site], atol=1e-5, rtol=1e-5)
    for use in (
        lambda: restart.hidden_BTD,
        lambda: restart.again(sites[0], restart.sites[sites[0]]),
        lambda: restart.unembed(torch.zeros(1, 32)),
    ):
        with pytest.raises(RuntimeError, match="ended behind its last site"):
            use()


@pytest.mark.parametrize("site", ["hook_embed", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"])
def test_where_nothing_counts_nothing_changes(site: str, hooked: Hooked):
    restart = Restart(hooked("qwen3"), prompt(rows=2), [site])
    nan = torch.full_like(restart.sites[site], torch.nan)
    nothing = torch.zeros(2, PROMPT, dtype=torch.bool)
    torch.testing.assert_close(restart.again(site, nan, nothing), restart.hidden_BTD, atol=1e-6, rtol=0)


def test_a_value_may_have_another_dtype(hooked: Hooked):
    """An autoencoder's reconstruction is float32 whatever the model computes in."""
    model = HookedModel(build("llama").bfloat16(), "llama")
    sites = ["hook_embed", *(f"blocks.1.{name}" for name in ("hook_resid_post", "hook_resid_mid", "attn.hook_z"))]
    restart = Restart(model, prompt(rows=2), sites)
    for site, clean in restart.sites.items():
        hidden_BTD = restart.again(site, clean.float())
        assert clean.dtype == hidden_BTD.dtype == torch.bfloat16
        torch.testing.assert_close(hidden_BTD, restart.hidden_BTD, atol=0.1, rtol=0.05)
        assert off(restart.again(site, -clean.float()), restart.hidden_BTD) > 1
    assert restart.unembed(restart.hidden_BTD[0]).dtype == torch.float32


# ---- what must not become a number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_an_error(bad: float, hooked: Hooked):
    site = "blocks.3.hook_resid_post"
    restart = Restart(hooked("llama"), prompt(rows=3), [site])
    value = restart.sites[site].clone()
    value[1, 4, 0] = bad
    with pytest.raises(NotFinite, match=rf"llama: NaN or infinity .* at {site}, in 1 of 3 texts"):
        restart.again(site, value)
    assert torch.equal(restart.again(site, restart.sites[site]), restart.hidden_BTD), "and leaves no trace"


@pytest.mark.parametrize("stop", [False, True])
def test_a_model_that_is_not_finite_is_an_error(stop: bool):
    model = HookedModel(build("llama"), "llama")
    with torch.no_grad():
        model.model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight")[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"llama: NaN or infinity in .* layer 1 is the first"):
        Restart(model, prompt(rows=2), ["blocks.2.hook_resid_pre"], stop=stop)


def test_what_is_not_written_is_an_error():
    model = HookedModel(build("llama"), "llama")
    restart = Restart(model, prompt(), ["hook_embed", "blocks.2.hook_mlp_out"])
    model.blocks[2].module.forward = lambda hidden_states, **_: hidden_states  # type: ignore[method-assign]
    with pytest.raises(NotFired, match=f"llama: .* should have fired {PROMPT} times, and fired 0 times"):
        restart.again("blocks.2.hook_mlp_out", restart.sites["blocks.2.hook_mlp_out"])
    run, embedding = model.run, model.model.get_input_embeddings()

    def twice(ids_BT: Tensor) -> Tensor:
        embedding(ids_BT)
        return run(ids_BT)

    model.run = twice  # type: ignore[method-assign]
    with pytest.raises(NotFired, match="hook_embed should have been written once, and was 2 times"):
        restart.again("hook_embed", restart.sites["hook_embed"])


@pytest.mark.parametrize(
    ("site", "shape", "why"),
    [
        (
            "blocks.1.ln2.hook_normalized",
            (2, PROMPT, 32),
            r"llama: blocks\.1\.ln2\.hook_normalized can be read, but not",
        ),
        ("blocks.1.hook_mlp_out", (PROMPT, 32), r"does not fit blocks\.1\.hook_mlp_out, of shape \[2, 14, 32\]"),
        ("blocks.1.attn.hook_z", (2, PROMPT, 32), r"does not fit blocks\.1\.attn\.hook_z, of shape \[2, 14, 4, 8\]"),
    ],
)
def test_what_cannot_be_written(site: str, shape: Sequence[int], why: str, hooked: Hooked):
    restart = Restart(hooked("llama"), prompt(rows=2), [site])
    with pytest.raises(NoSuchPlace, match=why):
        restart.again(site, torch.zeros(*shape))
    with pytest.raises(NoSuchPlace, match=r"\[2\] does not fit the texts, of shape \[2, 14\]"):
        restart.again(site, restart.sites[site], torch.ones(2, dtype=torch.bool))


def test_sites_that_are_not_there(hooked: Hooked):
    with pytest.raises(UnknownSite, match=r"did you mean 'blocks\.1\.mlp\.hook_out'"):
        Restart(hooked("llama"), prompt(), ["blocks.1.mlp_out"])
    with pytest.raises(NoSuchPlace, match="granite has at layer 1 no hook_attn_out"):
        Restart(hooked("granite"), prompt(), ["blocks.1.hook_attn_out"])
    with pytest.raises(NoSuchPlace, match=r"blocks\.1\.attn\.hook_pattern: no forward goes on from inside"):
        Restart(hooked("llama"), prompt(), ["blocks.1.attn.hook_pattern"])


@pytest.mark.parametrize("stop", [False, True])
def test_no_trace_is_left(stop: bool):
    model, site = HookedModel(build("llama"), "llama"), "blocks.2.hook_resid_mid"
    layer = model.blocks[0].module
    own = layer.__dict__["forward"] = layer.forward  # as accelerate does it
    before = model.forward(prompt()).logits_BV
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    restart = Restart(model, prompt(), [site, "hook_embed"], stop=stop)
    if not stop:
        restart.again(site, restart.sites[site] + 1)
        restart.again("hook_embed", restart.sites["hook_embed"] + 1)
        with pytest.raises(NotFinite):
            restart.again(site, restart.sites[site] * torch.nan)
    assert torch.equal(model.forward(prompt()).logits_BV, before)
    assert layer.__dict__["forward"] is own
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()] == hooks
    assert not model.tap.masks
    assert model.tap.fired_B is None


# ---- real weights ----------------------------------------------------------------------------------------------------

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"


@pytest.mark.oracle
@pytest.mark.parametrize(("n_texts", "n_tokens"), [(1, 5), (3, 40)])
def test_smollm2(n_texts: int, n_tokens: int, demo: Callable[[str], Loaded], plain_demo: Build):
    """Sites of every kind, at layers drawn at random and at the ends; what an autoencoder would change, and more."""
    model, plain, random = demo(SMOLLM2).engine.model, plain_demo(SMOLLM2), Random(n_tokens)
    generator = torch.Generator().manual_seed(n_tokens)
    ids_BT = torch.randint(100, model.vocab_size, (n_texts, n_tokens), generator=generator)
    kinds = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"]
    sites = [f"blocks.{random.randrange(model.n_layers)}.{name}" for name in kinds]
    sites += ["hook_embed", f"blocks.{model.n_layers - 1}.hook_resid_post", "blocks.0.hook_resid_pre"]
    restart = Restart(model, ids_BT, sites)
    with torch.no_grad():
        clean_BTV = plain(ids_BT, use_cache=False).logits
    assert off(all_logits(restart, restart.hidden_BTD), clean_BTV) <= WORST
    for i, (site, clean) in enumerate(restart.sites.items()):
        noise = torch.randn(clean.shape, generator=generator)
        value = clean + 0.3 * noise * clean.norm(dim=-1, keepdim=True) / clean.shape[-1] ** 0.5
        counts_BT = some(n_texts, n_tokens, seed=i)
        theirs_BTV = by_plain_hooks(plain, "llama", ids_BT, site, value, counts_BT)
        ours_BTV = all_logits(restart, restart.again(site, value, counts_BT))
        assert off(ours_BTV, theirs_BTV) <= WORST, site
        assert off(theirs_BTV[0], clean_BTV[0]) > 10 * WORST, site
