"""Captured values and positions from the end, beside plain hooks on the untouched transformers model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import raymi
from raymi import Mask, Model, UserError
from raymi.interventions import EDITABLE, add, mean, replace, scale, zero
from raymi.model.sites import NoSuchPlace

pytestmark = pytest.mark.oracle

TEXT = "The capital of France is"
OTHER = "Peru is the in Lima"
SHORT = "Peru is"
HEADS = (3, 1)


def place(model: PreTrainedModel, layer: int, site: str) -> tuple[nn.Module, bool]:
    """By hand: in Llama, which module's input (True) or output a site is."""
    block: Any = model.model.layers[layer]  # pyright: ignore
    return {
        "hook_resid_pre": (block, True),
        "hook_resid_post": (block, False),
        "hook_attn_out": (block.self_attn, False),
        "attn.hook_out": (block.self_attn, False),
        "hook_mlp_out": (block.mlp, False),
        "mlp.hook_out": (block.mlp, False),
        "attn.hook_z": (block.self_attn.o_proj, True),
    }[site]


def run(model: PreTrainedModel, ids: list[int], at: tuple[nn.Module, bool], change: Callable[[Tensor], None]) -> Tensor:
    """Logits of the last position, when `change` does something to a copy of what is at a place."""
    module, is_input = at

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        change(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        change(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    if is_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].float()
    finally:
        handle.remove()


def patched(model: PreTrainedModel, ids: list[int], other: list[int], layer: int, site: str) -> Tensor:
    """What stood at positions 2 and 4 of another text, put there: at z, of two heads."""
    at, there = place(model, layer, site), list[Tensor]()
    run(model, other, at, lambda x: there.append(x.clone()))

    def change(x: Tensor) -> None:
        for position in (2, 4):
            if site != "attn.hook_z":
                x[0, position] = there[0][0, position]
            else:
                for head in HEADS:
                    x[0, position].view(4, -1)[head] = there[0][0, position].view(4, -1)[head]

    return run(model, ids, at, change)


@pytest.fixture(scope="module")
def of_dtype(cache: Path, tiny: Model) -> dict[str, Model]:
    return {"float32": tiny, "bfloat16": raymi.load("org/tiny", cache_dir=cache, dtype="bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", EDITABLE)
def test_what_was_captured_goes_in_as_it_is(of_dtype: dict[str, Model], dtype: str, site: str) -> None:
    model = of_dtype[dtype]
    own = AutoModelForCausalLM.from_pretrained(model.cached.path, dtype=dtype, attn_implementation="eager")
    ids, other = ([*model.tokenize(text).token_ids] for text in (TEXT, OTHER))
    heads = HEADS if site == "attn.hook_z" else None
    for layer in (0, 1):
        name = f"blocks.{layer}.{site}"
        there = model.clean(OTHER, capture=name).cache[name]
        assert there.dtype == getattr(torch, dtype)
        edit = replace(layer, site, (-1, 2), there, heads)
        expected = patched(own, ids, other, layer, site)
        one, swept = model.ablate(TEXT, edit), model.sweep(TEXT, edit, keep_logits=True)
        room = 1e-5 if dtype == "float32" else 0.02 * float(expected.abs().max())
        assert (one.clean.logits - expected).abs().max() > 5 * room, "it is felt"
        torch.testing.assert_close(one.ablated.logits, expected, atol=room, rtol=0)
        assert swept.logits is not None
        torch.testing.assert_close(swept.logits[0], expected, atol=room, rtol=0)
        assert one.fired == swept.frame["fired"][0] == (4 if heads else 2)


def test_a_capture_of_another_dtype_goes_in(of_dtype: dict[str, Model]) -> None:
    tiny, half = of_dtype["float32"], of_dtype["bfloat16"]
    name = "blocks.1.hook_mlp_out"
    there = tiny.clean(OTHER, capture=name).cache[name]
    exactly = half.ablate(TEXT, replace(1, "hook_mlp_out", (4,), there[0, [4]].bfloat16())).ablated.logits
    assert torch.equal(half.ablate(TEXT, replace(1, "hook_mlp_out", (-1,), there)).ablated.logits, exactly)
    assert torch.equal(half.ablate(TEXT, replace(1, "hook_mlp_out", (-1,), there.double())).ablated.logits, exactly)


def test_captures_of_all_heads_go_into_all_heads_and_are_added(tiny: Model) -> None:
    own = AutoModelForCausalLM.from_pretrained(tiny.cached.path, attn_implementation="eager")
    there = tiny.clean(OTHER, capture="blocks.0.attn.hook_z").cache["blocks.0.attn.hook_z"]
    ids = [*tiny.tokenize(TEXT).token_ids]

    def change(x: Tensor) -> None:
        x[0, 3] += there[0, 3].flatten()

    expected = run(own, ids, place(own, 0, "attn.hook_z"), change)
    found = tiny.ablate(TEXT, add(0, "attn.hook_z", (-2,), there)).ablated.logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_capture_of_the_ablated_run_is_what_the_edit_left(tiny: Model) -> None:
    """So it can go into another run, where it does the same."""
    name = "blocks.0.hook_resid_post"
    first = tiny.ablate(TEXT, scale(0, "hook_mlp_out", (-1,), 3.0), capture=name)
    again = tiny.ablate(TEXT, replace(0, "hook_resid_post", (-1,), first.ablated.cache[name]))
    torch.testing.assert_close(again.ablated.logits, first.ablated.logits, atol=1e-5, rtol=0)


def test_positions_count_from_the_end_in_edits_and_masks(tiny: Model) -> None:
    own = AutoModelForCausalLM.from_pretrained(tiny.cached.path, attn_implementation="eager")
    ids = [*tiny.tokenize(TEXT).token_ids]

    def change(x: Tensor) -> None:
        x[0, -5] = 0
        x[0, 4] = 0

    expected = run(own, ids, place(own, 0, "hook_mlp_out"), change)
    ablations = [
        zero(0, "hook_mlp_out", (-5, -1)),
        zero(0, "hook_mlp_out", (0, 4)),
        Mask(1, (2,), ((-1, -2), (3, -5), (-1, 0))),
        Mask(1, (2,), ((4, 3), (3, 0), (4, 0))),
        zero(1, "attn.hook_z", (-1,), (2,)),
    ]
    found = tiny.sweep(TEXT, ablations, keep_logits=True)
    assert found.logits is not None
    torch.testing.assert_close(found.logits[0], expected, atol=1e-5, rtol=0)
    assert found.frame["kl"][0] == found.frame["kl"][1] > 1e-4
    assert found.frame["kl"][2] == found.frame["kl"][3] > 1e-6
    assert found.frame["fired"].to_list() == [2, 2, 3, 3, 1]
    assert found.frame["position"].to_list() == [None, None, None, None, 4]
    assert found.frame["position_token"][4] == "is"
    for at, one in enumerate(ablations):
        torch.testing.assert_close(tiny.ablate(TEXT, one).ablated.logits, found.logits[at], atol=1e-5, rtol=0)


def whole(model: Model, text: str, site: str) -> Tensor:
    return model.clean(text, capture=f"blocks.0.{site}").cache[f"blocks.0.{site}"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: zero(0, "hook_mlp_out", (-6,)), NoSuchPlace, "position -6, where there are -5 to 4"),
        (lambda m: Mask(0, None, ((4, -6),)), NoSuchPlace, "position -6, where there are -5 to 4"),
        (lambda m: Mask(0, None, ((7, -1),)), NoSuchPlace, "position 7, where there are 0 to 4"),
        (lambda m: zero(0, "hook_mlp_out", (4, -1)), ValueError, "names position 4 more than once"),
        (lambda m: Mask(0, None, ((2, -1),)), ValueError, "no causal model has an edge from query 2 to key 4"),
        (lambda m: Mask(0, None, ((-5, 1),)), ValueError, "no causal model has an edge from query 0 to key 1"),
        (
            lambda m: replace(0, "hook_mlp_out", (-1,), whole(m, SHORT, "hook_mlp_out")),
            NoSuchPlace,
            r"captured over 2 tokens, and the prompt has 5; choose what goes into positions \[4\]",
        ),
        (
            lambda m: replace(0, "hook_mlp_out", (0,), whole(m, SHORT, "hook_mlp_out")),
            NoSuchPlace,
            "captured over 2 tokens, and the prompt has 5",
        ),
        (
            lambda m: replace(0, "hook_mlp_out", (0,), whole(m, TEXT, "hook_mlp_out").expand(2, -1, -1)),
            NoSuchPlace,
            "captured from 2 prompts",
        ),
        (
            lambda m: replace(0, "hook_mlp_out", (0,), whole(m, TEXT, "hook_mlp_out")[..., :8]),
            NoSuchPlace,
            r"shape \[1, 8\] does not fit blocks\.0\.hook_mlp_out, which takes \[1, 16\]",
        ),
        (
            lambda m: replace(0, "attn.hook_z", (0,), whole(m, TEXT, "attn.hook_z")[:, :, :2], (1,)),
            NoSuchPlace,
            "is of 2 heads; blocks.0.attn.hook_z has 4",
        ),
        (
            lambda m: replace(0, "attn.hook_z", (0,), whole(m, TEXT, "attn.hook_z")[:, :, :2]),
            NoSuchPlace,
            r"takes \[1, 4, 4\]",
        ),
        (lambda m: replace(0, "attn.hook_z", (0,), whole(m, TEXT, "attn.hook_z"), (4,)), NoSuchPlace, "head 4"),
        (lambda m: replace(0, "hook_mlp_out", (0,), whole(m, TEXT, "attn.hook_z")), NoSuchPlace, "does not fit"),
    ],
)
def test_what_could_be_another_place_is_refused(
    tiny: Model, make: Callable[[Model], Any], error: type[Exception], message: str
) -> None:
    one = make(tiny)
    with pytest.raises(error, match=message):
        tiny.ablate(TEXT, one)
    with pytest.raises(error, match=f"^ablation 1: .*{message}"):
        tiny.sweep(TEXT, [Mask(0, None, ((4, 0),)), one])


@pytest.mark.parametrize("site", ["hook_mlp_out", "attn.hook_z"])
def test_a_capture_is_not_taken_for_its_mean(tiny: Model, site: str) -> None:
    there = whole(tiny, OTHER, site)
    with pytest.raises(ValueError, match=r"its mean is value\.mean\(\(0, 1\)\)"):
        mean(0, site, (4,), there)
    meant = tiny.ablate(TEXT, mean(0, site, (4,), there.mean((0, 1))))
    assert meant.kl == pytest.approx(tiny.ablate(TEXT, replace(0, site, (4,), there[0].mean(0))).kl)


def test_mistakes_of_ablations_are_in_words(tiny: Model) -> None:
    cut: Any = Mask(0, None, ((4, 0),))
    for wrong, message in (
        ([], "the ablation has no interventions, and would be the clean prompt"),
        ([[cut], [cut]], r"the ablation: found \[Mask\(.*which is no intervention"),
        ("zero", "found 'z', which is no intervention"),
        (3, "found 3, which is no intervention"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.ablate(TEXT, wrong)
    with pytest.raises(UserError, match="ablation 1: found 'hook_mlp_out', which is no intervention"):
        tiny.sweep(TEXT, [cut, (cut, "hook_mlp_out")])
