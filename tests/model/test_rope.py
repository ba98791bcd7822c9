"""Positions that stretch with the prompt: what a prompt gives does not depend on what was measured before it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from raymi.model.hooked import Cell
from raymi.model.interventions import Mask
from raymi.model.loading import Loaded, load
from raymi.model.rope import forget_lengths
from tests.fakes import LLAMA, add_model
from tests.model.measuring import by_engine, one_thread  # noqa: F401  # pyright: ignore[reportUnusedImport]

TRAINED = 16
"""Positions that the model was trained with."""
LENGTHS = (8, 40, 24, TRAINED, 60, 17)


def config(scaling: dict[str, Any]) -> dict[str, Any]:
    return LLAMA | {"max_position_embeddings": TRAINED, "rope_scaling": scaling}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return add_model(tmp_path, "org/dynamic", config({"type": "dynamic", "factor": 4.0}), scale=0.5)


def ids(length: int) -> Tensor:
    return torch.arange(7, 7 + length)[None] * 5 % LLAMA["vocab_size"]


def measured(loaded: Loaded, lengths: Sequence[int]) -> dict[int, Tensor]:
    """Clean and ablated logits of a prompt of each length, [2, V]."""
    found: dict[int, Tensor] = {}
    for length in lengths:
        # From the middle on, so that the cone has a prefix to attend to.
        cell = Cell(0, (Mask(0, None, edges=((length // 2, 0),)),))
        out = by_engine(loaded.engine, ids(length), [cell])
        found[length] = torch.cat([out.clean_PV, out.ablated_AV])
    return found


def test_the_order_of_prompts_changes_nothing(folder: Path) -> None:
    loaded = load(folder, device="cpu", longest=max(LENGTHS))
    assert loaded.engine.way == "cone"
    there, back = measured(loaded, LENGTHS), measured(loaded, LENGTHS[::-1])
    for length in LENGTHS:
        assert torch.equal(there[length], back[length]), length


@pytest.mark.oracle
def test_each_prompt_gives_what_a_model_gives_that_has_seen_no_other(folder: Path) -> None:
    found = measured(load(folder, device="cpu", longest=max(LENGTHS)), LENGTHS)
    for length in LENGTHS:
        fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            clean_V = fresh(ids(length)).logits[0, -1]
        torch.testing.assert_close(found[length][0], clean_V, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
def test_transformers_itself_remembers_the_longest_prompt(folder: Path) -> None:
    """Else all this would be for nothing."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        before = model(ids(24)).logits
        model(ids(60))
        assert not torch.allclose(model(ids(24)).logits, before, atol=1e-3)
        forget_lengths(model)
        assert torch.equal(model(ids(24)).logits, before)


def test_layers_may_each_have_their_own_kind() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=TRAINED,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    forget_lengths(model)
    with torch.no_grad():
        before = model(ids(24)).logits
        model(ids(60))
        assert torch.equal(model(ids(24)).logits, before)
        assert not torch.allclose(model(ids(60)).logits[:, :24], before, atol=1e-3), "they do stretch"
