"""Texts by the chunk: the documents of a file, joined and cut into equally many tokens by each model's tokenizer."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import pyarrow.parquet as pq
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from raymi import paths
from raymi.errors import HALF, UserError, quoted
from raymi.fields import Fields, near, problem
from raymi.prompts import Bos, Prompt, TokenizedPrompt, Tokenizer, display, tokenize
from raymi.rowfiles import UNREADABLE, json_rows, parquet_rows

_TOGETHER = 64
"""Documents that are tokenised at one time: no more of a large file than its first chunks need."""
_SAMPLE = 200
"""Characters of a document that tell what a tokenizer puts before a text."""


def _digest(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch("[0-9a-f]{64}", value):
        raise problem(f"found {value!r}; allowed: 64 hexadecimal digits, as sha256sum writes them", found=value)
    return value


class Corpus(Fields):
    """The texts of a file, cut into chunks of equally many tokens by each model's tokenizer, without a chat template.

    Reading the job reads the file. Its contents travel with the job to the replicas, but are no part of what is written
    down of the job: there its digest stands for them.
    """

    file: Path
    """JSONL, Parquet, or plain text, which is one document; relative to the job file."""
    field: str = Field(default="text", min_length=1)
    """Of a JSONL or Parquet row, what holds the text."""
    context: int = Field(default=128, strict=True, ge=2)
    """Tokens of a chunk, BOS included."""
    chunks: int | None = Field(default=None, strict=True, ge=1)
    """At most so many, from the beginning."""
    sha256: Annotated[str | None, BeforeValidator(_digest)] = None
    """Of the file's bytes: filled in when it is read; a job that gives it is refused when the file is another."""
    _documents: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _read(self, info: ValidationInfo) -> "Corpus":
        if self._documents:
            return self
        path = (info.context or {}).get("folder", Path()) / self.file
        if path.suffix not in _READERS:
            raise problem(f"found {str(self.file)!r}; allowed: a file that ends in {', '.join(_READERS)}", "file")
        if path.suffix == ".txt" and self.field != "text":
            raise problem("is for JSONL and Parquet; a text file is one document", "field")
        if not paths.is_file(path):
            raise problem(f"there is no file {str(path)!r}", "file")
        documents, digest = read_documents(path, self.field)
        if self.sha256 not in (None, digest):
            raise problem(f"found {self.sha256!r}; that of {str(path)!r} is {digest}", "sha256")
        read = self.model_copy(update={"sha256": digest})
        read._documents = documents
        return read

    @property
    def documents(self) -> tuple[str, ...]:
        """The texts of the file, in its order, without blank ones."""
        return self._documents

    @cached_property
    def id(self) -> str:
        """The file's name and a hash of all that decides what a chunk of some number is, but for the tokenizer."""
        what = json.dumps([self.sha256, self.field, self.context])
        return f"{self.file.stem}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    @property
    def canonical(self) -> dict[str, Any]:
        """What names of runs and units are made of: the contents, wherever the file lies."""
        return {"id": self.id, "sha256": self.sha256, "chunks": self.chunks}

    def holds(self, prompt_id: str) -> bool:
        """Whether a text is one of its chunks."""
        corpus, _, number = prompt_id.rpartition("/")
        return corpus == self.id and number.isdecimal() and (self.chunks is None or int(number) < self.chunks)

    def chunk_id(self, number: int) -> str:
        """What a chunk is called."""
        return f"{self.id}/{number:06}"

    def read(self, tokenizer: Tokenizer, *, bos: Bos, model_id: str) -> list[TokenizedPrompt]:
        """Its chunks as one model reads them.

        Documents are joined to one stream, with a separator between two of them: BOS where chunks begin with BOS, else
        EOS where the tokenizer has one. A chunk never begins with a separator. A last chunk that is too short is left
        out, unless it is the only one and has a next token to predict.

        Args:
            tokenizer: a Hugging Face tokenizer.
            bos: what stands before every chunk, as before every prompt (`prompts.tokenize`).
            model_id: what errors call the model.

        Raises:
            UserError: there is not even one chunk, or there is no BOS to add.
        """
        opening = _opening(self._documents, tokenizer, bos, model_id)
        if len(opening) >= self.context:
            raise UserError(f"{model_id}: {self.file}: a chunk of {self.context} tokens has no room for text")
        bos_id, eos_id = tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)
        separator = [each for each in (bos_id if bos_id in opening else eos_id,) if each is not None]
        documents = _tokens(self._documents, tokenizer, model_id)
        cut = list(islice(_cut(documents, opening, separator, self.context), self.chunks))
        if not cut:
            raise UserError(f"{model_id}: {self.file}: holds too few tokens for one chunk")
        used = sorted({token for ids in cut for token in ids})
        names = dict(zip(used, display(tokenizer, used), strict=True))
        return [
            TokenizedPrompt(
                prompt=Prompt(self.chunk_id(number), _text(tokenizer, ids[len(opening) :])),
                token_ids=tuple(ids),
                tokens=tuple(names[token] for token in ids),
                bos=ids[0] == bos_id,
                answer_id=None,
                wrong_id=None,
                pieces={},
            )
            for number, ids in enumerate(cut)
        ]


def read_documents(path: Path, field: str = "text") -> tuple[tuple[str, ...], str]:
    """The texts of a file, and the sha256 of its bytes.

    Args:
        path: JSONL (`.jsonl`), Parquet (`.parquet`) or plain text (`.txt`).
        field: which field of a row holds its text.

    Raises:
        UserError: with file and line (Parquet: row) where it cannot be read, or holds no text.
    """
    try:
        texts = tuple(text for text in _READERS[path.suffix](path, field) if text.strip())
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not texts:
        raise UserError(f"{path}: holds no text")
    return texts, digest


def _txt(path: Path, _field: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, row in json_rows(path):
        yield _field(f"{path}:{number}", row, field)


def _parquet(path: Path, field: str) -> Iterator[str]:
    names: list[str] = pq.read_schema(path).names
    if field not in names:
        raise UserError(f"{path}: has no column {field!r}{near(field, names)}", hint=f"It has {', '.join(names)}.")
    for number, row in enumerate(parquet_rows(path, lambda name: name == field), 1):
        yield _field(f"{path}:row {number}", row, field)


_READERS: Mapping[str, Callable[[Path, str], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}


def _field(place: str, row: object, field: str) -> str:
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: found {quoted(row)}; allowed: an object with the field {field!r}")
    row = cast(Mapping[str, object], row)
    if field not in row:
        raise UserError(f"{place}: {field} is missing{near(field, row)}")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: {field}: found {quoted(text)}; allowed: text")
    if HALF.search(text):
        raise UserError(f"{place}: {field}: found half of a surrogate pair; allowed: text")
    return text


def _opening(documents: Sequence[str], tokenizer: Tokenizer, bos: Bos, model_id: str) -> list[int]:
    """The special tokens that stand before every chunk: those before a prompt that begins like a document."""
    for document in documents:
        sample = [Prompt("sample", document.strip()[:_SAMPLE])]
        try:
            [plain] = tokenize(sample, tokenizer, bos="never", chat_template=False, model_id=model_id)
        except UserError:  # no token of it is known
            continue
        if plain.bos:  # its text begins with BOS, to which `always` adds none
            continue
        [whole] = tokenize(sample, tokenizer, bos=bos, chat_template=False, model_id=model_id)
        return list(whole.token_ids[: len(whole.token_ids) - len(plain.token_ids)])
    raise UserError(f"{model_id}: every document of the corpus begins with a BOS token of its own, or has no tokens")


def _tokens(documents: Sequence[str], tokenizer: Tokenizer, model_id: str) -> Iterator[list[int]]:
    """The ids of every document that has any."""
    for start in range(0, len(documents), _TOGETHER):
        texts = list(documents[start : start + _TOGETHER])
        try:
            read = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UserError(f"{model_id}: its tokenizer cannot read the corpus: {error}") from error
        yield from (list(ids) for ids in read["input_ids"] if ids)


def _cut(
    documents: Iterable[list[int]], opening: Sequence[int], separator: Sequence[int], context: int
) -> Iterator[list[int]]:
    """Chunks of `context` ids; the last one may be shorter where it is the only one."""
    chunk, whole = list(opening), 0
    for ids in documents:
        if len(chunk) == context:
            yield chunk
            chunk, whole = list(opening), whole + 1
        elif len(chunk) > len(opening):
            chunk += separator
        start = 0
        while start < len(ids):
            if len(chunk) == context:
                yield chunk
                chunk, whole = list(opening), whole + 1
            stop = start + context - len(chunk)
            chunk += ids[start:stop]
            start = stop
    if len(chunk) == context or (not whole and len(chunk) >= max(2, len(opening) + 1)):
        yield chunk


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
