"""The types that are used most, and those whose places or heads are unusual, are as good as `types.tsv` says."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from raymi.model.loading import Loaded
from tests.conformance import checking, configs, table
from tests.conformance.checking import check
from tests.conformance.table import Line

pytestmark = pytest.mark.oracle

MOST_USED = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "mistral", "mixtral", "gpt2", "gpt_neox", "gpt_oss"),
    *("gemma3_text", "gemma4_text", "phi", "phi3", "deepseek_v3", "falcon", "bloom", "opt", "starcoder2", "cohere2"),
    *("llama4_text", "smollm3", "olmo2", "glm4_moe"),
)
UNUSUAL = (
    # Heads and widths of their own in each layer.
    *("laguna", "inkling_text", "gemma4", "gemma4_unified_text", "dots3_note_text"),
    # Something stands between the heads' outputs and the last matrix of the attention, or that is no projection.
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm"),
    *("roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod", "jetmoe", "bitnet", "afmoe", "beam", "lfm3", "qwen3_next"),
    "bailing_hybrid",
    # Norms behind attention and MLP, multipliers, sinks.
    *("gemma2", "gemma3", "gemma3n_text", "glm4", "exaone4", "olmo3", "olmo_hybrid", "flex_olmo", "kolibri1"),
    *("granite", "granite_swa", "granitemoe", "granitemoehybrid", "hyperclovax", "minicpm3", "vaultgemma"),
    # Parts of multimodal models, decoders of encoders, states.
    *("got_ocr2", "bart", "jamba", "nemotron_h", "recurrent_gemma", "mpt", "megatron-bert"),
)


def held(model_type: str) -> None:
    worse, _ = table.changes(table.read()[model_type], check(model_type))
    assert not worse, f"{model_type}: {'; '.join(worse)}"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*MOST_USED, *UNUSUAL])
def test_no_type_is_worse_than_recorded(model_type: str):
    held(model_type)


def test_one_of_them_is_tried_at_once():
    held("exaone4")


def test_the_table_has_every_type():
    assert set(configs.types()) <= configs.TYPES.keys()
    assert set(configs.types()) <= table.read().keys()


# ---- the suite finds what is wrong -----------------------------------------------------------------------------------


def _mlp_for_attention(loaded: Loaded) -> None:
    block = loaded.model.blocks[2]
    block.attn_out, block.mlp_out = block.mlp_out, block.attn_out


def _next_layer(loaded: Loaded) -> None:
    loaded.model.blocks[1].resid = loaded.model.blocks[2].resid


def _other_weights(loaded: Loaded) -> None:
    norm: Any = _last(loaded.model.model, "norm")
    norm.weight.data *= 1.001


def _last(module: nn.Module | None, name: str) -> nn.Module:
    assert module is not None
    return [part for path, part in module.named_modules() if path.endswith(name)][-1]


SPOILT: dict[str, tuple[Callable[[Loaded], None], set[str]]] = {
    "attention and MLP exchanged": (
        _mlp_for_attention,
        {"hook_attn_out", "hook_mlp_out", "see hook_attn_out", "see hook_mlp_out"},
    ),
    "a stream one layer too high": (_next_layer, {"hook_resid_pre", "hook_resid_post"}),
    "other numbers in a weight": (_other_weights, {"knockouts", "hook_resid_pre"}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_spoilt_is_found(what: str, monkeypatch: pytest.MonkeyPatch):
    spoil, expected = SPOILT[what]
    load = checking.load

    def spoilt(*args: Any, **kwargs: Any) -> Loaded:
        loaded = load(*args, **kwargs)
        spoil(loaded)
        return loaded

    monkeypatch.setattr(checking, "load", spoilt)
    found = check("llama")
    assert expected <= found.wrong.keys(), found
    assert table.changes(table.read()["llama"], found)[0]


def test_a_table_is_read_as_it_was_written(tmp_path: Any):
    lines = [
        Line(
            "a", "cone", {"knockouts", "hook_attn_out(2/4)", "see attn.hook_z"}, {"fired": "4 for 2"}, {"x": "no place"}
        ),
        Line("b", "refused", why="Such: a reason;\twith a tab"),
    ]
    table.write(lines, ["made by hand"], tmp_path / "t.tsv")
    found = table.read(tmp_path / "t.tsv")
    assert found["a"] == lines[0]
    assert found["b"].why == "Such: a reason; with a tab"  # a tab would be a column


OLD = Line("a", "layers", {"knockouts", "hook_attn_out(2/4)"}, {"attn.hook_z": "3e-01"})


@pytest.mark.parametrize(
    ("new", "n_worse", "n_better"),
    [
        (OLD, 0, 0),
        (Line("a", "cone", OLD.exact, OLD.wrong), 0, 1),
        (Line("a", "crash", why="oh"), 3, 1),
        (Line("a", "layers", {"knockouts", "hook_attn_out"}, OLD.wrong), 0, 1),
        (Line("a", "layers", {"knockouts", "hook_attn_out(1/4)"}, OLD.wrong), 1, 0),
        (Line("a", "layers", {"hook_attn_out(2/4)"}, {"knockouts": "1e-01"}), 1, 1),
        (Line("a", "layers", {*OLD.exact, "attn.hook_z"}), 0, 1),
        (Line("a", "layers", OLD.exact), 0, 1),
    ],
)
def test_better_and_worse(new: Line, n_worse: int, n_better: int):
    worse, better = table.changes(OLD, new)
    assert (len(worse), len(better)) == (n_worse, n_better), (worse, better)
