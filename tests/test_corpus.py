"""Corpora: files read, their mistakes told by line, and the chunks that tokenizers cut them into."""

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymi.corpus import Corpus, read_documents
from raymi.errors import UserError
from raymi.prompts import TokenizedPrompt
from tests.tiny_tokenizers import byte_bpe, words

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write(path: Path, documents: Sequence[str]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in documents))
        case ".parquet":
            pq.write_table(pa.table({"id": range(len(documents)), "text": list(documents)}), path)
        case _:
            path.write_text("\n".join(documents))
    return path


def corpus(path: Path, **fields: Any) -> Corpus:
    return Corpus.model_validate({"file": path, **fields})


def chunks(documents: Sequence[str], path: Path, tokenizer: Any, *, bos: Any = "auto", **fields: Any) -> list[str]:
    """The chunks of documents of words, as their tokens."""
    file = write(path / "c.jsonl", documents)
    return [" ".join(text.tokens) for text in corpus(file, **fields).read(tokenizer, bos=bos, model_id="org/m")]


def plain(**options: Any) -> Any:
    return words(list(LETTERS), **options)


# Files.


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_the_documents_of_a_file(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ["one", " ", "", "two\nlines"])
    read = corpus(path)
    assert read.documents == ("one", "two\nlines")
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\ufeffone\n\ntwo", encoding="utf-8")
    assert corpus(path).documents == ("one\n\ntwo",)


def test_another_field(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "story": "b"}')
    assert corpus(path, field="story").documents == ("b",)
    assert corpus(path, field="story").id != corpus(path).id


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.jsonl", '{"text": "a"}\n{"text": ', "c.jsonl:2: is no JSON: "),
        ("c.jsonl", '{"text": "a"}\n\n["a"]', "c.jsonl:3: found ['a']; allowed: an object with the field 'text'"),
        ("c.jsonl", '{"txt": "a"}', "c.jsonl:1: text is missing (did you mean 'txt'?)"),
        ("c.jsonl", '{"text": 5}', "c.jsonl:1: text: found 5; allowed: text"),
        ("c.jsonl", '{"text": null}', "c.jsonl:1: text: found None; allowed: text"),
        ("c.jsonl", '{"text": " "}\n', "c.jsonl: holds no text"),
        ("c.txt", "", "c.txt: holds no text"),
        ("c.txt", b"\xff\xfe\xff", "c.txt: cannot be read: "),
        ("c.parquet", b"nothing of the kind", "c.parquet: cannot be read: "),
    ],
)
def test_what_is_wrong_in_a_file_is_told_by_its_line(
    name: str, content: str | bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        read_documents(path)
    assert str(error.value).startswith(f"{tmp_path}/{expected}")


def test_parquet_without_the_column_or_with_another_type(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"texts": ["a"]}), path)
    with pytest.raises(UserError, match=r"c\.parquet: has no column 'text' \(did you mean 'texts'\?\)\nIt has texts\."):
        read_documents(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match=r"c\.parquet:row 2: text: found None; allowed: text"):
        read_documents(path)


# What it is called, and what travels.


def test_the_contents_travel_with_a_job_and_are_not_written_down(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ["secret words"])
    read = corpus(path)
    there = pickle.loads(pickle.dumps(read))  # noqa: S301
    assert there.documents == ("secret words",)
    assert "secret" not in read.model_dump_json()
    assert read.model_dump() == {
        "file": path, "field": "text", "context": 128, "chunks": None, "sha256": read.sha256,
    }  # fmt: skip
    assert Corpus.model_validate(read.model_dump()) == read


def test_a_job_may_say_which_contents_it_means(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ["a"])
    with pytest.raises(ValueError, match=r"found '0000.*'; that of .* is "):
        corpus(path, sha256="0" * 64)


def test_names_follow_the_contents_and_the_length_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    first, moved = write(tmp_path / "c.jsonl", ["a b"]), write(tmp_path / "moved" / "c.jsonl", ["a b"])
    other = write(tmp_path / "moved" / "d.jsonl", ["a c"])
    assert corpus(first).canonical == corpus(moved).canonical
    assert corpus(first).id.startswith("c-")
    different = [corpus(first), corpus(first, context=8), corpus(other)]
    assert len({each.id for each in different}) == 3
    # The first chunks are the same however many are taken.
    assert corpus(first, chunks=5).id == corpus(first).id
    assert corpus(first, chunks=5).canonical != corpus(first).canonical


def test_which_texts_are_its_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ["a b"])
    few, all_ = corpus(path, chunks=2), corpus(path)
    assert [few.holds(f"{few.id}/{i:06}") for i in range(4)] == [True, True, False, False]
    assert all_.holds(f"{few.id}/000003")
    assert not all_.holds(few.id)
    assert not all_.holds(f"{few.id}/x")
    assert not all_.holds(f"{corpus(path, context=4).id}/000000")


# Chunks.


def test_documents_are_joined_and_cut(tmp_path: Path) -> None:
    assert chunks(["a b c d e", "f g", "h i"], tmp_path, plain(), context=4) == ["a b c d", "e f g h"]


def test_between_documents_stands_what_ends_or_begins_a_text(tmp_path: Path) -> None:
    ends = plain(after="</s>", eos_token="</s>")
    assert chunks(["a b c d e", "f g", "h i"], tmp_path, ends, context=4) == ["a b c d", "e </s> f g"]
    begins = plain(before="<s>", after="</s>", bos_token="<s>", eos_token="</s>")
    assert chunks(["a b c d e", "f g", "h i"], tmp_path, begins, context=4) == [
        "<s> a b c",
        "<s> d e <s>",
        "<s> f g <s>",
    ]
    assert chunks(["a b c d", "e f"], tmp_path, begins, bos="never", context=4) == ["a b c d"]


def test_no_chunk_begins_with_a_separator(tmp_path: Path) -> None:
    begins = plain(before="<s>", bos_token="<s>")
    assert chunks(["a b c", "d e f"], tmp_path, begins, context=4) == ["<s> a b c", "<s> d e f"]
    ends = plain(after="</s>", eos_token="</s>")
    assert chunks(["a b", "c d"], tmp_path, ends, context=2) == ["a b", "c d"]


def test_bos_is_that_of_prompts(tmp_path: Path) -> None:
    silent = words(["<s>", *LETTERS], bos_token="<s>")  # has one, and does not add it
    assert chunks(["a b c"], tmp_path, silent, context=3) == ["a b c"]
    assert chunks(["a b c d"], tmp_path, silent, bos="always", context=3) == ["<s> a b", "<s> c d"]
    with pytest.raises(UserError, match="org/m: bos is always, but its tokenizer has no beginning-of-sequence token"):
        chunks(["a b c"], tmp_path, plain(), bos="always", context=3)


def test_a_document_that_writes_bos_itself(tmp_path: Path) -> None:
    begins = words(["<s>", *LETTERS], before="<s>", bos_token="<s>")
    assert chunks(["<s> a b", "c d e"], tmp_path, begins, context=3) == ["<s> <s> a", "<s> b <s>", "<s> c d"]
    with pytest.raises(UserError, match="every document of the corpus begins with a BOS token of its own"):
        chunks(["<s> a b"], tmp_path, begins, context=3)


def test_a_short_tail_is_left_out_unless_it_is_all_there_is(tmp_path: Path) -> None:
    assert chunks(["a b c d e"], tmp_path, plain(), context=4) == ["a b c d"]
    assert chunks(["a b c"], tmp_path, plain(), context=4) == ["a b c"]
    with pytest.raises(UserError, match=r"org/m: .*c\.jsonl: holds too few tokens for one chunk"):
        chunks(["a"], tmp_path, plain(), context=4)


def test_at_most_so_many(tmp_path: Path) -> None:
    documents = [" ".join(LETTERS)] * 100
    all_ = chunks(documents, tmp_path, plain(), context=5)
    assert len(all_) == 26 * 100 // 5
    assert chunks(documents, tmp_path, plain(), context=5, chunks=7) == all_[:7]


def test_only_as_much_is_tokenised_as_is_taken(tmp_path: Path) -> None:
    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer, self.read = tokenizer, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.read += len(texts)
            return self.tokenizer(texts, **options)

    counting = Counting(plain())
    chunks([" ".join(LETTERS)] * 5000, tmp_path, counting, context=5, chunks=7)
    assert counting.read < 100


def test_a_chunk_is_a_text_like_any_other(tmp_path: Path) -> None:
    tokenizer = byte_bpe(["one", " two", " three"], before="<s>", bos_token="<s>")
    path = write(tmp_path / "c.jsonl", ["one two three", "one"])
    [first, second] = corpus(path, context=3).read(tokenizer, bos="auto", model_id="org/m")
    assert isinstance(first, TokenizedPrompt)
    assert (first.prompt.id, first.prompt.text) == (f"{corpus(path, context=3).id}/000000", "one two")
    assert first.tokens == ("<s>", "one", " two")
    assert first.token_ids[0] == tokenizer.bos_token_id
    assert first.bos
    assert (second.prompt.id[-7:], second.tokens) == ("/000001", ("<s>", " three", "<s>"))
    assert (first.answer_id, first.wrong_id, first.pieces) == (None, None, {})


@given(
    documents=st.lists(st.text(LETTERS, min_size=1, max_size=9), min_size=1, max_size=12),
    context=st.integers(2, 7),
    most=st.none() | st.integers(1, 5),
    bos=st.booleans(),
)
def test_chunks_hold_the_documents_in_order(
    documents: list[str], context: int, most: int | None, bos: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = words(list(LETTERS), **({"before": "<s>", "bos_token": "<s>"} if bos else {}))
    path = write(tmp_path_factory.mktemp("c") / "c.jsonl", [" ".join(text) for text in documents])
    whole = "".join(documents)
    if len(whole) < 2 - bos:
        return
    cut = corpus(path, context=context, chunks=most).read(tokenizer, bos="auto", model_id="m")
    assert len({text.prompt.id for text in cut}) == len(cut) <= (most or len(cut))
    if len(cut) > 1:
        assert {len(text.token_ids) for text in cut} == {context}
    assert all(text.token_ids[0] == tokenizer.bos_token_id for text in cut) or not bos
    said = "".join(token for text in cut for token in text.tokens if token != "<s>")
    assert whole.startswith(said)
    # No more than a short tail is missing.
    assert most is not None or len(whole) - len(said) < context
