"""Tokenizers of a few words, in the kinds that models have."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_bpe(words: Sequence[str], *, before: str | None = None, after: str | None = None, **options: Any) -> Any:
    """Byte-level BPE as in GPT-2 and Llama 3: every one of `words` is one token, other text falls into characters.

    Args:
        words: with their leading blanks.
        before: a special token that the tokenizer adds before a text; its id is 0.
        after: one that it adds after a text.
        options: of the Hugging Face tokenizer.
    """
    specials = list(dict.fromkeys(token for token in (before, after) if token))
    names = [word.replace(" ", "Ġ") for word in words]
    merges = list(dict.fromkeys((name[:end], name[end]) for name in names for end in range(1, len(name))))
    vocabulary = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, vocabulary, before, after, options)


def words(
    vocabulary: Sequence[str],
    *,
    before: str | None = None,
    after: str | None = None,
    blanks: bool = False,
    unknown: bool = True,
    **options: Any,
) -> Any:
    """One token a word, `<unk>` for others if `unknown`; with `blanks`, a word's token begins with the blank's `▁`."""
    marked = ["▁" + word for word in vocabulary] if blanks else list(vocabulary)
    specials = [token for token in (before, after) if token] + ["<unk>"] * unknown
    ids = list(dict.fromkeys([*specials, *marked]))
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(ids)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if blanks else pre_tokenizers.WhitespaceSplit()
    if blanks:
        tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, ids, before, after, options)


def _wrap(
    tokenizer: Tokenizer, ids: Sequence[str], before: str | None, after: str | None, options: dict[str, Any]
) -> Any:
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in (before, "$A", after) if part),
            special_tokens=[(token, ids.index(token)) for token in dict.fromkeys((before, after)) if token],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
