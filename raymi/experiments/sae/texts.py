"""The texts of a unit, as many at a time as memory allows, and what autoencoders read and write in them.

Legend: B texts, T positions, N tokens that count, D width of a site, H heads, W head width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.spec import SaeSpec
from raymi.model import memory
from raymi.model.engine import Engine, OutOfMemory, Way
from raymi.model.hooked import NotFinite
from raymi.model.restart import Restart
from raymi.model.sizes import rows_per_batch
from raymi.prompts import TokenizedPrompt
from raymi.sae import SAE

Found = TypeVar("Found")

_SHARE = 0.2
"""Of the free memory, what is kept of a batch beside its forward may take so much."""


@dataclass(frozen=True, slots=True)
class Task:
    """A unit, and all that is needed to measure it."""

    engine: Engine
    spec: SaeSpec
    unit_id: str
    items: Sequence[tuple[str, Sequence[object]]]
    """(prompt id, what is done with its text: autoencoders or injections), texts of one length."""
    prompts: Mapping[str, TokenizedPrompt]
    saes: Callable[[SaeRef], SAE]
    special: frozenset[int]
    model_id: str
    revision: str
    dtype: str
    top_k: int

    @property
    def layers(self) -> bool:
        """Whether layers below a site may be left out."""
        return self.engine.way != "full"

    def groups(self) -> Iterator[tuple[tuple[SaeRef, ...], list[TokenizedPrompt]]]:
        """The texts that the same autoencoders read, in the unit's order: all, but for those where a unit is cut."""
        for refs, items in groupby(self.items, lambda item: item[1]):
            yield tuple(ref for ref in refs if isinstance(ref, SaeRef)), [self.prompts[id] for id, _ in items]

    def about(self, sae: SaeRef) -> dict[str, Any]:
        """The columns that say what a row is of."""
        return {
            "unit_id": self.unit_id,
            "experiment": self.spec.name,
            "model_id": self.model_id,
            "revision": self.revision,
            "dtype": self.dtype,
            "sae": sae.name,
            "sae_version": sae.version,
            "site": sae.site,
            "bos_differs": None if sae.prepend_bos is None else sae.prepend_bos != self._begins_with_bos,
        }

    @property
    def _begins_with_bos(self) -> bool:
        return self.prompts[self.items[0][0]].bos


def ids_of(texts: Sequence[TokenizedPrompt]) -> Tensor:
    """Token ids of texts of one length, int64 [B, T]."""
    return torch.tensor([text.token_ids for text in texts])


def counting(spec: SaeSpec, ids_BT: Tensor, special: frozenset[int]) -> Tensor:
    """Which tokens count, bool [B, T]."""
    counts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if spec.skip.special:
        counts_BT &= torch.isin(ids_BT, torch.tensor(sorted(special), dtype=torch.int64), invert=True)
    counts_BT[:, : spec.skip.first] = False
    return counts_BT


def in_batches(
    engine: Engine, texts: Sequence[TokenizedPrompt], kept: int, measure: Callable[[Sequence[TokenizedPrompt]], Found]
) -> Iterator[Found]:
    """Measure texts of one length, as many at a time as fit; half as many whenever memory runs out.

    Args:
        engine: whose limits are kept to, and made narrower.
        texts: of one length.
        kept: activations of the width of the residual stream that are kept of every position beside its forward.
        measure: what is done with some of them; done again with fewer when it runs out of memory.

    Raises:
        OutOfMemory: when a single text does not fit.
    """
    start, n_tokens, model = 0, len(texts[0].token_ids), engine.model
    key: tuple[Way, int, int] = (engine.way, n_tokens, n_tokens)
    free = memory.available(model.device)
    most = min(
        rows_per_batch(model.shape, n_tokens, n_tokens, model.device.type, free),
        engine.limits.get(key, len(texts)),
        max(1, int(_SHARE * free) // (4 * n_tokens * model.hidden_size * max(1, kept))),
    )
    while start < len(texts):
        chosen = texts[start : start + most]
        try:
            found = measure(chosen)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            if len(chosen) == 1:
                message = f"{model.name}: one text of {n_tokens} tokens does not fit into memory ({error})"
                raise OutOfMemory(message) from error
            most = len(chosen) // 2
            engine.limits[key] = max(2, most)
            memory.empty_cache(model.device)
            continue
        start += len(chosen)
        yield found


def clean(task: Task, refs: Sequence[SaeRef], ids_BT: Tensor, *, stop: bool) -> Restart:
    """One clean forward that keeps what all these autoencoders read and write."""
    sites = sorted({site for ref in refs for site in (ref.site, ref.written)})
    return Restart(task.engine.model, ids_BT, sites, layers=task.layers, stop=stop)


def read(sae: SAE, site_BTD: Tensor) -> Tensor:
    """A site as an autoencoder sees it, [B, T, D]: z of one head, or of all heads one after the other."""
    if site_BTD.dim() == 3:
        return site_BTD
    return site_BTD.flatten(-2) if sae.about.head is None else site_BTD[:, :, sae.about.head]


def read_counted(task: Task, ref: SaeRef, site: str, clean: Restart, counts_BT: Tensor) -> Tensor:
    """The same at the tokens that count, [N, D].

    Raises:
        NotFinite: naming autoencoder and site.
    """
    x_ND = read(task.saes(ref), clean.sites[site])[counts_BT.to(clean.sites[site].device)]
    if not bool(x_ND.sum(dtype=torch.float32).isfinite()):
        raise NotFinite(f"{task.engine.model.name}: NaN or infinity at {site}, which {ref.name} reads")
    return x_ND


def written(sae: SAE, site_BTD: Tensor, counts_BT: Tensor, out_NO: Tensor) -> Tensor:
    """The site with an autoencoder's output where a token counts, in the site's own shape; a new tensor."""
    value = site_BTD.clone(memory_format=torch.contiguous_format)
    read(sae, value)[counts_BT] = out_NO.to(value)  # what is read is a view of it
    return value


def zeroed(sae: SAE, site_BTD: Tensor) -> Tensor:
    """The site with zeros in place of all that an autoencoder writes there, at every position."""
    value = site_BTD.clone(memory_format=torch.contiguous_format)
    read(sae, value).zero_()
    return value
