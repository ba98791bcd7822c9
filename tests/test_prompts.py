"""Prompts as tokenizers of several kinds read them."""

from typing import Any

import pytest
from transformers import ByT5Tokenizer

from raymi.errors import UserError
from raymi.prompts import Prompt, TokenizedPrompt, display, tokenize
from tests.tiny_tokenizers import CHAT, byte_bpe, words

SENTENCE = ["The", " capital", " of", " France", " is"]
BPE = [*SENTENCE, " Par", " Paris", " London", " United", " States"]
FRANCE = Prompt("france", "The capital of France is", " Paris", " London", "France")


def read(
    tokenizer: Any, prompt: Prompt = FRANCE, *, bos: Any = "auto", chat: bool = False, pieces: Any = ()
) -> TokenizedPrompt:
    [tokenized] = tokenize([prompt], tokenizer, bos=bos, chat_template=chat, pieces=pieces, model_id="org/model")
    return tokenized


def test_byte_level_bpe() -> None:
    tokenizer = byte_bpe(BPE)
    result = read(tokenizer, pieces=["subject", "text:capital of", "text:Spain"])
    assert result.tokens == ("The", " capital", " of", " France", " is")
    assert list(result.token_ids) == tokenizer.encode(FRANCE.text)
    assert (result.answer_id, result.wrong_id) == (tokenizer.encode(" Paris")[0], tokenizer.encode(" London")[0])
    assert result.pieces == {"subject": (3,), "text:capital of": (1, 2)}
    assert not result.bos


def test_target_is_the_first_of_several_tokens() -> None:
    tokenizer = byte_bpe([*SENTENCE, " Par"])
    assert display(tokenizer, [read(tokenizer).answer_id or -1, read(tokenizer).wrong_id or -1]) == (" Par", " ")


def test_shared_beginning_of_answers_grows_the_prompt() -> None:
    tokenizer = byte_bpe([*SENTENCE, " Par"], before="<s>", bos_token="<s>")
    prompt = Prompt("park", FRANCE.text, " Park", " Paris", "France")
    result = read(tokenizer, prompt, pieces=["subject"])
    assert result.tokens == ("<s>", "The", " capital", " of", " France", " is", " Par")
    assert display(tokenizer, [result.answer_id or -1, result.wrong_id or -1]) == ("k", "i")
    assert result.pieces == {"subject": (4,)}


def test_answers_are_optional() -> None:
    result = read(byte_bpe(BPE), Prompt("p", "The capital of"))
    assert (result.answer_id, result.wrong_id) == (None, None)


BEGIN_ZERO = {"before": "<s>", "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("options", "bos", "expected"),
    [
        (BEGIN_ZERO, "auto", ["<s>"]),
        (BEGIN_ZERO, "always", ["<s>"]),
        (BEGIN_ZERO, "never", []),
        ({"before": "<s>", "after": "</s>", "bos_token": "<s>", "eos_token": "</s>"}, "auto", ["<s>"]),
        ({"after": "<s>", "bos_token": "<s>", "eos_token": "<s>"}, "auto", []),
        ({"after": "<s>", "bos_token": "<s>", "eos_token": "<s>"}, "always", ["<s>"]),
        ({"before": "<other>", "after": "<s>", "bos_token": "<s>"}, "always", ["<s>", "<other>"]),
        ({}, "auto", []),
        ({}, "never", []),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [byte_bpe, words])
def test_bos(kind: Any, options: dict[str, Any], bos: str, expected: list[str]) -> None:
    vocabulary = BPE if kind is byte_bpe else [*FRANCE.text.split(), "Paris", "London"]
    tokenizer = kind(vocabulary, **options)
    result = read(tokenizer, bos=bos, pieces=["subject"])
    assert list(result.tokens[: len(expected)]) == expected
    assert [token.strip() for token in result.tokens[len(expected) :]] == FRANCE.text.split()
    assert result.bos == (expected[:1] == ["<s>"])
    assert result.pieces["subject"] == (len(expected) + 3,)
    if options is BEGIN_ZERO:
        assert tokenizer.bos_token_id == 0  # an id that is false


def test_bos_always_means_once_even_when_the_text_begins_with_it() -> None:
    tokenizer = words(["a", "b"], before="<s>", bos_token="<s>")
    assert read(tokenizer, Prompt("p", "<s> a b"), bos="always").tokens == ("<s>", "a", "b")
    assert read(tokenizer, Prompt("p", "<s> a b"), bos="never").tokens == ("<s>", "a", "b")
    assert read(tokenizer, Prompt("p", "<s> a b"), bos="auto").tokens == ("<s>", "<s>", "a", "b")


def test_words_with_marked_blanks() -> None:
    tokenizer = words([*FRANCE.text.split(), "Paris", "London"], blanks=True)
    result = read(tokenizer, pieces=["subject"])
    assert result.tokens == (" The", " capital", " of", " France", " is")
    assert result.pieces == {"subject": (3,)}


def test_pieces_of_several_tokens_and_of_parts_of_tokens() -> None:
    tokenizer = byte_bpe(BPE)
    prompt = Prompt("us", "The capital of United States is", subject="United States")
    pieces = read(tokenizer, prompt, pieces=["subject", "text:apit", "text: of", "text:is"]).pieces
    assert pieces == {"subject": (3, 4), "text:apit": (1,), "text: of": (2,), "text:is": (5,)}


def test_pieces_beside_text_of_several_bytes() -> None:
    result = read(byte_bpe(BPE), Prompt("p", "é — of France is", subject="France"), pieces=["subject"])
    assert [result.tokens[at] for at in result.pieces["subject"]] == [" France"]
    assert "\ufffd" not in "".join(result.tokens)


def test_a_subject_named_subject_is_no_piece_of_text() -> None:
    tokenizer = words(["the", "subject", "is", "me"])
    prompt = Prompt("p", "the subject is me", subject="me")
    pieces = read(tokenizer, prompt, pieces=["subject", "text:subject"]).pieces
    assert pieces == {"subject": (3,), "text:subject": (1,)}


@pytest.mark.parametrize("text", ["The capital of France is", "  The capital of France is "])
def test_chat_template(text: str) -> None:
    tokenizer = byte_bpe(BPE, before="<s>", bos_token="<s>", chat_template="<s>" + CHAT)
    prompt = Prompt("p", text, "Yes", "No", "France")
    result = read(tokenizer, prompt, chat=True, pieces=["subject"])
    assert "".join(result.tokens) == "<s><|user|>The capital of France is<|end|><|assistant|>"
    assert [result.tokens[at] for at in result.pieces["subject"]] == [" France"]
    assert result.tokens.count("<s>") == 1
    assert result.bos
    assert display(tokenizer, [result.answer_id or -1, result.wrong_id or -1]) == ("Y", "N")


def test_slow_tokenizers_serve_when_no_piece_is_asked_for() -> None:
    slow = ByT5Tokenizer()
    result = read(slow, Prompt("p", "ab", "c", "d", "a"))
    assert result.tokens == ("a", "b")
    with pytest.raises(UserError, match="org/model: its tokenizer does not say where"):
        read(slow, Prompt("p", "ab", "c", "d", "a"), pieces=["subject"])
    assert read(slow, Prompt("p", "ab", "c"), pieces=["subject"]).pieces == {}


def test_order_and_each_prompt_by_itself() -> None:
    prompts = [Prompt("a", "The capital", " of"), Prompt("b", "The"), Prompt("c", "The capital of", " France", " is")]
    tokenizer = byte_bpe(BPE)
    together = tokenize(prompts, tokenizer, bos="auto", chat_template=False)
    assert together == [read(tokenizer, prompt) for prompt in prompts]
    assert tokenize([], tokenizer, bos="auto", chat_template=False) == []


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "options", "expected"),
    [
        (
            byte_bpe([*BPE, " "]),
            Prompt("p", "The capital of ", "France"),
            {},
            [
                "org/model: prompt 'p'",
                "('The', ' capital', ' of', ' ')",
                "('The', ' capital', ' of', ' France')",
                "blank",
            ],
        ),
        (
            byte_bpe(BPE),
            Prompt("p", "The", " London", " London Paris"),
            {},
            ["no token tells", "' London'", "' Paris'"],
        ),
        (words(["a", "b"]), Prompt("p", "a", " x", " y"), {}, ["no token tells the answer ' x'", "<unk>"]),
        (words(["a", "b"]), Prompt("p", "a", " "), {}, ["the answer ' ' adds no token"]),
        (words(["a"], before="<s>", bos_token="<s>"), Prompt("p", " "), {}, ["' ' has no tokens"]),
        (byte_bpe(BPE), FRANCE, {"bos": "always"}, ["org/model: bos is always", "no beginning-of-sequence token"]),
        (byte_bpe(BPE), FRANCE, {"chat": True}, ["org/model: its chat template cannot be used"]),
        (
            byte_bpe(BPE, chat_template="{{ messages[0]['content'] | upper }}"),
            FRANCE,
            {"chat": True},
            ["org/model: its chat template changes the text of prompt 'france'"],
        ),
    ],
    ids=["joint", "prefix", "same", "blank", "empty", "bos", "no template", "changing template"],
)
def test_errors(tokenizer: Any, prompt: Prompt, options: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read(tokenizer, prompt, **options)
    for part in expected:
        assert part in str(error.value)


def test_a_word_that_a_tokenizer_cannot_read() -> None:
    without_unknown = words(["a", "b"], unknown=False)
    with pytest.raises(UserError, match="org/model: its tokenizer cannot read 'a c'"):
        tokenize(
            [Prompt("p", "a b"), Prompt("q", "a c")],
            without_unknown,
            bos="auto",
            chat_template=False,
            model_id="org/model",
        )


def test_spans_that_do_not_cover_a_piece_are_an_error() -> None:
    class Lying:
        """Like tokenizers that give every token an empty span."""

        def __init__(self) -> None:
            self.true = byte_bpe(BPE)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.true, name)

        def __call__(self, text: list[str], **options: Any) -> Any:
            batch = self.true(text, **options)
            if "offset_mapping" in batch:
                batch["offset_mapping"] = [[(start, start) for start, _ in spans] for spans in batch["offset_mapping"]]
            return batch

    with pytest.raises(UserError, match="does not say which tokens stand for 'France'"):
        read(Lying(), pieces=["subject"])
