import pytest
import torch
from torch import Tensor, nn

from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask, zero
from raymi.model.side_by_side import heads_stand_there
from tests.families import PROMPT, VOCABULARY, build

N = 4
"""Layers of the tiny models."""


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(build("gptj"), "gptj")


def stand(model: HookedModel, name: str) -> set[int]:
    def run(cuts: object) -> None:
        with model.armed(cuts, 6):  # pyright: ignore
            model.run(model.probe_ids().expand(len(cuts), -1))  # pyright: ignore

    at: dict[int, nn.Module] = {layer: model.model.get_submodule(f"transformer.h.{layer}.{name}") for layer in range(N)}
    return heads_stand_there(at, model.heads, 6, run)


@pytest.mark.parametrize(
    ("name", "there"), [("attn.out_proj", True), ("attn.v_proj", False), ("attn.q_proj", False), ("mlp.fc_out", False)]
)
def test_only_the_output_projection_is_fed_with_the_heads(model: HookedModel, name: str, there: bool):
    assert stand(model, name) == (set(range(N)) if there else set())


def test_a_place_that_is_not_proven_is_not_offered(monkeypatch: pytest.MonkeyPatch):
    from raymi.model import hooked

    found = hooked.blocks

    def blocks(*args: object) -> list[object]:
        its = found(*args)  # pyright: ignore
        its[2].z = its[2].module.attn.v_proj  # pyright: ignore
        return list(its)

    monkeypatch.setattr(hooked, "blocks", blocks)
    model = HookedModel(build("gptj"), "gptj")
    assert [block.z is not None for block in model.blocks] == [True, True, False, True]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "path"), [("gptj", "attn.out_proj"), ("mpt", "attn.out_proj")])
def test_a_head_is_zeroed_where_its_output_goes_on(name: str, path: str):
    ids_1T = torch.arange(3, 3 + PROMPT)[None] * 7 % VOCABULARY
    plain, layer, head = build(name), 1, 2
    projection = next(m for n, m in plain.named_modules() if n.endswith(f".{layer}.{path}"))

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        width = z.shape[-1] // 4
        z[:, -1, head * width : (head + 1) * width] = 0
        return (z, *args[1:])

    with torch.no_grad():
        clean = plain(ids_1T, use_cache=False).logits[0, -1]
        handle = projection.register_forward_pre_hook(hook)
        theirs = plain(ids_1T, use_cache=False).logits[0, -1]
        handle.remove()
    ours = HookedModel(build(name), name).forward(ids_1T, [[zero(layer, "attn.hook_z", (PROMPT - 1,), (head,))]])
    scale = float(clean.abs().max())
    assert float((ours.logits_BV[0] - theirs).abs().max()) <= 1e-5 * scale
    assert float((theirs - clean).abs().max()) > 1e-4 * scale


@pytest.mark.oracle
def test_a_line_that_a_window_of_the_module_s_own_leaves_no_key_attends_to_nothing():
    """GPT-Neo keeps its windows in buffers of its own: older keys are open in the mask that it is given."""
    ids_1T = torch.arange(3, 3 + PROMPT)[None] * 7 % VOCABULARY
    plain, layer, last = build("gpt_neo"), 1, PROMPT - 1
    attention = plain.get_submodule(f"transformer.h.{layer}.attn.attention")
    open_T = attention.get_buffer("bias")[0, 0, last, :PROMPT]
    assert 0 < int(open_T.sum()) < PROMPT

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[:, last, : z.shape[-1] // 4] = 0
        return (z, *args[1:])

    with torch.no_grad():
        clean = plain(ids_1T, use_cache=False).logits[0, -1]
        handle = attention.get_submodule("out_proj").register_forward_pre_hook(hook)
        theirs = plain(ids_1T, use_cache=False).logits[0, -1]
        handle.remove()
    edges = tuple((last, key) for key in open_T.nonzero()[:, 0].tolist())
    ours = HookedModel(build("gpt_neo"), "gpt_neo").forward(ids_1T, [[Mask(layer, (0,), edges)]])
    assert ours.empty_B.tolist() == [1]
    assert float((ours.logits_BV[0] - theirs).abs().max()) <= 1e-5 * float(clean.abs().max())
    assert float((theirs - clean).abs().max()) > 1e-4 * float(clean.abs().max())
