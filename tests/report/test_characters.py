"""Characters that a tokenizer has cut into bytes, as contexts show them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from raymi.prompts import display
from raymi.report.characters import pieces
from raymi.report.saes import _in_context  # pyright: ignore[reportPrivateUsage]

TEXTS = ["it’s naïve: 日本語, ok", "emoji 👩‍🚀 and «quotes»", "plain words only", "Ã© is no é here", "x\u2028y\t\n z"]


class Bytes:
    """A byte-level tokenizer without merges: every byte is a token."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        self.raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.raw.decoder = decoders.ByteLevel()

    def ids(self, text: str) -> list[int]:
        return self.raw.encode(text).ids

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(self.raw.id_to_token(token)) for token in ids]

    def decode(self, ids: list[int], **_: object) -> str:
        return self.raw.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_put_together(text: str) -> None:
    tokenizer = Bytes()
    tokens = display(tokenizer, tokenizer.ids(text))  # pyright: ignore[reportArgumentType]
    found = pieces(tokens, text)
    assert "".join(piece.text for piece in found) == text
    assert [piece.first for piece in found[1:]] == [piece.behind for piece in found[:-1]]
    assert found[-1].behind == len(tokens)


def test_bytes_by_their_numbers() -> None:
    tokens = ["<s>", "it", "<0xE2>", "<0x80>", "<0x99>", "s", "<0xE2>", "!"]
    shown = pieces(tokens, "it’s ?!")
    assert [piece.text for piece in shown] == ["<s>", "it", "’", "s", "<0xE2>", "!"]
    for at in (2, 3, 4):
        assert _in_context(tokens, shown, at) == (tokens[at], "<s>it«’»s<0xE2>!")
    assert _in_context(tokens, shown, 5) == ("s", "<s>it’«s»<0xE2>!")
    assert _in_context([], [], 0) == (None, None)


def test_what_stands_in_a_text_is_no_byte() -> None:
    assert [piece.text for piece in pieces(["Ã", "©"], "so Ã© it is")] == ["Ã©"]
    assert [piece.text for piece in pieces(["Ã", "©"], "an é")] == ["é"]
