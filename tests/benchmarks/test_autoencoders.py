"""Both sides of the benchmark of autoencoders measure the same thing, and all of it."""

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.autoencoders import AGREE, CONTEXT, KEYS, Ours, Result, Theirs, aims, contest, spread, tables
from benchmarks.cases import DEMO, load_demo
from demo.models import cache_directory
from raymi.tokenizer import special_ids


def result(name: str, n_saes: int, theirs: float, off: float = 0.0) -> Result:
    return Result(name, n_saes, 1000, 2.0, theirs, dict.fromkeys(KEYS, off))


def test_layers_are_evenly_spread():
    assert spread(30, 8) == [1, 5, 9, 13, 16, 20, 24, 28]
    assert spread(12, 1) == [6]


def test_aims_are_those_of_one_and_of_several():
    met = {aim.what.partition(":")[0]: aim.met for aim in aims([result("one", 1, 3.5), result("eight", 8, 3.5)])}
    assert met == {"one": True, "eight": False, "largest relative difference of a metric": True}
    assert not aims([result("one", 1, 3.5, off=2 * AGREE)])[-1].met


def test_rates_are_of_all_autoencoders():
    [_, one, eight] = tables([result("one", 1, 3.0), result("eight", 8, 16.0)], (1 << 20, 1 << 30))[
        "quality against SAELens"
    ]
    assert one[4:] == ["500", "333", "1.50x"]
    assert eight[4:] == ["4,000", "500", "8.00x"]


@pytest.mark.oracle
@pytest.mark.slow
def test_both_sides_measure_the_same(demo_cache, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sae_lens")
    monkeypatch.setenv("RAYMI_CACHE", str(demo_cache.parent))
    _, model, stream = load_demo(torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(DEMO.snapshot(cache_directory()))
    ids_PT = stream[: 3 * CONTEXT].view(3, CONTEXT).clone()
    ids_PT[1, 5] = ids_PT[2, 0] = tokenizer.eos_token_id  # which neither side counts
    layers = [15, 28]
    theirs = Theirs(model, tokenizer, ids_PT, layers)
    found = contest("two", Ours(model, ids_PT, special_ids(tokenizer)), theirs, layers, rounds=1)
    assert max(found.differences.values()) < AGREE
    assert (found.n_saes, found.n_tokens) == (2, 3 * CONTEXT)
