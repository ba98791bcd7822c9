"""A second opinion in half precision: right ablations pass, another head's do not, and jumps of experts are told."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.experiments.kind import Company
from raymi.experiments.knockout.run import verify
from raymi.experiments.knockout.spec import Ablation, KnockoutSpec
from raymi.experiments.setting import Drawn, Setting, no_saes
from raymi.model.engine import Engine, measure_capability
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.store import schemas
from tests.experiments.knockout.test_run import PROMPTS
from tests.families import PROMPT, build
from tests.model.measuring import one_thread

__all__ = ["one_thread"]

WHOLE_LINE = tuple((PROMPT - 1, key) for key in range(PROMPT))
SPEC = KnockoutSpec.model_validate({"kind": "knockout", "layers": "all"})
ABLATIONS = tuple(Ablation((layer,), (head,), WHOLE_LINE) for layer in (0, 1, 3) for head in (1, 3))


def engine(family: str, dtype: torch.dtype, change: Callable[[HookedModel], object] = lambda _: None) -> Engine:
    model = HookedModel(build(family).to(dtype), family)
    change(model)
    found = measure_capability(model, PROMPT)
    return Engine(model, found, found.way)


def verified(engine: Engine) -> list[dict[str, Any]]:
    prompt = PROMPTS["both"]
    among: Company = [(prompt, ABLATIONS), (PROMPTS["answer"], ABLATIONS)]
    drawn = [Drawn(SPEC, prompt, one, lambda: among) for one in ABLATIONS]
    setting = Setting(engine, PROMPTS, no_saes, frozenset(), "org/tiny", "r", "")
    records = verify(setting, drawn)
    schemas.rows("verifications", records)
    return records


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", torch.float16), ("qwen3", torch.bfloat16), ("olmoe", torch.bfloat16)]
)
def test_what_is_right_passes(family: str, dtype: torch.dtype):
    for record in verified(engine(family, dtype)):
        assert record["passed"]
        assert record["engine"] == "cone"
        assert 0 < record["max_logit_diff"] <= record["tolerance"]
        assert 0 < record["spread"] <= record["spread_tolerance"]
        assert record["effect"] > 2 * record["spread"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_head_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    right = engine("gpt2", dtype)
    ablations = Engine.ablations

    def wrong(self: Engine, ids_PT: Tensor, cells: Sequence[Cell]) -> Iterator[Batch]:
        def next_head(cell: Cell) -> Cell:
            [mask] = cell.interventions
            assert isinstance(mask, Mask)
            assert mask.heads is not None
            return Cell(cell.prompt, (replace(mask, heads=tuple(head - 1 for head in mask.heads)),))

        return ablations(self, ids_PT, [next_head(cell) for cell in cells])

    monkeypatch.setattr(Engine, "ablations", wrong)
    assert not any(record["passed"] for record in verified(right))


def three_tied(model: HookedModel) -> None:
    for layer in range(model.n_layers):
        weight = model.model.get_submodule(f"model.layers.{layer}.mlp.gate").get_parameter("weight")
        with torch.no_grad():
            weight[1:3] = weight[0]
            weight[2, ::2] *= 1 + 2**-7


def test_jumps_of_experts_are_counted_and_pass():
    records = verified(engine("mixtral", torch.bfloat16, three_tied))
    assert all(record["passed"] for record in records)
    assert sum(record["flips"] for record in records) > 0
    assert any(record["jumped"] for record in records)


def test_in_float32_nothing_is_said_of_it():
    for record in verified(engine("gpt2", torch.float32)):
        assert record["passed"]
        assert "spread" not in record
