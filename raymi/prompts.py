"""Prompts: as written by people, and as a model's tokenizer reads them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a job, before any tokenizer has seen it."""

    id: str
    """Given by the user, or a hash of the other fields."""
    text: str
    answer: str | None = None
    wrong: str | None = None
    subject: str | None = None
    """A piece of `text` whose tokens can be named as positions."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as one model reads it; everything that a replica needs to measure it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """What the model is given: BOS included where one was added, and any beginning shared by answer and wrong answer."""
    tokens: tuple[str, ...]
    """One display string a token id."""
    bos: bool
    """Whether the first id is a beginning-of-sequence token."""
    answer_id: int | None
    """First token after the prompt when prompt + answer are tokenised jointly."""
    wrong_id: int | None
    pieces: dict[str, tuple[int, ...]]
    """Positions, ascending, of the tokens that overlap a named piece of the text ("subject", or the text itself)."""
