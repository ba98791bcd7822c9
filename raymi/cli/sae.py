"""`raymi sae`: the sparse autoencoders in the cache, one of them more closely, and what they do in a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import click
import yaml

from raymi import catalog
from raymi.cli.completion import MODEL, SAE
from raymi.cli.options import cache_option, run_options, target_option
from raymi.cli.sae_question import MEASURES, Question, job_of, own_models
from raymi.cli.text import count, table, terminal_width
from raymi.errors import UserError
from raymi.sae import discover, files
from raymi.sae.description import Description
from raymi.sae.discover import Found

_json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@click.group()
def command() -> None:
    """Sparse autoencoders: what there is, what it computes, and what it does in a model.

    \b
    Examples:
      raymi sae list
      raymi sae run ORG/SAE:PATH --corpus texts.jsonl
    """


@command.command("list")
@click.argument("where", required=False)
@cache_option
@_json_option
def list_(where: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """List the SAEs in the Hugging Face cache, or in WHERE: a folder, or repo[@revision][:path].

    \b
    Examples:
      raymi sae list
      raymi sae list google/gemma-scope-2b-pt-res:layer_12
    """
    found = discover.scan(where, cache_dir=cache_dir)
    if as_json:
        click.echo(json.dumps([_found_record(sae) for sae in found], indent=2))
        return
    if not found:
        click.echo(f"No SAEs in {where or cache_dir or catalog.default_cache()}.", err=True)
        click.echo("`raymi sae fetch REPO:PATH` downloads one.", err=True)
        return
    width = terminal_width()
    header = ("SAE", "model", "site", "width", "architecture", "dtype", "format")
    usable = [sae.description for sae in found if sae.description]
    if usable:
        for line in table(header, [_cells(sae) for sae in usable], right=(3,), width=width):
            click.echo(line)
    refused = [sae for sae in found if sae.reason]
    if refused:
        click.echo("\nCannot be used:")
    for sae in refused:
        click.echo(fill(f"  {sae.source}: {sae.reason}", width or 10_000, subsequent_indent="    "))


@command.command()
@click.argument("where", type=SAE)
@cache_option
@_json_option
def inspect(where: str, cache_dir: Path | None, as_json: bool) -> None:
    """Show what one SAE computes and which tensors it has. Reads no weights.

    WHERE is a folder, a file in it, or repo[@revision][:path] in the cache.

    \b
    Example:
      raymi sae inspect demo/sae
    """
    about = discover.describe(where, cache_dir=cache_dir)
    if as_json:
        click.echo(json.dumps(record(about), indent=2))
        return
    facts = {
        "SAE": about.source,
        "format": about.format,
        "architecture": about.architecture + (f", k = {about.k}" if about.k else ""),
        "model": about.model_id or "not stated",
        "site": about.site or "not stated",
        "predicts": about.site_out or ("not stated" if about.transcoder else None),
        "head": about.head,
        "width": f"{about.d_in:,} -> {about.d_sae:,}" + (f" -> {about.d_out:,}" if about.transcoder else ""),
        "dtype": about.dtype,
        "input": _input(about),
        "texts": None if about.prepend_bos is None else f"begin with{'' if about.prepend_bos else 'out'} BOS",
        "file": about.file,
        "note": "; ".join(about.notes) or None,
    }
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name:<13} {value}")
    click.echo()
    for line in table(("tensor", "stored as", "shape", "dtype"), _tensor_rows(about), right=(), width=0):
        click.echo(line)


@command.command()
@click.argument("where")
@target_option
def fetch(where: str, cache_dir: Path | None) -> None:
    """Download one SAE, REPO[@REVISION]:PATH, into the Hugging Face cache, and nothing else of its repository.

    \b
    Example:
      raymi sae fetch \\
        google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82
    """
    about = discover.fetch(where, cache_dir=cache_dir)
    click.echo(f"{about.source}: {about.architecture}, {about.d_in:,} -> {about.d_sae:,}, at {about.site}")


@command.command()
@click.argument("saes", nargs=-1, required=True, metavar="SAE...", type=SAE)
@click.option(
    "--model", "models", multiple=True, metavar="ID", type=MODEL, help="Default: the one each SAE was trained on."
)
@click.option(
    "--measure",
    "measures",
    multiple=True,
    type=click.Choice(MEASURES),
    default=("quality",),
    show_default=True,
    help="quality: how well it reconstructs. features: what is active where. injection: what a feature does that is "
    "added. ablation: what each active feature does. Repeatable.",
)
@click.option(
    "--corpus", type=click.Path(path_type=Path), help="Texts for quality and features: JSONL, Parquet or text."
)
@click.option("--context", type=int, help="Tokens of a chunk of the corpus.  [default: 128]")
@click.option("--chunks", type=int, help="At most so many chunks, from the beginning of the corpus.")
@click.option("--prompt", help="A text to continue.")
@click.option("--answer", help="What should follow it, with its leading blank.")
@click.option("--set-of-prompts", "prompt_set", type=click.Choice(["capitals", "ioi"]), help="Prompts of raymi's own.")
@click.option("--feature", "features", multiple=True, type=int, metavar="N", help="What to inject. Repeatable.")
@click.option("--strength", "strengths", multiple=True, type=float, metavar="X", help="How much of it. Repeatable.")
@click.option("--skip-first", type=int, metavar="N", help="So many first tokens of every text do not count.")
@click.option("--device", help="auto, cpu, cuda or mps.")
@run_options
@click.pass_context
def run(ctx: click.Context, saes: tuple[str, ...], models: tuple[str, ...], device: str | None, **given: Any) -> int:
    """Measure SAEs on the model they belong to, and keep the rows in the store.

    An SAE is a folder, repo[@revision][:path] in the cache, or a pattern over `raymi sae list` such as 'org/*'. In
    place of SAEs, JOB.yaml runs a job file, as `raymi run` does. Either way the same command goes on where it stopped,
    and the exit codes are those of `raymi run`.

    \b
    Examples:
      raymi sae run ORG/SAE:PATH --corpus texts.jsonl --skip-first 1
      raymi sae run 'org/*-sae' --measure ablation --set-of-prompts capitals
      raymi sae run ORG/SAE:PATH --measure injection --feature 12 --strength 50 \\
        --prompt "The capital of France is"
      raymi sae run jobs/sae.yaml --dry-run
    """
    from raymi.cli.run import How, run_file, run_job

    how = How(**{name: given.pop(name) for name in How.__slots__})
    if any(Path(sae).suffix in (".yaml", ".yml") for sae in saes):
        _only_a_job(ctx, saes, given)
        return run_file(Path(saes[0]), how, models=models, device=device)
    data = Question(**given, device=device).data(saes, models or own_models(saes, how.cache_dir))
    return run_job(job_of(data), yaml.safe_dump(data, sort_keys=False), how)


def _only_a_job(ctx: click.Context, saes: Sequence[str], given: Mapping[str, Any]) -> None:
    """Whether nothing stands beside a job file that the file itself says."""
    if len(saes) > 1:
        raise UserError(f"found {' and '.join(saes)}; allowed: one job file, or SAEs")
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        if option.name in given and source is click.core.ParameterSource.COMMANDLINE:
            raise UserError(f"{option.opts[0]}: it is {saes[0]} that says what is measured")


def record(about: Description) -> dict[str, Any]:
    """A description as plain JSON values."""
    names = [name for name in about.__slots__ if name not in ("file", "tensors")]
    tensors = {name: stored.name for name, stored in about.tensors.items()}
    return {name: getattr(about, name) for name in names} | {"file": str(about.file), "tensors": tensors}


def _found_record(sae: Found) -> dict[str, Any]:
    about = record(sae.description) if sae.description else {"source": sae.source, "format": sae.format}
    return {**about, "reason": sae.reason}


def _cells(sae: Description) -> list[str]:
    model = (sae.model_id or "-").split("/")[-1]
    return [sae.source, model, sae.site or "-", count(sae.d_sae), sae.architecture, sae.dtype, sae.format]


def _input(about: Description) -> str | None:
    ways = [
        "without its mean over the width" if about.centred else "",
        f"normalised: {about.normalisation}" if about.normalisation != "none" else "",
        "decoder bias subtracted" if about.apply_b_dec_to_input else "",
        "heads joined" if about.heads_joined else "",
        "activations scaled by the decoder's norms" if about.rescale_by_decoder_norm else "",
    ]
    return ", ".join(way for way in ways if way) or None


def _tensor_rows(about: Description) -> list[list[str]]:
    found = {} if about.file.suffix == ".pt" else files.members(about.file)  # a pickle has no header
    rows: list[list[str]] = []
    for name, stored in about.tensors.items():
        member = found.get(stored.name)
        shape = member.shape if member else about.stored_shape(name)
        rows.append([name, stored.name, " x ".join(map(str, shape)) or "-", member.dtype if member else "-"])
    return rows
