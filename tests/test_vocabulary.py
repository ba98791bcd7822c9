import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import raymi.store
from raymi.errors import UserError
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.tokenizer import token_texts
from raymi.vocabulary import check_ids
from tests.cluster.test_tokens import Said, run  # noqa: F401
from tests.fakes import LLAMA, TOKENIZER, add_model


def read(*token_ids: int, answer_id: int | None = None, wrong_id: int | None = None) -> TokenizedPrompt:
    prompt = Prompt("p", "a b", " c", " d")
    return TokenizedPrompt(prompt, token_ids, tuple(map(str, token_ids)), False, answer_id, wrong_id, {})


def test_a_vocabulary_with_gaps_names_the_tokens_that_it_has():
    words = {"<unk>": 0, "a": 1, "b": 5, "last": 1023}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    assert len(tokenizer) < 1023
    assert token_texts(tokenizer, [1, 5, 3, 1023, 1024]) == {
        1: "a", 3: "<3>", 5: "b", 1023: "last", 1024: "<1024>",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (read(1, 32), "the token '32' at position 1 has the id 32"),
        (read(1, answer_id=40), "the answer ' c' begins with the id 40"),
        (read(1, wrong_id=33), "the wrong answer ' d' begins with the id 33"),
    ],
)
def test_ids_beyond_the_embedding_are_named(text: TokenizedPrompt, said: str):
    with pytest.raises(UserError) as error:
        check_ids("org/m", text, 32, 32)
    assert str(error.value).startswith(f"org/m: prompt 'p': {said}")
    assert "32 tokens" in str(error.value)
    check_ids("org/m", read(31, answer_id=31), 32, 32)
    check_ids("org/m", text, None, None)


def test_answers_count_only_where_they_are_asked_for():
    check_ids("org/m", read(1, answer_id=40), 32, 32, answers=False)


def test_one_prompt_fails_by_name_and_the_others_are_measured(run, tmp_path: Path):  # noqa: F811
    vocabulary = TOKENIZER["model"]["vocab"] | {"beyond": LLAMA["vocab_size"] + 3}
    tokenizer = TOKENIZER | {"model": {**TOKENIZER["model"], "vocab": vocabulary}}
    add_model(Path("cache"), "org/small", scale=0.5, files={"tokenizer.json": tokenizer})
    good = {"id": "good", "text": "The capital of France is", "answer": " Paris"}
    prompts = [
        good,
        {"id": "inside", "text": "The beyond of France is", "answer": " Paris"},
        {"id": "answer", "text": "The capital of Italy is", "answer": " beyond"},
    ]

    def job(*its: dict[str, str]) -> None:
        knockout = {"kind": "knockout", "layers": {"each": "all"}, "queries": "last", "keys": "first"}
        whole = {"name": "ids", "models": "org/*", "prompts": its, "experiments": [knockout], "verify": 2}
        Path("job.json").write_text(json.dumps(whole))

    job(*prompts)
    said: Said = run()
    assert said.code == 1
    assert "prompt 'inside': the token" in said.err
    assert "prompt 'answer': the answer ' beyond' begins with the id" in said.err
    assert "IndexError" not in said.err
    store = raymi.store.open("store")
    rows = store.scan("ablations").collect()
    assert set(rows["prompt_id"]) == {"good"}
    assert set(store.scan("failures").collect()["prompt_id"]) == {"inside", "answer"}
    units = set(rows["unit_id"])
    job(good)
    assert run("--store", "other").code == 0
    assert set(raymi.store.open("other").scan("ablations").collect()["unit_id"]) == units
