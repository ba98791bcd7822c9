"""Prompts of files and of the sets that come with raymi; those written in a job are in test_job.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymi.errors import UserError
from raymi.job import load_job, make_job
from raymi.prompts import Prompt
from raymi.promptsets import read_file

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "The capital of France is", "answer": " Paris", "wrong": " London", "subject": "France"},
    {"id": "b", "text": 'She said "é,\nno" and', "answer": " left", "wrong": None, "subject": None},
]
PROMPTS = [Prompt(**row) for row in ROWS]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".csv")
    quoted = [",".join('"' + str(v or "").replace('"', '""') + '"' for v in row.values()) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *quoted]), encoding="utf-8-sig")
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
def test_files(write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "p", ROWS)) == PROMPTS
    more = [{**row, "relation": "capital", "context": "x"} for row in ROWS]
    assert read_file(write(tmp_path / "more", more)) == PROMPTS


def test_ids_are_hashes_of_what_is_said(tmp_path: Path) -> None:
    without = [{k: v for k, v in row.items() if k != "id"} for row in ROWS]
    ids = [prompt.id for prompt in read_file(as_jsonl(tmp_path / "p", without))]
    assert ids == [prompt.id for prompt in read_file(as_csv(tmp_path / "p", without))]
    assert all(re.fullmatch("[0-9a-f]{12}", id) for id in ids)
    other = read_file(as_jsonl(tmp_path / "p", [{**without[0], "wrong": " Rome"}]))[0].id
    assert len({*ids, other}) == 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '{"text": "a"}\n\n{"txt": "b"}', ["p.jsonl:3: txt: unknown field", "did you mean 'text'?"]),
        ("p.jsonl", '{"text": "a"}\n{"answer": " b"}', ["p.jsonl:2: text: is missing"]),
        (
            "p.jsonl",
            '{"text": "a"}\n{"text": "b", "answer": 5}',
            ["p.jsonl:2: answer: found 5; allowed: text"],
        ),
        ("p.jsonl", '{"text": "a"}\n{"text": ', ["p.jsonl:2: is no JSON"]),
        ("p.jsonl", '{"text": "a"}\n["b"]', ["p.jsonl:2: found ['b']; allowed: a mapping of text, answer"]),
        ("p.jsonl", '{"text": "a"}\n{"text": "a"}', ["p.jsonl:2: id: ", "is already the id of ", "p.jsonl:1"]),
        ("p.jsonl", '{"text": " "}', ["p.jsonl:1: text: found an empty prompt"]),
        ("p.jsonl", "\n", ["p.jsonl: holds no prompts"]),
        ("p.jsonl", '{"text": "a", "subject": "b"}', ["p.jsonl:1: subject: found 'b', which is not in the text 'a'"]),
        ("p.jsonl", b"\xff", ["p.jsonl: cannot be read"]),
        ("p.csv", "txt,answer\na, b", ["p.csv:1: txt: unknown column", "did you mean 'text'?"]),
        ("p.csv", "answer\n b", ["p.csv:2: text: is missing"]),
        ("p.csv", 'text,answer\n"a\nb", c\n, b', ["p.csv:4: text: found an empty prompt"]),
        ("p.csv", "text,answer\na, b, c", ["p.csv:2: has more fields than the header"]),
        ("p.csv", 'text\n"a', ["p.csv:2: a quote is opened and never closed"]),
        ("p.csv", 'text\na\n"b\nc\n\nd\n', ["p.csv:3: a quote is opened and never closed", '"say ""yes"""']),
        ("p.csv", '"text,answer\na, b', ["p.csv:1: a quote is opened and never closed"]),
        ("p.csv", 'text,answer\n"a, b\nc, "d"\n', ["p.csv:2-3: is no CSV: "]),
        ("p.csv", "text,answer,text\na, b,c", ["p.csv:1: the header has 'text' more than once"]),
        ("p.csv", "text;answer\na; b", ["p.csv:1: found one column, 'text;answer'; allowed: fields with commas"]),
        ("p.parquet", "no parquet", ["p.parquet: cannot be read"]),
    ],
)
def test_bad_files(name: str, content: str | bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_file(tmp_path / name)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_that_are_not_used_are_named(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "target": " b", "note": "c"}, {"text": "d", "target": " e", "note": "f"}]
    path = {"csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet}[kind](tmp_path / "p", rows)
    notes: list[str] = []
    assert len(read_file(path, notes)) == 2
    assert notes == [f"{path}: 2 columns are not used: target, note"]
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: [{{file: {path.name}}}, {{set: ioi}}]\nexperiments: [{{kind: knockout, layers: 0}}]")
    said: list[str] = []
    load_job(job, notes=said)
    assert said == notes


def test_wrong_types_of_parquet_name_the_row(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "p", [{"text": "a", "answer": 5}])
    with pytest.raises(UserError, match=r"p\.parquet:row 1: answer: found 5"):
        read_file(path)


def built_in(name: str) -> tuple[Prompt, ...]:
    return make_job({"name": "x", "prompts": {"set": name}, "experiments": [{"kind": "knockout", "layers": 0}]}).prompts


def test_capitals() -> None:
    prompts = built_in("capitals")
    assert len(prompts) >= 40
    assert Prompt("capitals/France", "The capital of France is", " Paris", " London", "France") in prompts
    capital_of = {prompt.subject: prompt.answer for prompt in prompts}
    assert len(capital_of) == len(set(capital_of.values())) == len(prompts)
    for prompt in prompts:
        assert prompt.text == f"The capital of {prompt.subject} is"
        assert prompt.answer != prompt.wrong
        assert all(answer and re.fullmatch(r" [A-Z][A-Za-z ]+", answer) for answer in (prompt.answer, prompt.wrong))


def test_indirect_objects() -> None:
    prompts = built_in("ioi")
    assert 24 <= len(prompts) <= 96
    orders = {True: 0, False: 0}
    for prompt in prompts:
        giver, receiver = str(prompt.subject), str(prompt.answer).strip()
        names = [word for word in re.findall(r"\w+", prompt.text) if word in (giver, receiver)]
        assert prompt.wrong == f" {giver}"
        assert sorted(names) == sorted([giver, giver, receiver])
        assert names[2] == giver
        assert prompt.text.endswith(" to")
        orders[names[0] == receiver] += 1
        # The first occurrence of the subject is the name, and not a part of another word.
        assert re.match(rf"{giver}\b", prompt.text[prompt.text.index(giver) :])
    assert orders[True] == orders[False]
    assert len({prompt.answer for prompt in prompts}) == 12
