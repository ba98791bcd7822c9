"""Knockouts equal what others compute: to 1e-4 on the logits, where their effect exceeds 1e-3."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.model.loading import Loaded
from raymi.model.sites import NoSuchPlace
from tests import oracles
from tests.families import CONFIGS, PROMPT, REQUIRED, WINDOW, Build, build, prompt
from tests.model.measuring import by_engine, in_one_batch
from tests.oracles import Knockout

pytestmark = pytest.mark.oracle

TOLERANCE, EFFECT = 1e-4, 1e-3
SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"


def cases(n_layers: int, n_heads: int, last: int) -> dict[str, Knockout]:
    """Knockouts of every kind, of a prompt whose last position is `last`, on a model of at least four layers."""
    every_key = tuple((last, key) for key in range(last + 1))
    return {
        "one head": Knockout((1,), (n_heads // 2,), ((last, last - 2),)),
        "all heads": Knockout((2,), None, ((last, last - 1),)),
        "several edges": Knockout((0,), (0, n_heads - 1), ((last - 1, last - 3), (last, last - 4), (last, last))),
        "several layers": Knockout((0, 1, n_layers - 1), None, ((last, last - 3), (last, last - 1))),
        "a query in the middle": Knockout(
            (1,), None, ((last - 3, last - 4), (last - 2, last - 2), (last - 2, last - 3))
        ),
        "the first key": Knockout((n_layers // 2,), None, ((last, 0),)),
        "no key left in one head": Knockout((1,), (1,), every_key),
        "no key left anywhere": Knockout(tuple(range(n_layers)), None, every_key),
        "no key left at the first position": Knockout((0,), None, ((0, 0),)),
    }


def windowed(last: int) -> dict[str, Knockout]:
    inside = tuple((last, key) for key in range(last - WINDOW + 1, last + 1))
    return {
        "both sides of a window's edge": Knockout((0, 2), None, ((last, last - WINDOW), (last, last - WINDOW + 1))),
        "only what is outside a window": Knockout((0,), None, ((last, 2), (last, last - WINDOW))),
        "no key left inside a window": Knockout((2,), None, inside),
        "far from the last position": Knockout((1,), None, ((6, 4), (6, 6), (7, 5))),
    }


def cell(prompt: int, knockout: Knockout) -> Cell:
    return Cell(prompt, tuple(Mask(layer, knockout.heads, knockout.edges) for layer in knockout.layers))


Logits = Mapping[str, Tensor]


def compare(ours: Logits, theirs: Logits, clean: Logits, share: float) -> None:
    """Equal where there is an effect, and at least `share` of all have one: to compare nothing is to fail."""
    assert ours.keys() == theirs.keys()
    effects = {name: float((theirs[name] - clean[name]).abs().max()) for name in theirs}
    errors = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    assert all(error <= TOLERANCE for error in errors.values()), errors
    assert sum(effect > EFFECT for effect in effects.values()) >= share * len(effects) > 0, effects


def check(
    engine: Engine, plain: PreTrainedModel, ids_PT: Tensor, knockouts: Mapping[str, Knockout], share: float
) -> None:
    """Knockouts of all prompts at once, against edited softmaxes, and against edited masks where keys are left."""
    named = {f"{p}: {name}": (p, knockout) for p in range(len(ids_PT)) for name, knockout in knockouts.items()}
    n_heads = engine.model.n_heads
    n_edges = [len(k.layers) * len(k.edges) * (n_heads if k.heads is None else len(k.heads)) for _, k in named.values()]
    clean_PV = torch.stack([oracles.last_logits(plain, ids_T) for ids_T in ids_PT])
    clean = {name: clean_PV[p] for name, (p, _) in named.items()}
    found = {name: oracles.by_edited_softmax(plain, ids_PT[p], knockout) for name, (p, knockout) in named.items()}
    left = [name for name, of in found.items() if of.n_empty == 0 and oracles.dispatches(plain)]
    masked = {name: oracles.by_edited_mask(plain, ids_PT[named[name][0]], named[name][1]) for name in left}

    cells = [cell(*of) for of in named.values()]
    for measured in (in_one_batch(engine.model, ids_PT, cells), by_engine(engine, ids_PT, cells)):
        ours = dict(zip(named, measured.ablated_AV, strict=True))
        torch.testing.assert_close(measured.clean_PV, clean_PV, atol=TOLERANCE, rtol=0)
        compare(ours, {name: of.logits_V for name, of in found.items()}, clean, share)
        if oracles.dispatches(plain):
            compare({name: ours[name] for name in left}, masked, clean, share)
        assert measured.empty_A.tolist() == [of.n_empty for of in found.values()]
        assert measured.closed_A.tolist() == [of.n_closed for of in found.values()]
        assert (measured.fired_A + measured.closed_A).tolist() == n_edges


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, hooked: Callable[[str], HookedModel], plain: Build):
    knockouts = cases(4, 4, PROMPT - 1) | windowed(PROMPT - 1)
    capability = measure_capability(hooked(family), PROMPT)
    assert (capability.way == "cone") == (family not in oracles.OWN_ATTENTION), capability.why
    check(Engine(hooked(family), capability, capability.way), plain(family), prompt(rows=2), knockouts, 0.6)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in oracles.OWN_ATTENTION])
def test_an_attention_written_out_key_by_key(family: str, hooked: Callable[[str], HookedModel], plain: Build):
    ids_PT, every = prompt(), cases(4, 4, PROMPT - 1)
    chosen = {name: every[name] for name in ("several layers", "several edges", "no key left in one head")}
    batch = in_one_batch(hooked(family), ids_PT, [cell(0, knockout) for knockout in chosen.values()])
    ours = dict(zip(chosen, batch.ablated_AV, strict=True))
    theirs = {name: oracles.by_naive_attention(plain(family), ids_PT[0], knockout) for name, knockout in chosen.items()}
    clean = oracles.by_naive_attention(plain(family), ids_PT[0], oracles.NOTHING)
    compare(ours, theirs, dict.fromkeys(chosen, clean), 1.0)


@pytest.mark.parametrize("family", oracles.BRIDGED)
def test_transformer_lens(family: str, hooked: Callable[[str], HookedModel]):
    ids_PT, chosen = prompt(seed=4), cases(4, 4, PROMPT - 1)
    lens = oracles.bridge(build(family))
    batch = in_one_batch(hooked(family), ids_PT, [cell(0, knockout) for knockout in chosen.values()])
    ours = dict(zip(chosen, batch.ablated_AV, strict=True))
    theirs = {name: oracles.by_bridge(lens, ids_PT[0], knockout) for name, knockout in chosen.items()}
    clean = oracles.by_bridge(lens, ids_PT[0], oracles.NOTHING)
    torch.testing.assert_close(batch.clean_PV[0], clean, atol=TOLERANCE, rtol=0)
    compare(ours, theirs, dict.fromkeys(chosen, clean), 0.7)


@pytest.mark.parametrize("family", REQUIRED)
def test_in_float64_only_rounding_is_left(family: str):
    model, plain, ids_PT = HookedModel(build(family).double(), family), build(family).double(), prompt()
    knockouts = list(cases(4, 4, PROMPT - 1).values())
    # The rest of a forward in float64: what remains is the softmax, which all families take in float32.
    interventions = [cell(0, knockout).interventions for knockout in knockouts]
    ours_AV = model.forward(ids_PT.expand(len(knockouts), -1), interventions).logits_BV
    theirs_AV = torch.stack([oracles.by_edited_softmax(plain, ids_PT[0], k)[0] for k in knockouts])
    torch.testing.assert_close(ours_AV.double(), theirs_AV, atol=2e-6, rtol=1e-6)


_ENCODER = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "is_decoder": True, "embedding_size": 32, "input_embedding_size": 16},
}


@pytest.mark.parametrize("family", ["bert", "rembert", "roformer"])
def test_encoders_made_into_decoders(family: str):
    """Their attention ends with a norm; two of them do not dispatch, so that empty lines are zeroed by a hook."""

    def made() -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**_ENCODER)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.25)
        return model

    hooked = HookedModel(made(), family)
    capability = measure_capability(hooked, PROMPT)
    check(Engine(hooked, capability, capability.way), made(), prompt(rows=2), cases(4, 4, PROMPT - 1), 0.6)


# Family -> a layer with a window (or chunk), and a key just inside and one just outside of it.
_BEGIN = PROMPT - WINDOW
EDGES = {
    **dict.fromkeys(("mistral", "starcoder2", "gemma2", "gemma3_text", "gpt_oss"), (0, _BEGIN, _BEGIN - 1)),
    "qwen2": (2, _BEGIN, _BEGIN - 1),
    "gpt_neo": (1, _BEGIN, _BEGIN - 1),
    "llama4_text": (0, 10, 9),
}


@pytest.mark.parametrize("family", EDGES)
def test_a_window_ends_where_it_should(family: str, hooked: Callable[[str], HookedModel]):
    layer, inside, outside = EDGES[family]
    cells = [Cell(0, (Mask(layer, None, ((PROMPT - 1, key),)),)) for key in (inside, outside)]
    batch = in_one_batch(hooked(family), prompt(), cells)
    effects = (batch.ablated_AV - batch.clean_PV).abs().amax(-1).tolist()
    assert effects[0] > EFFECT
    assert effects[1] < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "falcon"])
def test_company_in_a_batch_does_not_matter(family: str, hooked: Callable[[str], HookedModel]):
    model, ids_PT = hooked(family), prompt(rows=3)
    knockouts = [*cases(4, 4, PROMPT - 1).values()]
    cells = [cell(i % 3, knockout) for i, knockout in enumerate(knockouts)]
    together = in_one_batch(model, ids_PT, cells)
    for row, of in enumerate(cells):
        alone = model.forward(ids_PT[of.prompt][None], [of.interventions])
        torch.testing.assert_close(together.ablated_AV[row], alone.logits_BV[0], atol=1e-5, rtol=0)
        counts = alone.fired_B, alone.empty_B, alone.closed_B
        assert [of[row] for of in together[2:]] == [of[0] for of in counts if of is not None]


# ---- the demo models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glassllm-en", "glassllm-pt", "microformer-mgm"])
def test_small_trained_models(name: str, demo: Callable[[str], Loaded], plain_demo: Build):
    engine, model = demo(name).engine, demo(name).engine.model
    ids_PT = torch.randint(4, model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    check(engine, plain_demo(name), ids_PT, cases(model.n_layers, model.n_heads, 23), 0.7)


FRANCE, SPAIN = [504, 3575, 282, 4649, 314], [504, 3575, 282, 7476, 314]
"""What SmolLM2's tokenizer makes of "The capital of France is", and of Spain."""


def test_smollm2(demo: Callable[[str], Loaded], plain_demo: Build):
    engine, plain, ids_PT = demo(SMOLLM2).engine, plain_demo(SMOLLM2), torch.tensor([FRANCE, SPAIN])
    knockouts = list(cases(engine.model.n_layers, engine.model.n_heads, 4).items())
    check(engine, plain, ids_PT[:1], dict(knockouts[::2]), 0.7)
    check(engine, plain, ids_PT, dict(knockouts[1:4:2]), 0.7)


def test_smollm2_by_transformer_lens(demo: Callable[[str], Loaded], plain_demo: Build):
    model, ids_T = demo(SMOLLM2).engine.model, torch.tensor(SPAIN)
    lens = oracles.bridge(copy.deepcopy(plain_demo(SMOLLM2)))
    chosen = {name: cases(model.n_layers, model.n_heads, 4)[name] for name in ("all heads", "no key left in one head")}
    batch = in_one_batch(model, ids_T[None], [cell(0, knockout) for knockout in chosen.values()])
    ours = dict(zip(chosen, batch.ablated_AV, strict=True))
    theirs = {name: oracles.by_bridge(lens, ids_T, knockout) for name, knockout in chosen.items()}
    compare(ours, theirs, dict.fromkeys(chosen, oracles.by_bridge(lens, ids_T, oracles.NOTHING)), 1.0)


def test_the_reference_cell_on_smollm2(demo: Callable[[str], Loaded]):
    """Middle layer, all heads, last position to first: figures found with plain transformers and an edited mask."""
    ids_PT, paris = torch.tensor([FRANCE]), 7042
    batch = in_one_batch(demo(SMOLLM2).engine.model, ids_PT, [Cell(0, (Mask(15, None, ((4, 0),)),))])
    clean_V, ablated_V = batch.clean_PV[0], batch.ablated_AV[0]
    assert oracles.kl(clean_V, ablated_V) == pytest.approx(0.049847, abs=2e-6)
    assert float(clean_V[paris] - ablated_V[paris]) == pytest.approx(0.93340, abs=2e-5)
    assert oracles.probabilities(clean_V)[paris] == pytest.approx(0.77058, abs=1e-5)


# ---- hybrids: attention beside states, convolutions and linear attention ---------------------------------------------

HYBRIDS = {"qwen3_next": (1, 4), "jamba": (1, 4), "bamba": (1, 4), "recurrent_gemma": (2, 5), "falcon_h1": (0, 1, 2, 3)}
"""Family -> its layers with attention."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids(family: str, hooked: Callable[[str], HookedModel], plain: Build):
    layers, last = HYBRIDS[family], PROMPT - 1
    knockouts = {
        "one head": Knockout(layers[:1], (2,), ((last, last - 2),)),
        "a query in the middle": Knockout(layers[:1], None, ((last - 2, last - 3), (last - 2, last - 2))),
        "every layer": Knockout(layers, None, ((last, last - 1), (last - 1, last - 1))),
        "no key left": Knockout(layers[-1:], (1,), tuple((last, key) for key in range(PROMPT))),
    }
    assert tuple(hooked(family).attention_layers) == layers
    capability = measure_capability(hooked(family), PROMPT)
    cells = [cell(0, knockout) for knockout in knockouts.values()]
    found = [oracles.by_edited_softmax(plain(family), prompt()[0], k, layers) for k in knockouts.values()]
    theirs = dict(zip(knockouts, (of.logits_V for of in found), strict=True))
    clean = dict.fromkeys(knockouts, oracles.last_logits(plain(family), prompt()[0]))
    for way in {capability.way, "full"}:
        measured = by_engine(Engine(hooked(family), capability, way), prompt(), cells)
        compare(dict(zip(knockouts, measured.ablated_AV, strict=True)), theirs, clean, 0.7)
        assert measured.empty_A.tolist() == [of.n_empty for of in found] == [0, 0, 0, 1]


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "bamba", "recurrent_gemma"])
def test_a_layer_without_attention_is_refused_by_name(family: str, hooked: Callable[[str], HookedModel]):
    with pytest.raises(NoSuchPlace, match=rf"{family}: layer 0 has no attention to cut; \[.*\] have"):
        hooked(family).forward(prompt(), [[Mask(0, None, ((3, 2),))]])
    with pytest.raises(NoSuchPlace, match=f"{family} has no attn.hook_pattern: its layer 0 has no attention"):
        hooked(family).forward(prompt(), capture=["blocks.0.attn.hook_pattern"])
