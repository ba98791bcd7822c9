"""`raymi run`: the sweep."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import raymi.store
from raymi.cli.allowed import check, ids
from raymi.cli.options import models_option, run_options, sets_option
from raymi.cli.text import size, table, terminal_width
from raymi.errors import UserError, told

if TYPE_CHECKING:
    from raymi.cluster.progress import Words
    from raymi.cluster.sweep import Order, Result
    from raymi.job import Job
    from raymi.store.manifest import Manifest
    from raymi.store.reader import Store


@dataclass(frozen=True, slots=True)
class How:
    """How a job is to be carried out: the options that every command has which runs one."""

    store_uri: str
    cache_dir: Path | None
    address: str | None
    new: bool
    download: bool
    dry_run: bool
    inline: bool
    trust_remote_code: tuple[str, ...]
    allow_pickle: tuple[str, ...]
    allow_unused: tuple[str, ...]
    limit: int | None
    sample: int | None
    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        for one, other in (("--quiet", "--verbose"), ("--inline", "--address"), ("--limit", "--sample")):
            first, second = (getattr(self, option[2:]) for option in (one, other))
            if first not in (None, False) and second not in (None, False):
                raise UserError(f"{one} and {other}: allowed: one of the two", hint=_NOT_BOTH.get(one))

    @property
    def words(self) -> "Words":
        """How much is said."""
        return "few" if self.quiet else "many" if self.verbose else "usual"


_NOT_BOTH = {"--inline": "--inline measures in this process, on this machine; --address on the nodes of a cluster."}


@click.command()
@click.argument("job_path", metavar="JOB.yaml", type=click.Path(path_type=Path))
@models_option
@click.option("--device", help="auto, cpu, cuda or mps, in place of the job's.")
@click.option(
    "--engine", type=click.Choice(["auto", "full"]), help="full: one full forward an ablation, nothing reused."
)
@sets_option
@run_options
def command(
    job_path: Path,
    models: tuple[str, ...],
    device: str | None,
    engine: str | None,
    sets: tuple[str, ...],
    **how: Any,
) -> int:
    """Run a job: measure what it says on every model it names, and keep the rows in the store.

    Issued again, the command goes on where it stopped: what is in the store is not measured again, what failed is tried
    again, and models or prompts that were added to the job are measured.

    The exit code is 0 when all is done, 1 when some models or units failed, 2 for bad input, 130 or 143 when
    interrupted.

    \b
    Examples:
      raymi run jobs/heads.yaml --dry-run              # what it would take
      raymi run jobs/subject.yaml --limit 3            # try it on three prompts,
      raymi run jobs/subject.yaml                      # and go on with the others
      raymi run jobs/heads.yaml --models 'Qwen/*' --set dtype=bfloat16
      raymi run jobs/heads.yaml --address auto         # on a Ray cluster
    """
    return run_file(job_path, How(**how), models=models, sets=sets, device=device, engine=engine)


def run_file(path: Path, how: How, *, models: Sequence[str], sets: Sequence[str] = (), **fields: str | None) -> int:
    """Runs a job file.

    Args:
        path: of the file.
        how: to run it.
        models: in place of the job's, if there are any.
        sets: `key=value`, what replaces fields of the job.
        fields: of the job that have an option of their own; None leaves the job's.

    Returns:
        The exit code.

    Raises:
        UserError: bad input.
    """
    job = read_job(path, sets, {field: value for field, value in fields.items() if value}, models)
    return run_job(job, path.read_text(), how)


def run_job(job: "Job", written: str, how: How) -> int:
    """Runs a job, or says what it would take, and shows what came of it.

    Args:
        job: the job.
        written: the same as text, for the manifest.
        how: to run it.

    Returns:
        The exit code.

    Raises:
        UserError: bad input.
    """
    from raymi.cluster.frozen import Cache
    from raymi.cluster.sweep import Order, sweep
    from raymi.few import Few

    if how.inline and not how.dry_run:
        _check_device(job.device)
    store = raymi.store.open(how.store_uri)
    given = {
        "--trust-remote-code": how.trust_remote_code,
        "--allow-pickle": how.allow_pickle,
        "--allow-unused": how.allow_unused,
    }
    if not how.address:  # the nodes of a cluster have caches of their own
        check(given, job.models.include, how.cache_dir, download=how.download)
    cache = Cache(
        how.cache_dir,
        remote_code=ids(how.trust_remote_code),
        pickle=ids(how.allow_pickle),
        unused=ids(how.allow_unused),
        download=how.download,
    )
    warn_of_answers(job)
    few, left_out = Few(how.limit, how.sample).of(job)
    for said in left_out:
        click.echo(said, err=True)
    name = _run_name(store, job, new=how.new)
    order = Order(few, written, name, cache, how.address, how.inline, None if few is job else job, how.words)
    if how.dry_run:
        return _rehearse(order, store)
    result = sweep(order, store)
    _show(order, store, how.store_uri, result, quiet=how.quiet)
    return _exit_code(result)


def warn_of_answers(job: "Job") -> None:
    """Says of answers that run on from their prompts' last words, before anything is measured."""
    from raymi.answers import without_blank

    # Behind a chat template an answer begins the model's turn, where no blank stands.
    said = None if job.chat_template else without_blank(job.prompts)
    if said:
        click.echo(f"warning: {said}", err=True)


def read_job(path: Path, sets: Sequence[str], given: dict[str, str], models: Sequence[str]) -> "Job":
    """The job as the command line changes it; `given` are fields that have an option of their own."""
    from raymi.job import Models, load_job

    notes: list[str] = []
    try:
        job = load_job(path, [*sets, *(f"{field}={value}" for field, value in given.items())], notes)
    except UserError as error:
        said = error.what
        for field, value in given.items():
            said = said.replace(f"--set {field}={value}: {field}: ", f"--{field}: ")
        raise UserError(said, hint=error.hint) from None
    for note in notes:
        click.echo(f"note: {note}", err=True)
    return job.model_copy(update={"models": Models(include=tuple(models))}) if models else job


def _check_device(device: str) -> None:
    """Whether this process has it: with Ray the nodes say what they have."""
    if device in ("auto", "cpu"):
        return  # there is no need to import torch for those
    from raymi.notebook import check_device

    check_device(device)


_NAMING = ("dtype", "bos", "chat_template", "top_k", "experiments")
"""Fields of which the name of a run depends, beside that of the job."""


def _why_another(job: "Job", runs: "Sequence[Manifest]") -> str | None:
    """What is said where a job of this name has a run, and what was changed in it makes another."""
    before = [run for run in runs if run.jobs and run.jobs[-1].resolved.get("name") == job.name]
    if not before or any(run.run == job.run_name for run in runs):
        return None
    was, now = before[-1].jobs[-1].resolved, job.model_dump(mode="json")
    changed = [
        f"{field} is {now[field]!r} and was {was[field]!r}" if field != "experiments" else "its experiments are others"
        for field in _NAMING
        if field in was and was[field] != now[field]
    ]
    if not changed:
        return None
    return f"note: another run begins, {job.run_name}: {'; '.join(changed)} in {before[-1].run}, which stays as it is"


def _run_name(store: "Store", job: "Job", *, new: bool) -> str:
    """The newest run of the job, or with `new` the next one. Says why it is not the one before."""
    runs, damaged = store.survey()
    if said := _why_another(job, runs):
        click.echo(said, err=True)
    readable = {manifest.run for manifest in runs}
    taken = readable | damaged.keys()
    for name, error in damaged.items():
        if name in readable or not name.startswith(job.run_name):  # else it is an error, where it is wanted
            click.echo(f"damaged: {error}", err=True)
    names = [job.run_name]
    while names[-1] in taken:
        names.append(f"{job.run_name}-{len(names) + 1}")
    return names[-1] if new or len(names) == 1 else names[-2]


def _rehearse(order: "Order", store: "Store") -> int:
    """Prints what would be measured; 1 when some model cannot be."""
    from raymi.cluster.progress import duration
    from raymi.cluster.rehearsal import rehearse
    from raymi.cluster.worker import Failed

    rows: list[list[str]] = []
    failures: list[str] = []
    seconds = 0.0
    for key, left, cost in rehearse(order, store):
        if isinstance(left, Failed):
            failures.append(told(key, "plan", "UserError", left.message))
            continue
        counts = [f"{len(left):,}", f"{sum(unit.n_ablations for unit in left):,}"]
        takes = [f"{cost.forwards:,}", duration(cost.seconds), size(cost.peak_bytes)] if cost else ["-", "-", "-"]
        rows.append([key, *counts, *takes])
        seconds += cost.seconds if cost else 0.0
    header = ("model", "units", "to measure", "forwards", "time", "peak memory")
    click.echo("\n".join(table(header, rows, right=range(1, 6), width=terminal_width())))
    click.echo(f"\n{order.run}: about {duration(seconds)} on this machine, one model after the other")
    for failed in failures:
        click.echo(f"cannot run: {failed}", err=True)
    return 1 if failures else 0


def _exit_code(result: "Result") -> int:
    if result.ending.interrupted:
        return 128 + result.ending.interrupted
    return 1 if result.failed else 0


def _show(order: "Order", store: "Store", store_uri: str, result: "Result", *, quiet: bool) -> None:
    """What was found, what failed, and the line to type next."""
    from raymi.cli.report import lines
    from raymi.report import tables

    for each in result.rejected:
        if not each.named and not quiet:
            click.echo(f"skipped {each.model_id}: {each.reason}", err=True)
    if result.ending.interrupted:
        click.echo(f"\nInterrupted; what was measured is in {store_uri}. The same command goes on:", err=True)
        click.echo(f"  {_command_line()}", err=True)
        return
    if quiet:
        return
    if result.started or result.failed:
        click.echo()
        for line in lines(tables.report(store, order.run), terminal_width()):
            click.echo(line)
    else:
        again = "; --new measures all of them by full forwards" if order.job.engine == "full" else ""
        which = " of these prompts" if order.whole else ""
        click.echo(f"{order.run}: nothing to do, every unit{which} is in {store_uri}{again}")
    where = "" if store_uri == raymi.store.DEFAULT else f" --store {store_uri}"
    click.echo(f"\nnext: raymi report {order.run}{where}")


def _command_line() -> str:
    from shlex import join

    return join(["raymi", *sys.argv[1:]])
