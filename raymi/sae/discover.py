"""Which autoencoders there are in a cache or a folder, read from configs and headers. No torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from raymi.errors import UserError
from raymi.hubid import why_none
from raymi.sae.description import MLP_INPUT, NORMALISED, Description, Normalisation
from raymi.sae.formats import recognise
from raymi.sae.source import Source, cached, locate, repositories


@dataclass(frozen=True, slots=True)
class Found:
    """An autoencoder in a cache: what it is, or why it cannot be used."""

    source: str
    """What `load` is given to open it."""
    format: str
    description: Description | None
    reason: str | None = None


def scan(where: str | Path | None = None, *, cache_dir: Path | None = None) -> list[Found]:
    """Every autoencoder in the cache, or in one folder or repository, in the order of their names.

    Args:
        where: a folder or `repo[@revision][:path]`; None for the whole cache.
        cache_dir: the cache; by default the one HF_HOME names.

    Raises:
        UserError: when there is no such folder or repository.
    """
    if where is not None:
        return [_found(source) for source in _below(locate(where, cache_dir=cache_dir))]
    found: list[Found] = []
    for repo in repositories(cache_dir):
        try:
            root = cached(repo, cache_dir=cache_dir)
        except UserError:
            continue  # an interrupted download; `raymi models` is the place to say so
        found += [_found(source) for source in _below(root)]
    return found


def describe(
    where: str | Path,
    *,
    cache_dir: Path | None = None,
    site: str | None = None,
    site_out: str | None = None,
    model_id: str | None = None,
    input_scale: float | None = None,
) -> Description:
    """Describes the one autoencoder at a place.

    Args:
        where: a folder, a file in it, or `repo[@revision][:path]` in the cache.
        cache_dir: the cache; by default the one HF_HOME names.
        site: the hook point it belongs to, where its files do not say.
        site_out: the one that a transcoder predicts, where its files do not say.
        model_id: the model it belongs to, where its files do not say.
        input_scale: what its inputs are multiplied with, where it normalises them by an average that no file states.

    Raises:
        UserError: when there is none, or several, or when raymi does not know what it computes; or `site_out` is given
            for what its files know as an autoencoder.
    """
    place = locate(where, cache_dir=cache_dir)
    form = recognise(place)
    if form is None and str(where).endswith(".safetensors"):  # Llama Scope has its weights in a folder of their own
        place = place.above
        form = recognise(place)
    if form is None:
        place = _only(place, str(where))
        form = recognise(place)
    file = form.file(place) if form else None
    if form is None or file is None:
        raise UserError(f"{place}: there is no SAE")
    about = form.describe(place, file)
    return _scaled(replace(placed(about, site, site_out), model_id=model_id or about.model_id), input_scale)


def placed(about: Description, site: str | None, site_out: str | None) -> Description:
    """The same where a user says that it belongs; what is named is meant as it is called.

    But for what reads modules: no module gives what is called `ln2.hook_normalized`, which once was a name of what the
    MLP is given.
    """
    if site is None and site_out is None:
        return about
    if site_out is not None and about.site is not None and not about.transcoder:
        raise UserError(f"{about.file}: `site_out` is for a transcoder, and this SAE writes where it reads")
    if about.of_modules and site is not None:
        site = site.replace(NORMALISED, MLP_INPUT)
    return replace(
        about,
        site=site or about.site,
        site_out=site_out or about.site_out,
        of_modules=about.of_modules and site is None and site_out is None,
        of_lens=about.of_lens and site is None,
    )


def fetch(where: str, *, cache_dir: Path | None = None) -> Description:
    """Downloads one autoencoder of a repository into the cache, and nothing else of it. Shows progress on stderr.

    Args:
        where: `repo[@revision]:path`.
        cache_dir: where to; by default the cache HF_HOME names.

    Raises:
        UserError: when it cannot be had, or what comes is no autoencoder that raymi knows.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's, or httpx2's from 2 on

    place, _, path = where.partition(":")
    repo, _, revision = place.partition("@")
    path = path.strip("/")
    if hint := why_none(place):
        raise UserError(f"{where} names no repository", hint=f"{hint} Allowed: REPO[@REVISION]:PATH.")
    wanted = [f"{path}/*", path, "config.json"] if path else None
    try:
        snapshot_download(repo, revision=revision or None, cache_dir=cache_dir, allow_patterns=wanted)
    except (HTTPError, OSError, ValueError) as error:
        # Never quote the error itself: it may hold what must not be shown.
        raise UserError(
            f"{where} cannot be fetched ({type(error).__name__})", hint="Check the id and the network."
        ) from None
    return describe(where, cache_dir=cache_dir)


def _below(source: Source) -> Iterator[Source]:
    """The folders at and below one that hold an autoencoder, in the order of their names."""
    for folder, folders, _ in os.walk(source.folder):
        folders.sort()
        here = source.below(Path(folder).relative_to(source.folder).as_posix())
        if recognise(here):
            folders.clear()
            yield here


def _found(source: Source) -> Found:
    form = recognise(source)
    file = form.file(source) if form else None
    if form is None or file is None:
        raise AssertionError(f"{source} was recognised before")
    try:
        return Found(str(source), form.name, form.describe(source, file))
    except UserError as error:
        return Found(str(source), form.name, None, error.what)


def _only(place: Source, where: str) -> Source:
    """The one autoencoder below a place."""
    sources = {str(source): source for source in _below(place)}
    if len(sources) == 1:
        return next(iter(sources.values()))
    if not sources:
        raise UserError(
            f"{where}: there is no SAE in a format that raymi knows",
            hint="`raymi sae list` shows the SAEs in the cache.",
        )
    near = get_close_matches(where, list(sources), n=3, cutoff=0.0)
    raise UserError(f"{where}: there are {len(sources)} SAEs", hint=f"Name one, such as {' or '.join(near)}.")


def _scaled(about: Description, input_scale: float | None) -> Description:
    normalisation: Normalisation = about.normalisation
    if normalisation != "expected_average_only_in":
        if input_scale is not None:
            raise UserError(f"{about.file}: inputs are not scaled by an average norm, so there is no `input_scale`")
        return about
    if input_scale is not None:
        return replace(about, input_scale=input_scale, output_scale=input_scale)
    return about
