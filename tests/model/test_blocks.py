"""Attention in blocks of rows: what a block leaves out is no row's business."""

import pytest
import torch

from raymi.model import attention
from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from tests import families

LAST = families.PROMPT - 1
CUTS = [
    (Mask(1, (0, 3), ((LAST, 0), (LAST, LAST))),),
    (Mask(2, None, tuple((LAST, key) for key in range(LAST + 1))),),  # no key is left
    (Mask(0, (1,), ((7, 3),)), Mask(3, None, ((LAST, 7),))),
    (Mask(3, (2,), ((7, 7), (9, 8))),),
]


@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mixtral", "gpt2"])
@pytest.mark.parametrize("way", ["cone", "full"])
def test_blocks_of_rows_change_nothing(family: str, way: str, n_prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedModel(families.build(family), family)
    engine = Engine(model, measure_capability(model, families.PROMPT), way)
    ids_PT = families.prompt(rows=n_prompts)
    cells = [Cell(prompt, cut) for cut in CUTS for prompt in range(n_prompts)]

    def measured() -> dict[int, tuple[torch.Tensor, int, int]]:
        engine.cones.clear()
        return {
            i: (batch.ablated_AV[at], int(batch.fired_A[at]), int(batch.empty_A[at]))
            for batch in engine.ablations(ids_PT, cells)
            for at, i in enumerate(batch.cells)
        }

    whole = measured()
    blocks: list[slice] = []
    of_rows = attention.Tap.of_rows
    monkeypatch.setattr(attention, "NUMBERS", {"cpu": model.n_heads * families.PROMPT})
    monkeypatch.setattr(
        attention.Tap, "of_rows", lambda tap, layer, rows: blocks.append(rows) or of_rows(tap, layer, rows)
    )
    parts = measured()
    assert len(blocks) > model.n_layers  # it was cut into blocks indeed
    assert parts.keys() == whole.keys() == set(range(len(cells)))
    for i, (logits_V, fired, empty) in whole.items():
        assert float((parts[i][0] - logits_V).abs().max()) < 5e-5
        assert parts[i][1:] == (fired, empty)
    assert any(empty for _, _, empty in whole.values())
