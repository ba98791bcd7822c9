"""Prompts: as written by people, and as a model's tokenizer reads them."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple, Protocol

from raymi.errors import UserError, quoted

Bos = Literal["auto", "always", "never"]


class PromptFault(UserError):
    """What one prompt alone is to blame for: others can be read all the same."""


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

    def piece(self, name: str) -> str | None:
        """The text of a piece by its name, `subject` or `text:...`; None when it is not in the prompt."""
        text = self.subject if name == "subject" else name.removeprefix("text:")
        return text if text and text in self.text else None


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as one model reads it; everything that a replica needs to measure it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """What the model is given: with BOS where one was added, and with what answer and wrong answer begin alike."""
    tokens: tuple[str, ...]
    """One display string a token id."""
    bos: bool
    """Whether the first id is a beginning-of-sequence token."""
    answer_id: int | None
    """First token after the prompt when prompt + answer are tokenised jointly."""
    wrong_id: int | None
    pieces: dict[str, tuple[int, ...]]
    """Positions, ascending, of the tokens that overlap the first occurrence of a piece of the text, by its name (see
    `Prompt.piece`): those pieces that were asked for and are there."""


def fingerprint(prompts: Iterable[TokenizedPrompt]) -> str:
    """A hash of what is measured of prompts, in their order: their tokens, and the answers' first tokens."""
    measured = [[each.token_ids, each.answer_id, each.wrong_id] for each in prompts]
    return sha256(json.dumps(measured).encode()).hexdigest()[:16]


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, which this module therefore need not import."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def name_or_path(self) -> str: ...
    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...
    def decode(self, token_ids: list[int], **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


class _Source(NamedTuple):
    """What is tokenised for a prompt."""

    text: str
    """The prompt's text, or a chat template around it."""
    start: int
    """Where in it the prompt's own text begins."""


class _Encoded(NamedTuple):
    ids: list[int]
    """Without special tokens that the tokenizer would add."""
    offsets: list[tuple[int, int]] | None
    """Of every token, its span of characters; None when it was not asked for."""


def tokenize(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    bos: Bos,
    chat_template: bool,
    pieces: Collection[str] = (),
    model_id: str | None = None,
) -> list[TokenizedPrompt]:
    """Reads prompts as one model does.

    Prompt and answer are tokenised jointly, and the target is the first token after the prompt. Where answer and wrong
    answer begin alike, their common beginning is appended to the prompt.

    Args:
        prompts: the prompts; the result has their order.
        tokenizer: a Hugging Face tokenizer.
        bos: `auto` adds what the tokenizer itself adds before a text, `always` exactly one BOS, `never` nothing.
            What a tokenizer adds after a text (EOS) is left out in any case: the answer could not follow it.
        chat_template: every text becomes one turn of a user, followed by the beginning of the model's turn. The
            template alone decides about BOS then.
        pieces: what positions are wanted for: `subject`, `text:...` (`KnockoutSpec.pieces`).
        model_id: what errors call the model.

    Raises:
        PromptFault: a prompt without tokens, a text and an answer that do not tokenise jointly, answers that do not
            differ, a piece that no tokens stand for.
        UserError: no BOS to add, no chat template, or positions asked of a tokenizer that does not know them.
    """
    if not prompts:
        return []
    model = model_id or tokenizer.name_or_path
    sources = [_chat(prompt, tokenizer, model) if chat_template else _Source(prompt.text, 0) for prompt in prompts]
    wanted = [_spans(prompt, source, pieces) for prompt, source in zip(prompts, sources, strict=True)]
    if any(wanted) and not tokenizer.is_fast:
        raise UserError(
            f"{model}: its tokenizer does not say where in the text a token stands, so pieces of text "
            f"({', '.join(sorted(pieces))}) cannot be found",
            hint="Name positions by index, first or last.",
        )
    texts = [source.text for source in sources]
    encoded = _encode(model, tokenizer, texts, offsets=any(wanted))
    prefixes = [()] * len(texts) if chat_template else _prefixes(tokenizer, texts, encoded, bos, model)
    answers = _joint(model, tokenizer, sources, [prompt.answer for prompt in prompts])
    wrongs = _joint(model, tokenizer, sources, [prompt.wrong for prompt in prompts])

    tokenized: list[TokenizedPrompt] = []
    for prompt, source, read, prefix, answer, wrong, spans in zip(
        prompts, sources, encoded, prefixes, answers, wrongs, wanted, strict=True
    ):
        who = f"{model}: prompt {prompt.id!r}"
        if not read.ids:
            raise PromptFault(f"{who}: {quoted(prompt.text)} has no tokens")
        shared, answer_id, wrong_id = _targets(who, tokenizer, prompt, read.ids, answer, wrong)
        token_ids = (*prefix, *read.ids, *shared)
        tokenized.append(
            TokenizedPrompt(
                prompt=prompt,
                token_ids=token_ids,
                tokens=display(tokenizer, token_ids),
                bos=tokenizer.bos_token_id is not None and token_ids[0] == tokenizer.bos_token_id,
                answer_id=answer_id,
                wrong_id=wrong_id,
                pieces={name: _overlap(who, source.text, span, read, len(prefix)) for name, span in spans.items()},
            )
        )
    return tokenized


def tokenize_each(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, **options: Any
) -> tuple[list[TokenizedPrompt], dict[str, PromptFault]]:
    """Those of the prompts that can be read, in their order, and by id why the others cannot.

    Args:
        prompts: the prompts.
        tokenizer: as in `tokenize`, as are the options.

    Raises:
        UserError: what is no single prompt's fault.
    """
    try:
        return tokenize(prompts, tokenizer, **options), {}
    except PromptFault as fault:
        if len(prompts) == 1:
            return [], {prompts[0].id: fault}
    middle = len(prompts) // 2
    parts = [tokenize_each(part, tokenizer, **options) for part in (prompts[:middle], prompts[middle:])]
    return [each for read, _ in parts for each in read], parts[0][1] | parts[1][1]


def display(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[str, ...]:
    """One readable string a token id.

    It is the token's text with its leading blank, or the tokenizer's name for what is no text, or `<id>` where the
    tokenizer has no such token: vocabularies have gaps, and a model may have more rows than its tokenizer has tokens.
    """
    return tuple(_display(tokenizer, token) for token in token_ids)


def _display(tokenizer: Tokenizer, token: int) -> str:
    try:
        [found] = tokenizer.convert_ids_to_tokens([token])
        text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    except Exception:  # asked for an id that is none, tokenizers raise whatever they like
        found, text = None, ""
    # Some that are written in Python call an id that they do not have the unknown token, which has another id.
    unknown = getattr(tokenizer, "unk_token", None), getattr(tokenizer, "unk_token_id", None)
    if found is None or (found == unknown[0] and token != unknown[1]):
        return f"<{token}>"
    name = str(found)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return name
    # Decoding takes the blank that "\u2581" stands for away from the first word of a text.
    return f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text


_MOMENTS = 3
"""How often a template is asked in which the time goes on meanwhile."""


def _chat(prompt: Prompt, tokenizer: Tokenizer, model: str) -> _Source:
    def render(content: str) -> str:
        turns = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    text, start, steady = "", 0, False
    try:
        for _ in range(_MOMENTS):
            text = render(prompt.text)
            # Where the text begins is seen from a text that occurs nowhere else; a template may strip blanks.
            start = render("\ue000").index("\ue000")
            # A template may write the time, which must not go on between the two: what comes before has its length.
            if steady := render(prompt.text) == text:
                break
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"{model}: its chat template cannot be used: {error}") from error
    if not steady:
        raise UserError(
            f"{model}: its chat template writes something else each time it is asked, so where prompt {prompt.id!r} "
            "stands in it cannot be told"
        )
    if text.startswith(prompt.text, start):
        return _Source(text, start)
    if text.startswith(prompt.text.strip(), start):
        return _Source(text, start - (len(prompt.text) - len(prompt.text.lstrip())))
    raise PromptFault(f"{model}: its chat template changes the text of prompt {prompt.id!r}")


def _spans(prompt: Prompt, source: _Source, pieces: Collection[str]) -> dict[str, tuple[int, int]]:
    """Where in the source the pieces that are in the prompt stand, as spans of characters."""
    spans: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        text = prompt.piece(piece)
        if text is not None:
            start = source.start + prompt.text.index(text)
            spans[piece] = (start, start + len(text))
    return spans


def _encode(
    model: str, tokenizer: Tokenizer, texts: list[str], *, special: bool = False, offsets: bool = False
) -> list[_Encoded]:
    options = {"return_offsets_mapping": True} if offsets else {}
    try:
        batch = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False, **options)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if len(texts) > 1:  # which one is it?
            return [_encode(model, tokenizer, [text], special=special, offsets=offsets)[0] for text in texts]
        raise PromptFault(f"{model}: its tokenizer cannot read {quoted(texts[0])}: {error}") from error
    spans = batch["offset_mapping"] if offsets else [None] * len(texts)
    return [_Encoded(list(ids), span) for ids, span in zip(batch["input_ids"], spans, strict=True)]


def _prefixes(
    tokenizer: Tokenizer, texts: list[str], encoded: list[_Encoded], bos: Bos, model: str
) -> list[tuple[int, ...]]:
    """The special tokens to place before every text."""
    if bos == "never":
        return [()] * len(texts)
    bos_id = tokenizer.bos_token_id
    if bos == "always" and bos_id is None:
        raise UserError(f"{model}: bos is always, but its tokenizer has no beginning-of-sequence token")
    prefixes: list[tuple[int, ...]] = []
    for plain, special in zip(encoded, _encode(model, tokenizer, texts, special=True), strict=True):
        prefix = _before(plain.ids, special.ids, model)
        if bos == "always" and bos_id is not None:
            rest = tuple(token for token in prefix if token != bos_id)
            prefix = rest if plain.ids[:1] == [bos_id] else (bos_id, *rest)
        prefixes.append(prefix)
    return prefixes


def _before(plain: list[int], special: list[int], model: str) -> tuple[int, ...]:
    """What stands before `plain` in `special`; the last of several places, for a text that itself begins with BOS."""
    for start in range(len(special) - len(plain), -1, -1):
        if special[start : start + len(plain)] == plain:
            return tuple(special[:start])
    raise PromptFault(
        f"{model}: its tokenizer changes a text's own tokens when it adds special tokens: {plain} becomes {special}",
        hint="Choose `bos: never`.",
    )


def _joint(
    model: str, tokenizer: Tokenizer, sources: list[_Source], answers: list[str | None]
) -> list[list[int] | None]:
    """The ids of every text with its answer, where it has one."""
    texts = [source.text + answer for source, answer in zip(sources, answers, strict=True) if answer is not None]
    ids = iter(_encode(model, tokenizer, texts) if texts else ())
    return [None if answer is None else next(ids).ids for answer in answers]


def _targets(
    who: str, tokenizer: Tokenizer, prompt: Prompt, ids: list[int], answer: list[int] | None, wrong: list[int] | None
) -> tuple[list[int], int | None, int | None]:
    """What answer and wrong answer share, and the first token of each after that."""
    if answer is None:
        return [], None, None
    right = _continuation(who, tokenizer, prompt.text, f"answer {quoted(prompt.answer)}", ids, answer)
    if wrong is None:
        return [], right[0], None
    other = _continuation(who, tokenizer, prompt.text, f"wrong answer {quoted(prompt.wrong)}", ids, wrong)
    for index, (a, b) in enumerate(zip(right, other, strict=False)):
        if a != b:
            return right[:index], a, b
    raise PromptFault(
        f"{who}: no token tells the answer {quoted(prompt.answer)} from the wrong answer {quoted(prompt.wrong)}: "
        f"{display(tokenizer, right)} and {display(tokenizer, other)}"
    )


def _continuation(
    who: str, tokenizer: Tokenizer, text: str, answer: str, ids: list[int], joint: list[int]
) -> list[int]:
    if joint[: len(ids)] != ids:
        raise PromptFault(
            f"{who}: {quoted(text)} and its {answer} are not tokenised jointly: the prompt alone is "
            f"{display(tokenizer, ids)}, with the answer it becomes {display(tokenizer, joint)}",
            hint="A blank between the two belongs to the beginning of the answer, not to the end of the prompt.",
        )
    if len(joint) == len(ids):
        raise PromptFault(f"{who}: the {answer} adds no token to {quoted(text)}")
    return joint[len(ids) :]


def _overlap(who: str, text: str, span: tuple[int, int], read: _Encoded, shift: int) -> tuple[int, ...]:
    """Positions of the tokens that overlap a span of characters."""
    start, end = span
    offsets = read.offsets or []
    found = [index for index, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
    # Some tokenizers give spans that are none, and a wrong position would go unseen. Blanks may belong to no token.
    covered = {at for index in found for at in range(*offsets[index])}
    if any(at not in covered and not text[at].isspace() for at in range(start, end)):
        raise PromptFault(f"{who}: its tokenizer does not say which tokens stand for {quoted(text[start:end])}")
    return tuple(index + shift for index in found)
