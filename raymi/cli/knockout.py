"""`raymi knockout`: one ablation on each of some models, in this process, with all there is to know about it."""

import gc
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from raymi import catalog
from raymi.catalog import CachedModel
from raymi.cli.allowed import check, ids
from raymi.cli.completion import MODEL
from raymi.cli.knockout_text import comparison, header, lines
from raymi.cli.options import cache_option, unused_option
from raymi.cli.question import Question, plain
from raymi.cli.text import terminal_width
from raymi.errors import UserError

if TYPE_CHECKING:
    from raymi.job import Job
    from raymi.plan.selection import Rejected
    from raymi.single import Record

PROMPT, ANSWER = "The capital of France is", " Paris"


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=MODEL)
@click.option("--prompt", help=f'The text to continue. Default: "{PROMPT}".')
@click.option("--answer", help=f'What should follow, with its leading blank. Default: "{ANSWER}", without --prompt.')
@click.option("--wrong", help="Another answer; the difference between the two is measured as well.")
@click.option("--layers", default="middle", show_default=True, help="15, -1, middle, all, 0.5 (of the depth) or 3,4,5.")
@click.option("--heads", default="all", show_default=True, help="all, 3 or 0,3,5.")
@click.option(
    "--edge",
    "edges",
    multiple=True,
    default=("last:first",),
    show_default=True,
    metavar="QUERY:KEY",
    help="Which position loses sight of which: first, last, all, 3, -2, or a piece of the prompt in quotes, as in "
    "'last:\"France\"'. May be given several times.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:1.")
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Whether the prompt begins with a beginning-of-sequence token; auto: as the tokenizer does.",
)
@click.option("--output", type=click.Path(path_type=Path), help="A JSON file for the results, whole after every model.")
@cache_option
@click.option(
    "--trust-remote-code", "trusted", multiple=True, metavar="MODEL", help="Run the code that this model brings along."
)
@click.option("--allow-pickle", "pickled", multiple=True, metavar="MODEL", help="Load this model's pickled weights.")
@unused_option
@click.pass_context
def command(
    ctx: click.Context,
    models: tuple[str, ...],
    prompt: str | None,
    answer: str | None,
    output: Path | None,
    cache_dir: Path | None,
    trusted: tuple[str, ...],
    pickled: tuple[str, ...],
    allow_unused: tuple[str, ...],
    **options: Any,
) -> None:
    """Knock out attention in one place and show what that does to the next token.

    A MODEL is an id, id@revision, or a pattern such as 'Qwen/*'. Without any, every cached model that can run is
    taken, one after the other.

    Whatever is named is cut together, as one ablation: all of --layers, all of --heads, every --edge. `raymi run`
    measures each by itself, over many prompts, and keeps the results in a store.

    The exit code is 1 when a model failed (the others are measured all the same), and 2 when it is the question that
    no model can answer.

    \b
    Examples:
      raymi knockout gpt2
      raymi knockout 'Qwen/*' --layers 0.5 --heads 0,3 --edge last:first
      raymi knockout gpt2 --prompt "Rome is in" --edge 'last:"Rome"'
    """
    from raymi.notebook import check_device

    answer = ANSWER if prompt is None and answer is None else answer
    question = Question(prompt=PROMPT if prompt is None else prompt, answer=answer, **options)
    job = question.job(models or ("*",))
    given = {"--trust-remote-code": trusted, "--allow-pickle": pickled, "--allow-unused": allow_unused}
    check(given, models or ("*",), cache_dir)
    allowed = {"trust_remote_code": ids(trusted), "allow_pickle": ids(pickled)}
    chosen, rejected = _selected(job, cache_dir, allowed)
    check_device(job.device)
    if output is not None:
        with _replacing(output):
            pass  # better to fail now than after the first model
    session = _Session(question, job, allowed | {"allow_unused": ids(allow_unused)}, output)
    try:
        for model in chosen:
            session.measure(model)
    except KeyboardInterrupt:
        click.echo(f"\nStopped: {len(session.records)} of {len(chosen)} models were measured.", err=True)
        raise
    if len(session.records) > 1:
        click.echo("\n".join(comparison(session.records, terminal_width())))
    failed = {each.model_id: plain(each.reason) for each in rejected if each.named} | session.failed
    _list("Failed", failed)
    _list("Cannot run", {each.model_id: each.reason for each in rejected if not each.named})
    if failed:
        ctx.exit(1 if session.records or session.broke else UserError.exit_code)


def _selected(
    job: "Job", cache_dir: Path | None, allowed: Mapping[str, Collection[str]]
) -> "tuple[list[CachedModel], list[Rejected]]":
    from raymi.plan.selection import selected

    def find(ref: str) -> CachedModel:
        id = ref.partition("@")[0]
        return catalog.find(ref, cache_dir, **{option: id in ids for option, ids in allowed.items()})

    special = set[str]().union(*allowed.values())
    found = [find(model.id) if model.id in special else model for model in catalog.scan(cache_dir)]
    try:
        return selected(job, found, find)
    except UserError as error:
        raise UserError(plain(error.what), hint=error.hint) from None


@dataclass(slots=True)
class _Session:
    """Models measured one after the other; never are two in memory."""

    question: Question
    job: "Job"
    allowed: Mapping[str, Collection[str]]
    output: Path | None
    records: "list[Record]" = field(default_factory=list[dict[str, Any]])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Model -> why."""
    broke: bool = False
    """Whether something failed that is no mistake in the question."""

    def measure(self, model: CachedModel) -> None:
        """Shows one model's result, and adds it to the output."""
        from raymi.single import measure

        width = terminal_width()
        click.echo("\n".join(header(model, width)))
        options = {option: model.id in ids for option, ids in self.allowed.items()}
        try:
            record = measure(self.job, model, **options) | {"asked": asdict(self.question)}
        except UserError as error:
            self.failed[model.id] = plain(str(error))
        except Exception as error:  # whatever one model does, the others are measured
            self.broke = True
            self.failed[model.id] = f"{type(error).__name__}: {error}"
        else:
            click.echo("\n".join(lines(record, width)))
            self.records.append(record)
            self._write()
        click.echo("  failed\n" if model.id in self.failed else "")
        _free_memory()

    def _write(self) -> None:
        if self.output is not None:
            with _replacing(self.output) as unfinished:
                unfinished.write_text(json.dumps(self.records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                os.replace(unfinished, self.output)


def _free_memory() -> None:
    """Gives back what the last model took: its parts refer to each other, so only the collector lets go of them."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to be filled and put in its place; what is still there afterwards is removed.

    Raises:
        UserError: nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder", hint="Name a file in it.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        yield unfinished
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _list(title: str, reasons: Mapping[str, str]) -> None:
    if reasons:
        click.echo(f"{title}:", err=True)
    for model_id, reason in reasons.items():
        first, *more = reason.removeprefix(f"{model_id}: ").splitlines() or [""]
        for line in (f"  {model_id}: {first}", *(f"    {line}" for line in more)):
            click.echo(
                fill(line, terminal_width() or 10_000, subsequent_indent="    ", break_on_hyphens=False), err=True
            )
