"""What a shell completes on the tab key: models and autoencoders of the cache, and runs of the store.

Nothing that goes wrong is said: a person is typing.
"""

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem


class _Names(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic from click 8.3 on
    """Text that is completed by what there is."""

    def __init__(self, name: str, find: Callable[[click.Context], Iterable[str]]) -> None:
        self.name, self._find = name, find

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(found) for found in self._find(ctx) if found.startswith(incomplete)]
        except Exception:
            return []

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


def _models(ctx: click.Context) -> Iterable[str]:
    from raymi import catalog

    return [model.id for model in catalog.scan(ctx.params.get("cache_dir"))]


def _saes(ctx: click.Context) -> Iterable[str]:
    from raymi.sae import discover

    return [found.source for found in discover.scan(cache_dir=ctx.params.get("cache_dir")) if not found.reason]


def _runs(ctx: click.Context) -> Iterable[str]:
    import raymi.store

    return [run.run for run in raymi.store.open(ctx.params.get("store_uri") or raymi.store.DEFAULT).runs()]


MODEL = _Names("model", _models)
SAE = _Names("sae", _saes)
RUN = _Names("run", _runs)
