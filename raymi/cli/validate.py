"""`raymi validate`: whether a job is right, before anything is loaded."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raymi.cli.allowed import check, ids
from raymi.cli.options import allow_options, cache_option, models_option, sets_option
from raymi.cli.run import read_job, warn_of_answers
from raymi.cli.text import plural, table, terminal_width
from raymi.errors import UserError, told

if TYPE_CHECKING:
    from raymi.job import Job


@click.command()
@click.argument("job_path", metavar="JOB.yaml", type=click.Path(path_type=Path))
@models_option
@sets_option
@cache_option
@allow_options
def command(
    job_path: Path,
    models: tuple[str, ...],
    sets: tuple[str, ...],
    cache_dir: Path | None,
    trust_remote_code: tuple[str, ...],
    allow_pickle: tuple[str, ...],
    allow_unused: tuple[str, ...],
) -> int:
    """Check a job file: its fields and its prompts, and what it comes to on each cached model.

    Prompts are read by each model's tokenizer; no weights are loaded, and no store is looked at. `raymi run --dry-run`
    also says what is in the store already, and how long the rest takes.

    The exit code is 0 when all is well, 1 when some model or prompt cannot be measured, 2 when the job is wrong.

    \b
    Examples:
      raymi validate jobs/heads.yaml
      raymi validate jobs/heads.yaml --set experiments.0.layers=middle
    """
    from raymi.cluster.frozen import Cache
    from raymi.cluster.rehearsal import plans
    from raymi.cluster.sweep import Order
    from raymi.cluster.worker import Failed

    job = read_job(job_path, sets, {}, models)
    warn_of_answers(job)
    click.echo(f"{job_path} is a valid job: {', '.join(_counts(job))}; its run is called {job.run_name}")
    given = {
        "--trust-remote-code": trust_remote_code,
        "--allow-pickle": allow_pickle,
        "--allow-unused": allow_unused,
    }
    check(given, job.models.include, cache_dir)
    cache = Cache(cache_dir, ids(trust_remote_code), ids(allow_pickle), ids(allow_unused))
    rows: list[list[str]] = []
    failed: list[str] = []
    try:
        for key, _, left, _ in plans(Order(job, "", job.run_name, cache), None):
            if isinstance(left, Failed):
                failed.append(told(key, "plan", left.kind, left.message))
            else:
                rows.append([key, f"{len(left):,}", f"{sum(unit.n_ablations for unit in left):,}"])
    except UserError as error:
        click.echo(f"\nnot checked on any model: {error}", err=True)
        wanted = job.models.include
        there = any(fnmatchcase(model.id, each) for model in cache.scan() for each in wanted)
        return int(there or any(not set("*?[") & set(each) for each in wanted))
    if rows:
        click.echo(
            "\n" + "\n".join(table(("model", "units", "to measure"), rows, right=(1, 2), width=terminal_width()))
        )
    for said in failed:
        click.echo(f"cannot run: {said}", err=True)
    return 1 if failed else 0


def _counts(job: "Job") -> list[str]:
    n = len(job.corpora)
    corpora = [f"{n} {'corpus' if n == 1 else 'corpora'}"] if n else []
    prompts = [plural(len(job.prompts), "prompt")] if job.prompts else []
    return [*prompts, *corpora, plural(len(job.experiments), "experiment")]
