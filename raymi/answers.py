"""Answers that a model would hardly give, mostly because they are not written as it writes: "cat" for " cat".

Nothing is refused for it: what is rare may be what is asked for. But such numbers are of another question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json import dumps

from raymi.prompts import Prompt

LIKELY = 5
"""An answer is expected among so many most likely tokens of the clean prompt."""
_SHOWN = 3
_WITHOUT_BLANKS = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x10FFFF))
"""Scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a clean prompt makes of its answer."""

    prompt: Prompt
    rank: int
    """Of the answer's first token, from 0."""
    prob: float

    @property
    def likely(self) -> bool:
        return self.rank < LIKELY


def unlikely(what: str, n_top: int = LIKELY) -> str:
    """What is said of an answer, or of answers, that a model would hardly give."""
    return f"{what} not among the {n_top} most likely tokens of the clean prompt"


def runs_on(text: str, answer: str | None) -> bool:
    """Whether an answer goes on with the last word of its prompt, where words have blanks between them."""
    if not answer or not text or " " not in text.strip():
        return False
    return all(each.isalpha() and not _has_no_blanks(each) for each in (text[-1], answer[0]))


def _has_no_blanks(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in _WITHOUT_BLANKS)


def warning(answers: Sequence[Answer]) -> str | None:
    """What is said of a model's answers, in one line however many there are; None when all are likely."""
    rare = [each for each in answers if not each.likely]
    if not rare:
        return None
    examples = [f"{_named(each.prompt)} (P {each.prob:.1e})" for each in rare[:_SHOWN]]
    if len(answers) == 1:
        said = unlikely(f"the answer of {examples[0]} is")
    else:
        said = unlikely(f"the answers of {len(rare):,} of {len(answers):,} prompts are") + f": {_list(examples, rare)}"
    glued = [each for each in rare if runs_on(each.prompt.text, each.prompt.answer)]
    if not glued:
        return said
    which = "it begins" if len(rare) == 1 else f"{len(glued):,} of them begin" + "s" * (len(glued) == 1)
    return f"{said}; {which} without the blank that stands before a word"


def without_blank(prompts: Sequence[Prompt]) -> str | None:
    """What can be said of a job's answers before any model has seen them; None when there is nothing to say."""
    glued = [each for each in prompts if runs_on(each.text, each.answer) or runs_on(each.text, each.wrong)]
    if not glued:
        return None
    one = len(glued) == 1
    return (
        f"{'an answer' if one else 'answers'} of {len(glued):,} prompt{'' if one else 's'} "
        f"{'begins' if one else 'begin'} without the blank that stands before a word, and "
        f"{'goes' if one else 'go'} on with the last one: {_list([_named(each) for each in glued[:_SHOWN]], glued)}"
    )


def _named(prompt: Prompt) -> str:
    return f"{prompt.id!r}, {dumps(prompt.answer, ensure_ascii=False)}"


def _list(examples: Iterable[str], of: Sequence[object]) -> str:
    return "; ".join(examples) + (f"; and {len(of) - _SHOWN:,} more" if len(of) > _SHOWN else "")
