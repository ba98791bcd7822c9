"""Characters that a tokenizer has cut into bytes, put together again.

A token that is no text by itself is called by the tokenizer's name for it: by what stands for each of its bytes in a
vocabulary of bytes (GPT-2's alphabet), or by its number (`<0xE2>`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LONGEST = 8
"""Tokens of one run of characters."""
_NUMBERED = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    text: str
    first: int
    """Of the tokens that it is made of."""
    behind: int
    """The token behind the last of them."""


def _alphabet() -> dict[str, int]:
    """GPT-2's: bytes that are printable stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _alphabet()


def pieces(tokens: Sequence[str], text: str) -> list[Piece]:
    """Tokens as they are shown, those together that make up characters only together.

    Args:
        tokens: of a text, as table `prompts` shows them.
        text: the same, as far as it is known: what looks like bytes and stands in it so is no bytes.
    """
    return list(_pieces(tokens, text))


def _pieces(tokens: Sequence[str], text: str) -> Iterator[Piece]:
    at = 0
    while at < len(tokens):
        found = _character(tokens, at, text)
        yield found
        at = found.behind


def _character(tokens: Sequence[str], at: int, text: str) -> Piece:
    raw = b""
    for behind in range(at + 1, min(len(tokens), at + _LONGEST) + 1):
        more = _of_name(tokens[behind - 1])
        if more is None or (behind == at + 1 and _is_text(more)):
            break
        raw += more
        if _is_text(raw):
            literal, decoded = "".join(tokens[at:behind]), raw.decode()
            return Piece(literal if literal in text and decoded not in text else decoded, at, behind)
    return Piece(tokens[at], at, at + 1)


def _of_name(token: str) -> bytes | None:
    """The bytes that a tokenizer's name stands for; None for what is no such name."""
    if number := _NUMBERED.fullmatch(token):
        return bytes([int(number[1], 16)])
    if token and all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return None


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
