"""Job files, and the files of prompts and texts that they name."""

import csv
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raymi.catalog import CachedModel
from raymi.corpus import read_documents
from raymi.errors import UserError
from raymi.job import Job, load_job
from raymi.plan.selection import selected
from raymi.plan.units import units as units_of
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.promptsets import read_file
from tests.fuzz.guard import Wrong
from tests.fuzz.inputs import Files
from tests.fuzz.targets import Target

ROWS: list[dict[str, Any]] = [
    {"id": "fr", "text": "The capital of France is", "answer": " Paris", "wrong": " Rome", "subject": "France"},
    {"id": "it", "text": "The capital of Italy is", "answer": " Rome", "wrong": None, "subject": None},
    {"text": "The capital of Peru is, as all know,", "answer": " Lima"},
]
JOBS: list[dict[str, Any]] = [
    {
        "name": "plain",
        "models": ["org/one", "Qwen/*"],
        "prompts": [ROWS[0], {"text": "Once"}],
        "experiments": [{"kind": "knockout", "layers": "all"}],
    },
    {
        "models": {"include": "*", "exclude": ["a/*", "b/c@d"], "max_parameters": "1.5B"},
        "dtype": "bfloat16",
        "device": "cuda:1",
        "prompts": [*ROWS],
        "bos": "always",
        "top_k": 3,
        "seed": 7,
        "engine": "full",
        "verify": 2,
        "on_mismatch": "full",
        "unit_ablations": 16,
        "experiments": [
            {
                "kind": "knockout",
                "name": "heads",
                "prompts": ["fr", "i*"],
                "layers": {"each": [0, -1]},
                "heads": {"each": "all"},
                "queries": "last",
                "keys": {"together": ["first", {"text": "The"}]},
            },
            {
                "kind": "knockout",
                "name": "edges",
                "layers": {"window": 2},
                "queries": {"each": [2, -1]},
                "keys": 0,
                "heads": [0, 3],
            },
        ],
    },
    {
        "name": "files",
        "prompts": [{"file": "more.csv"}, {"file": "more.jsonl"}, {"file": "more.parquet"}],
        "experiments": [
            {"kind": "knockout", "layers": 0.5, "queries": {"each": "all"}, "keys": "subject", "prompts": ["fr*"]}
        ],
    },
    {
        "name": "saes",
        "prompts": [{"set": "capitals"}],
        "experiments": [
            {
                "kind": "sae",
                "measure": "quality",
                "saes": "org/sae*",
                "skip": {"first": 1, "special": False},
                "corpus": {"file": "texts.txt", "context": 16, "chunks": 4},
            },
            {
                "kind": "sae",
                "name": "inject",
                "measure": "injection",
                "saes": ["org/sae:a"],
                "features": [1, 2],
                "strengths": [5, -1.5],
                "positions": "last",
                "prompts": "capitals/*",
            },
            {
                "kind": "sae",
                "name": "feel",
                "measure": "features",
                "saes": [{"sae": "org/x@main:y", "site": "blocks.1.hook_resid_post", "input_scale": 2.0}],
                "corpus": {"file": "texts.jsonl", "field": "text", "context": 8},
            },
            {"kind": "sae", "name": "cut", "measure": "ablation", "saes": "org/*", "prompts": "capitals/France"},
        ],
    },
]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"


BESIDE: dict[str, bytes] = {
    "more.csv": as_csv([ROWS[0] | {"id": "fr1"}, ROWS[1] | {"id": "it1"}]),
    "more.jsonl": as_jsonl([ROWS[0] | {"id": "fr2"}, ROWS[1] | {"id": "it2"}]),
    "more.parquet": as_parquet([ROWS[0] | {"id": "fr3"}, ROWS[1] | {"id": "it3"}]),
    "texts.txt": b"The capital of France is Paris, and that of Italy is Rome.\nSo they say.\n",
    "texts.jsonl": as_jsonl([{"text": "The capital of France"}, {"text": "is Paris", "n": 1}]),
}


@cache
def jobs() -> dict[str, Files]:
    made: dict[str, Files] = {}
    for at, job in enumerate(JOBS):
        text = yaml.safe_dump(job, sort_keys=False)
        beside = {name: data for name, data in BESIDE.items() if name in text}
        made[f"job{at}"] = {**beside, "job.yaml": text.encode()}
    return made


TINY = CachedModel(
    id="org/one",
    revision="0" * 40,
    path=Path("x"),
    model_type="llama",
    n_layers=3,
    n_heads=4,
    hidden_size=16,
    vocab_size=32,
    context=64,
    parameters=5_000,
    size_on_disk=20_000,
    dtype="float32",
    reason=None,
    n_kv_heads=4,
    intermediate_size=32,
    head_dim=4,
)


def read_job(folder: Path) -> None:
    job = load_job(folder / "job.yaml")
    text = job.model_dump_json()
    again = Job.model_validate(json.loads(text), context={"folder": folder})
    if (not job.sae_experiments and again.run_name != job.run_name) or again.prompts != job.prompts:
        raise Wrong("a job is another when it is written down and read again")
    if len({prompt.id for prompt in job.prompts}) < len(job.prompts):
        raise Wrong("two prompts of one id")
    text.encode()
    prompts = [tokens(prompt, job) for prompt in job.prompts[:5]]
    model_ids = set(plan_ids(job))
    for spec in job.experiments:
        try:
            units = units_of(job, spec, TINY, prompts)
        except UserError:
            continue
        if sum(unit.n_ablations for unit in units) > 100_000:
            raise Wrong("a small job came to more than 100,000 ablations of a tiny model")
        if units != units_of(again, again.experiments[job.experiments.index(spec)], TINY, prompts):
            raise Wrong("units of the same job differ")
    if not model_ids <= {"org/one"}:
        raise Wrong("a model that is not there was chosen")


def plan_ids(job: Job) -> list[str]:
    def find(ref: str) -> CachedModel:
        if ref.partition("@")[0] != TINY.id:
            raise UserError("no such model")
        return TINY

    try:
        return [model.id for model in selected(job, [TINY], find)[0]]
    except UserError:
        return []


def tokens(prompt: Prompt, job: Job) -> TokenizedPrompt:
    """A prompt as a tokenizer might read it that splits at blanks."""
    n = max(1, min(8, len(prompt.text.split())))
    pieces = {piece: (0, n - 1) for piece in job.pieces if prompt.piece(piece) is not None}
    answer = None if prompt.answer is None else 3
    return TokenizedPrompt(prompt, tuple(range(n)), ("x",) * n, False, answer, answer and 4, pieces)


JOB = Target("job", jobs, read_job)


@cache
def prompt_files() -> dict[str, Files]:
    rows = [{**ROWS[0], "note": "x"}, ROWS[1] | {"note": None}]
    return {
        "csv": {"p.csv": as_csv(rows)},
        "jsonl": {"p.jsonl": as_jsonl([*rows, ROWS[2]])},
        "parquet": {"p.parquet": as_parquet(rows)},
        "texts": {"c.txt": BESIDE["texts.txt"]},
        "text rows": {"c.jsonl": BESIDE["texts.jsonl"]},
        "text columns": {"c.parquet": as_parquet([{"text": "The capital"}, {"text": "of France"}])},
    }


def read_prompts(folder: Path) -> None:
    [path] = [*folder.iterdir()] or [folder / "p.csv"]
    if path.name.startswith("c."):
        texts, digest = read_documents(path)
        if len(digest) != 64 or "".join(texts) not in "".join(plain_texts(path)):
            raise Wrong("other texts than the file has")
        return
    prompts = read_file(path)
    found = [prompt.text for prompt in prompts]
    for prompt in prompts:
        repr(prompt.id).encode()
        (prompt.id + prompt.text).encode()
    if found != plain_texts(path):
        raise Wrong("other prompts than the file has")
    again = folder / "again.jsonl"
    kept = [
        {name: getattr(prompt, name) for name in ("id", "text", "answer", "wrong", "subject")} for prompt in prompts
    ]
    again.write_bytes(as_jsonl(kept))
    if read_file(again) != prompts:
        raise Wrong("prompts are others when they are written down and read again")


def plain_texts(path: Path) -> list[str]:
    """The texts of a file, as its library reads them."""
    match path.suffix:
        case ".txt":
            return [path.read_text(encoding="utf-8-sig")]
        case ".jsonl":
            rows = [json.loads(line) for line in path.open(encoding="utf-8-sig") if line.strip()]
        case ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines))
        case _:
            rows = pq.ParquetFile(path).read(columns=["text"]).to_pylist()
    return [row["text"] for row in rows]


PROMPTS = Target("prompts", prompt_files, read_prompts)
