"""What decides how work is put into batches."""

import pytest

from raymi.model.sizes import Shape, pays_together

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
