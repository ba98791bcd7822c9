"""A unit's rows: every column against a computation of its own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from raymi.experiments.knockout.run import run
from raymi.experiments.knockout.spec import SCHEMA, Ablation, ablation_id
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine, Way, measure_capability
from raymi.model.hooked import HookedModel, NotFinite
from raymi.prompts import Prompt, TokenizedPrompt
from tests import oracles
from tests.families import PROMPT, build, prompt
from tests.model.measuring import one_thread

__all__ = ["one_thread"]

LAST = PROMPT - 1


def tokenized(name: str, ids: list[int], answer: int | None, wrong: int | None) -> TokenizedPrompt:
    return TokenizedPrompt(Prompt(name, name), tuple(ids), tuple(map(str, ids)), False, answer, wrong, {})


IDS = prompt(rows=3).tolist()
PROMPTS = {
    "both": tokenized("both", IDS[0], 5, 11),
    "answer": tokenized("answer", IDS[1], 0, None),
    "neither": tokenized("neither", IDS[2], None, None),
}
EVERY_KEY = tuple((LAST, key) for key in range(PROMPT))
ABLATIONS = (
    Ablation((2,), None, ((5, 1),)),
    Ablation((0,), (3,), ((LAST, LAST - 1),)),
    Ablation((1, 3), (0, 2), ((LAST - 2, 10), (LAST, LAST))),
    Ablation((1,), (2,), EVERY_KEY),
)
# Not in the order in which any way measures them.
UNIT = Unit("u" * 16, "heads", tuple((name, ABLATIONS) for name in PROMPTS), 1)
GIVEN = {"model_id": "org/tiny", "revision": "r" * 40, "dtype": "float32"}


@pytest.fixture(scope="module")
def engine() -> Callable[[Way], Engine]:
    model = HookedModel(build("llama"), "llama")
    capability = measure_capability(model, PROMPT)
    return lambda way: Engine(model, capability, way)


@pytest.mark.oracle
@pytest.mark.parametrize("way", ["cone", "layers", "full"])
def test_every_column(way: Way, engine: Callable[[Way], Engine]):
    table = run(engine(way), UNIT, PROMPTS, top_k=4, **GIVEN)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    asked = [(PROMPTS[name], ablation) for name, ablations in UNIT.items for ablation in ablations]
    assert len(rows) == len(asked) == 12
    plain = build("llama")
    for row, (of, ablation) in zip(rows, asked, strict=True):
        _check_row(row, of, ablation, plain, way)
    assert len({row["ablation_id"] for row in rows}) == 12


def _check_row(row: dict, of: TokenizedPrompt, ablation: Ablation, plain: nn.Module, way: Way) -> None:
    ids_T = torch.tensor(of.token_ids)
    clean_V = oracles.last_logits(plain, ids_T)
    knockout = oracles.Knockout(ablation.layers, ablation.heads, ablation.edges)
    ablated_V, n_empty, n_closed = oracles.by_edited_softmax(plain, ids_T, knockout)

    # What was asked.
    assert {name: row[name] for name in GIVEN} == GIVEN
    assert (row["unit_id"], row["experiment"], row["engine"]) == (UNIT.unit_id, "heads", way)
    assert (row["prompt_id"], row["n_tokens"]) == (of.prompt.id, PROMPT)
    assert row["ablation_id"] == ablation_id("org/tiny", of.token_ids, ablation, 4)
    assert row["layers"] == list(ablation.layers)
    assert row["heads"] == (None if ablation.heads is None else list(ablation.heads))
    assert list(zip(row["queries"], row["keys"], strict=True)) == list(ablation.edges)
    only = {
        "layer": ablation.layers,
        "head": ablation.heads or (),
        "query": {query for query, _ in ablation.edges},
        "key": {key for _, key in ablation.edges},
    }
    for name, values in only.items():
        assert row[name] == (next(iter(values)) if len(values) == 1 else None), name

    # What it did.
    assert row["kl"] == pytest.approx(oracles.kl(clean_V, ablated_V), rel=3e-3)
    assert row["kl"] > 1e-7
    assert row["total_variation"] == pytest.approx(oracles.total_variation(clean_V, ablated_V), rel=3e-3)
    assert (row["top1_clean"], row["top1_ablated"]) == (int(clean_V.argmax()), int(ablated_V.argmax()))
    p, q = oracles.probabilities(clean_V), oracles.probabilities(ablated_V)
    changes = oracles.top_changes(clean_V, ablated_V, 4)
    assert [c["token_id"] for c in row["changed"]] == [token for token, _, _ in changes]
    assert [c["prob_clean"] for c in row["changed"]] == pytest.approx([p for _, p, _ in changes], rel=1e-4)
    assert [c["prob_ablated"] for c in row["changed"]] == pytest.approx([q for _, _, q in changes], rel=1e-4)
    for name, token in (("answer", of.answer_id), ("wrong", of.wrong_id)):
        expected = {
            f"{name}_id": token,
            f"{name}_logit_clean": None if token is None else pytest.approx(float(clean_V[token]), abs=1e-5),
            f"{name}_logit_ablated": None if token is None else pytest.approx(float(ablated_V[token]), abs=1e-5),
            f"{name}_prob_clean": None if token is None else pytest.approx(p[token], rel=1e-4),
            f"{name}_prob_ablated": None if token is None else pytest.approx(q[token], rel=1e-4),
        }
        assert {key: row[key] for key in expected} == expected
    answer = of.answer_id
    assert row["answer_rank_clean"] == (None if answer is None else oracles.rank(clean_V, answer))
    assert row["answer_rank_ablated"] == (None if answer is None else oracles.rank(ablated_V, answer))
    fall = clean_V - ablated_V
    assert row["logit_diff"] == (None if answer is None else pytest.approx(float(fall[answer]), abs=1e-5))
    margin = None if of.wrong_id is None else pytest.approx(float(fall[answer] - fall[of.wrong_id]), abs=1e-5)
    assert row["margin_diff"] == margin

    # How it was measured.
    n_heads = 4 if ablation.heads is None else len(ablation.heads)
    assert row["fired"] == len(ablation.layers) * n_heads * len(ablation.edges)
    assert row["closed"] == n_closed == 0
    assert row["empty_rows"] == n_empty == (1 if ablation.edges == EVERY_KEY else 0)
    assert 0 <= row["clean_error"] < 1e-4


def test_all_heads_listed_are_all_heads(engine: Callable[[Way], Engine]):
    one = Unit("u", "e", (("both", (Ablation((1,), None, ((9, 3),)), Ablation((1,), (0, 1, 2, 3), ((9, 3),)))),), 1)
    first, second = run(engine("cone"), one, PROMPTS, **GIVEN).to_pylist()
    assert first["ablation_id"] == second["ablation_id"]
    assert first["kl"] == pytest.approx(second["kl"], rel=1e-4)  # equal rows may round otherwise in other places


@pytest.mark.parametrize("way", ["cone", "layers", "full"])
def test_a_bad_number_names_model_layer_and_prompt(way: Way, engine: Callable[[Way], Engine]):
    """A head that attends to nothing, in a model that divides by the length of what its attention gives."""
    model = HookedModel(build("llama"), "org/tiny")
    attention = model.model.get_submodule("model.layers.2.self_attn")
    attention.register_forward_hook(lambda _, __, output: (output[0] / output[0].norm(dim=-1, keepdim=True), None))
    unit = replace(UNIT, items=(("answer", (Ablation((1,), None, ((9, 3),)), Ablation((2,), None, EVERY_KEY))),))
    with pytest.raises(NotFinite, match=r"org/tiny: .*layer 2 is the first.*prompts answer"):
        run(Engine(model, engine(way).capability, way), unit, PROMPTS, **GIVEN)
