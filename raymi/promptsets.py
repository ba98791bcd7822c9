"""Where a job's prompts come from: written in the job, a file, or a set that comes with raymi."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, ValidationInfo, model_validator

from raymi import paths
from raymi.errors import UserError, quoted
from raymi.fields import Fields, all_said, near, problem, say
from raymi.prompts import Prompt
from raymi.rowfiles import UNREADABLE, json_rows, parquet_rows


class Written(Fields):
    """A prompt as it is written in a job or in a row of a file."""

    text: str
    answer: str | None = Field(default=None, min_length=1)
    """What should follow the text, with its leading blank."""
    wrong: str | None = Field(default=None, min_length=1)
    """Another answer, to measure the first against."""
    subject: str | None = Field(default=None, min_length=1)
    id: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _makes_sense(self) -> "Written":
        if not self.text.strip():
            raise problem("found an empty prompt", "text")
        if self.subject is not None and self.subject not in self.text:
            raise problem(f"found {quoted(self.subject)}, which is not in the text {quoted(self.text)}", "subject")
        if self.wrong is not None and self.answer is None:
            raise problem("a wrong answer needs an answer", "wrong")
        if self.wrong is not None and self.wrong == self.answer:
            raise problem(f"found {quoted(self.wrong)}, which is the answer itself", "wrong")
        return self

    def prompts(self, _folder: Path, _notes: list[str]) -> list[Prompt]:
        said = [self.text, self.answer, self.wrong, self.subject]
        name = self.id or sha256(json.dumps(said).encode()).hexdigest()[:12]
        return [Prompt(name, self.text, self.answer, self.wrong, self.subject)]


class FromFile(Fields):
    """Prompts of a JSONL, CSV or Parquet file; its path is relative to the job file."""

    file: Path

    @model_validator(mode="after")
    def _is_there(self, info: ValidationInfo) -> "FromFile":
        if self.file.suffix not in _READERS:
            raise problem(f"found {str(self.file)!r}; allowed: a file that ends in {', '.join(_READERS)}", "file")
        if not paths.is_file(_folder(info) / self.file):
            raise problem(f"there is no file {str(_folder(info) / self.file)!r}", "file")
        return self

    def prompts(self, folder: Path, notes: list[str]) -> list[Prompt]:
        return read_file(folder / self.file, notes)


class FromSet(Fields):
    """A set of prompts that comes with raymi."""

    set: Literal["capitals", "ioi"]
    """`capitals` of countries, with the country as subject; `ioi`, indirect object identification, with the name that
    occurs twice as subject and as wrong answer."""

    def prompts(self, _folder: Path, _notes: list[str]) -> list[Prompt]:
        with as_file(files("raymi") / "data" / f"{self.set}.jsonl") as path:
            return read_file(path)


def _kind(value: object) -> str:
    """Which source is meant: unlike a union, this leaves one error and not three."""
    keys: Iterable[object] = cast(Mapping[object, object], value) if isinstance(value, Mapping) else ()
    return next((f"<{key}>" for key in ("file", "set") if key in keys), "<written>")


_SOURCES = TypeAdapter[tuple[Written | FromFile | FromSet, ...]](
    tuple[
        Annotated[
            Annotated[Written, Tag("<written>")]
            | Annotated[FromFile, Tag("<file>")]
            | Annotated[FromSet, Tag("<set>")],
            Discriminator(_kind),
        ],
        ...,
    ]
)


def resolve(value: object, info: ValidationInfo) -> tuple[Prompt, ...]:
    """A pydantic validator: the prompts of a job's field `prompts`; files are sought in the context's `folder`."""
    entries = value if isinstance(value, list | tuple) else [value]
    prompts: list[Prompt] = []
    seen: set[str] = set()
    notes: list[str] = (info.context or {}).get("notes", [])
    for index, source in enumerate(_SOURCES.validate_python(entries, context=info.context)):
        for prompt in source.prompts(_folder(info), notes):
            if prompt.id in seen:
                raise problem(f"found a second prompt with the id {prompt.id!r}: {quoted(prompt.text)}", index)
            seen.add(prompt.id)
            prompts.append(prompt)
    return tuple(prompts)


def _folder(info: ValidationInfo) -> Path:
    return (info.context or {}).get("folder", Path())


def read_file(path: Path, notes: list[str] | None = None) -> list[Prompt]:
    """The prompts of a JSONL, CSV or Parquet file. UserError with file and line (Parquet: row) where one is wrong.

    Columns are the fields of an inline prompt; others are passed over unless they look like one misspelt, and `notes`
    gets their names.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    columns: dict[str, None] = {}
    try:
        for number, row in _READERS[path.suffix](path):
            place = f"{path}:{number}"
            columns |= dict.fromkeys(row if isinstance(row, Mapping) else ())
            prompt = _prompt(place, row)
            if prompt.id in seen:
                raise UserError(f"{place}: id: {prompt.id!r} is already the id of {seen[prompt.id]}")
            seen[prompt.id] = place
            prompts.append(prompt)
    except (*UNREADABLE, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not prompts:
        raise UserError(f"{path}: holds no prompts")
    unused = [column for column in columns if column not in Written.model_fields]
    if unused and notes is not None:
        columns_are = "column is" if len(unused) == 1 else "columns are"
        notes.append(f"{path}: {len(unused)} {columns_are} not used: {', '.join(unused)}")
    return prompts


def _prompt(place: str, row: object) -> Prompt:
    if isinstance(row, Mapping):
        row = cast(Mapping[str, object], row)
        absent = Written.model_fields.keys() - row.keys()
        row = {key: value for key, value in row.items() if key in Written.model_fields or near(key, absent)}
    try:
        return Written.model_validate(row).prompts(Path(), [])[0]
    except ValidationError as errors:
        said = all_said(errors, lambda error: ": ".join([place, *map(str, error["loc"]), say(error)]))
        raise UserError(said) from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{number}", row) for number, row in json_rows(path))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        begun = 1
        try:
            _check_header(path, rows.fieldnames or ())
            begun = rows.line_num + 1
            for row in rows:
                if None in row:
                    raise UserError(f"{path}:{rows.line_num}: has more fields than the header")
                # A CSV file cannot tell nothing from an empty text; only the text of a prompt must not be empty.
                yield f"{rows.line_num}", {key: value for key, value in row.items() if value or key == "text"}
                begun = rows.line_num + 1
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise UserError(
                    f"{path}:{begun}: a quote is opened and never closed",
                    hint='A quote within a text is written twice, and the text stands in quotes: "say ""yes""".',
                ) from None
            at = rows.reader.line_num
            lines_are = f"{begun}" if begun >= at else f"{begun}-{at}"
            raise UserError(f"{path}:{lines_are}: is no CSV: {error}") from None


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}:1: the header has {twice[0]!r} more than once")
    if len(names) == 1 and any(mark in names[0] and "text" in names[0].split(mark) for mark in ";\t|"):
        raise UserError(f"{path}:1: found one column, {names[0]!r}; allowed: fields with commas between them")
    absent = Written.model_fields.keys() - set(names)
    for name in names:
        if name not in Written.model_fields and (meant := near(name, absent)):
            raise UserError(f"{path}:1: {name}: unknown column; allowed: {', '.join(Written.model_fields)}{meant}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    fields = Written.model_fields
    rows = parquet_rows(path, lambda name: name in fields or bool(near(name, fields)))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
