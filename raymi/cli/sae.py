"""`raymi sae`: the sparse autoencoders in the cache, and one of them more closely."""

import json
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from raymi import catalog
from raymi.cli.text import count, table, terminal_width
from raymi.sae import discover, files
from raymi.sae.description import Description
from raymi.sae.discover import Found

_cache_option = click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="The cache, in place of the one HF_HOME names."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@click.group()
def command() -> None:
    """Sparse autoencoders: what there is, and what it computes."""


@command.command("list")
@click.argument("where", required=False)
@_cache_option
@_json_option
def list_(where: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """List the SAEs in the Hugging Face cache, or in WHERE: a folder, or repo[@revision][:path]."""
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
@click.argument("where")
@_cache_option
@_json_option
def inspect(where: str, cache_dir: Path | None, as_json: bool) -> None:
    """Show what one SAE computes and which tensors it has. Reads no weights.

    WHERE is a folder, a file in it, or repo[@revision][:path] in the cache.
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
        "predicts": about.site_out,
        "head": about.head,
        "width": f"{about.d_in:,} -> {about.d_sae:,}" + (f" -> {about.d_out:,}" if about.transcoder else ""),
        "dtype": about.dtype,
        "input": _input(about),
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
@_cache_option
def fetch(where: str, cache_dir: Path | None) -> None:
    """Download one SAE, REPO[@REVISION]:PATH, into the Hugging Face cache, and nothing else of its repository."""
    about = discover.fetch(where, cache_dir=cache_dir)
    click.echo(f"{about.source}: {about.architecture}, {about.d_in:,} -> {about.d_sae:,}, at {about.site}")


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
