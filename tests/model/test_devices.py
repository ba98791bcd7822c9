"""Models whose layers accelerate keeps elsewhere: on the CPU and on a disk here, as on several GPUs.

The oracle is the same model in one piece.
"""

from pathlib import Path

import pytest
import torch

from raymi.model.attention import Cut, Tap, cuts
from raymi.model.editing import SiteEdits
from raymi.model.engine import Engine, measure_capability
from raymi.model.full import Full
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask, add, scale
from tests import families

CELLS = [
    Cell(0, (Mask(0, None, ((7, 2), (9, 0))),)),
    Cell(1, (Mask(2, (1,), ((7, 2),)), add(3, "hook_resid_pre", (8,), torch.ones(1)))),
    Cell(1, (Mask(3, (0, 1), ((9, 9),)),)),
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("away", ["everything", "upper layers", "embedding"])
def test_weights_that_are_fetched_for_every_forward(family: str, away: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    whole, ids_PT = HookedModel(families.build(family), family), families.prompt(rows=2)
    [full] = Full(whole, ids_PT).measure(CELLS, range(len(CELLS)))

    model = families.build(family)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)][:1]
    parts = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    backbone = layers[0].partition(".")[0]
    del parts[backbone]
    for name, _ in model.get_submodule(backbone).named_children():
        below = f"{backbone}.{name}"
        if below != layers[0]:
            first = model.get_submodule(below) is model.get_input_embeddings()
            parts[below] = "disk" if away == "everything" or (away == "embedding" and first) else "cpu"
            continue
        for layer in range(whole.n_layers):
            parts[f"{below}.{layer}"] = "disk" if away == "everything" or (away[0] == "u" and layer > 1) else "cpu"
    if model.config.tie_word_embeddings:  # one weight is in one place
        parts["lm_head"] = parts[model_name(model)]
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

    hooked = HookedModel(model, family)
    assert hooked.device == torch.device("cpu")
    engine = Engine(hooked, capability := measure_capability(hooked, 12), capability.way)
    assert engine.way == "cone"
    for batch in engine.ablations(ids_PT, CELLS):
        torch.testing.assert_close(batch.ablated_AV, full.ablated_AV[list(batch.cells)], atol=2e-5, rtol=0)
        assert batch.fired_A.tolist() == full.fired_A[list(batch.cells)].tolist()


def model_name(model: torch.nn.Module) -> str:
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return next(name for name, module in model.named_modules() if module is embedding)


def test_what_is_cut_goes_where_a_layer_is() -> None:
    edges_5E = torch.tensor([[1, 0, 2, 3, 1], [1, 1, 0, 3, 2]]).T
    here = cuts(edges_5E, 2, torch.device("cpu"))[1]
    assert here.to(torch.device("cpu")) is here
    there = here.to(torch.device("meta"))
    assert all(getattr(there, name).device.type == "meta" for name in Cut.__slots__)


def test_edits_of_a_layer_elsewhere_are_counted_where_the_prompt_is() -> None:
    """On `meta` nothing is computed, and nothing comes back from there: counts must not need to."""
    tap = Tap()
    tap.begin(2, torch.device("cpu"))
    edits = SiteEdits(tap, n_heads=4, by_head=False, start=0, n_positions=3)
    edits.append(1, scale(0, "hook_resid_pre", (2,), 0.5))
    edits.append(1, add(0, "hook_resid_pre", (1,), torch.ones(8)))
    assert edits.apply(torch.zeros(2, 3, 8, device="meta")).device.type == "meta"
    assert tap.fired_B is not None
    assert tap.fired_B.tolist() == [0, 2]


def test_cuts_of_a_layer_elsewhere_are_counted_where_the_prompt_is() -> None:
    tap = Tap()
    tap.begin(2, torch.device("cpu"))
    cut = cuts(torch.tensor([[0, 1, 2, 3, 1], [0, 1, 2, 3, 0]]).T, 2, torch.device("cpu"))[0]
    tap.count(cut, torch.tensor([False, True]), torch.tensor([True]))
    assert tap.fired_B is not None
    assert tap.empty_B is not None
    assert tap.closed_B is not None
    assert (tap.fired_B.tolist(), tap.empty_B.tolist(), tap.closed_B.tolist()) == ([0, 2], [0, 1], [0, 1])
