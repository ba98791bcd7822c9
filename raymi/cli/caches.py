"""Which Hugging Face cache a command works on: the one that is named, the user's own, or the demo's."""

from pathlib import Path

import click


def usual(ctx: click.Context, _option: click.Parameter, given: Path | None) -> Path | None:
    """A callback of click: the cache that is named; the demo's, where there is one and the user's own has nothing.

    On a cluster every node has a cache of its own, of which nothing is known here.
    """
    from raymi import catalog

    if given is not None or ctx.params.get("address"):
        return given
    demo = catalog.demo_cache()
    if _has_models(catalog.default_cache()) or not _has_models(demo):
        return None
    if not ctx.resilient_parsing:  # completion asks in silence
        click.echo(f"your own cache has no models, so these are the demo's, in {demo}", err=True)
    return demo


def _has_models(cache: Path) -> bool:
    return any(cache.glob("models--*"))
