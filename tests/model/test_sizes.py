"""What decides how work is put into batches."""

import pytest

from raymi.model.cone import Cone
from raymi.model.hooked import HookedModel
from raymi.model.sizes import Shape, kept_bytes, pays_together, prompts_kept, row_bytes, rows_per_batch
from tests.families import build, prompt

SMOL = Shape(
    n_heads=9, hidden_size=576, intermediate_size=1536, vocab_size=49152, itemsize=4, n_layers=30, key_width=192
)


@pytest.mark.parametrize(
    ("n_prompts", "n_cells", "n_tokens", "together"),
    [
        (60, 60, 20, True),  # many short prompts, one ablation each
        (4, 8, 1000, True),
        (4, 240, 1000, False),  # each row would need a copy of a thousand keys and values
        (4, 4 * 63, 20, True),
        (4, 4 * 64, 20, False),  # enough for a sweep of its own each
    ],
)
def test_prompts_share_a_sweep_where_that_reads_less(n_prompts: int, n_cells: int, n_tokens: int, together: bool):
    assert pays_together(SMOL, n_prompts, n_cells, n_tokens) == together


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_clean_run_keeps_what_was_foreseen(family: str):
    model = HookedModel(build(family), family)
    for ids_PT in (prompt(), prompt(rows=3)):
        assert Cone(model, ids_PT, 0).bytes == kept_bytes(model.shape, *ids_PT.shape)


def test_as_many_prompts_as_there_is_memory_for():
    room = 10 * kept_bytes(SMOL, 1, 100)
    assert prompts_kept(SMOL, 100, room) == 3
    assert prompts_kept(SMOL, 100, 0) == 1


def test_rows_that_are_unembedded_all_at_once_have_room_for_their_logits():
    room = 100 * row_bytes(SMOL, 5, 5)
    assert rows_per_batch(SMOL, 5, 5, "cpu", room) == 60
    assert rows_per_batch(SMOL, 5, 5, "cpu", room, sliced=False) == 60 * row_bytes(SMOL, 5, 5) // (
        row_bytes(SMOL, 5, 5) + 8 * SMOL.vocab_size
    )
