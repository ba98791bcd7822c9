"""How well autoencoders reconstruct, and what the model makes of the reconstruction, as sums that merge.

Legend: B texts, T positions, N tokens that count, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.features import active
from raymi.experiments.sae.spec import QUALITY
from raymi.experiments.sae.texts import Task, clean, counting, ids_of, in_batches, read_counted, written, zeroed
from raymi.model.hooked import NotFinite
from raymi.model.restart import Restart
from raymi.model.sites import NoSuchPlace
from raymi.model.sizes import UNEMBEDDED
from raymi.prompts import TokenizedPrompt
from raymi.sae.evaluate import DEFINITIONS, Downstream, Predictions, Reconstruction, columns, following, reconstruction


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one autoencoder."""

    texts: int
    reconstruction: Reconstruction
    downstream: Downstream

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.texts + other.texts,
            self.reconstruction + other.reconstruction,
            self.downstream + other.downstream,
        )


@dataclass(slots=True)
class _Other:
    """What the model unembeds in another forward than the clean one: [N, D], or [1, D] where it is the same for all."""

    hidden_ND: Tensor
    loss: float = 0.0
    divergence: float = 0.0

    @property
    def sums(self) -> tuple[float, float]:
        return self.loss, self.divergence


def quality(task: Task) -> pa.Table:
    """Rows of table `sae_quality`, one an autoencoder."""
    sums: dict[SaeRef, _Sums] = {}
    for refs, texts in task.groups():
        sites = {site for ref in refs for site in (ref.site, ref.written)}
        kept = len(sites) + 2 * len(refs) + 2
        for found in in_batches(task.engine, texts, kept, partial(_measure, task, refs)):
            for ref, more in found.items():
                sums[ref] = sums[ref] + more if ref in sums else more
    return pa.Table.from_pylist([_row(task, ref, of_ref) for ref, of_ref in sums.items()], schema=QUALITY)


def _row(task: Task, ref: SaeRef, sums: _Sums) -> dict[str, Any]:
    row: dict[str, Any] = {
        **task.about(ref),
        "skipped": str(task.spec.skip),
        "definitions": DEFINITIONS,
        "engine": "layers" if task.layers else "full",
        "texts": sums.texts,
        **columns(sums.reconstruction),
        **columns(sums.downstream),
    }
    numbers = torch.tensor([value for value in row.values() if isinstance(value, float)], dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise NotFinite(f"{task.engine.model.name}: NaN or infinity in what {ref.name} reconstructs")
    return row


def _measure(task: Task, refs: Sequence[SaeRef], texts: Sequence[TokenizedPrompt]) -> dict[SaeRef, _Sums]:
    """One clean forward for all autoencoders, one from the site on for each, and one for each site without anything."""
    ids_BT = ids_of(texts).to(task.engine.model.device)
    counts_BT = counting(task.spec, ids_BT.cpu(), task.special).to(ids_BT.device)
    run = clean(task, refs, ids_BT, stop=False)
    text_N = counts_BT.nonzero()[:, 0]
    sums: dict[SaeRef, Reconstruction] = {}
    spliced: dict[SaeRef, _Other] = {}
    ablated: dict[tuple[str, int | None], _Other] = {}
    for ref in refs:
        sums[ref], out_NO = _reconstructed(task, ref, run, counts_BT, text_N)
        if not len(text_N):
            continue
        sae, at = task.saes(ref), run.sites[ref.written]
        hidden_BTD = _again(task, run, ref, written(sae, at, counts_BT, out_NO), counts_BT)
        spliced[ref] = _Other(hidden_BTD[counts_BT])
        if _place(task, ref) not in ablated:
            ablated[_place(task, ref)] = _Other(_without(task, run, ref, ids_BT, counts_BT))
    further = _compare(run, counts_BT, following(ids_BT), [*spliced.values(), *ablated.values()])
    return {
        ref: _Sums(
            len(texts),
            sums[ref],
            further.beside(spliced[ref].sums, ablated[_place(task, ref)].sums) if spliced else further,
        )
        for ref in refs
    }


def _reconstructed(
    task: Task, ref: SaeRef, run: Restart, counts_BT: Tensor, text_N: Tensor
) -> tuple[Reconstruction, Tensor]:
    """The sums of what an autoencoder makes of the tokens that count, and what it makes, [N, O]."""
    sae, found = task.saes(ref), active(task, ref, run, counts_BT)
    out_NO = sae.reconstruct(read_counted(task, ref, ref.site, run, counts_BT), found)
    target_NO = read_counted(task, ref, ref.written, run, counts_BT)
    if not sae.about.centred_out:
        return reconstruction(target_NO, out_NO, found, text_N), out_NO
    # Metrics are of what it was trained on; the model gets back what is not in that.
    mean_N1 = target_NO.to(out_NO).mean(-1, keepdim=True)
    out_NO = out_NO + mean_N1 if sae.about.transcoder else out_NO
    return reconstruction(target_NO.to(out_NO) - mean_N1, out_NO - mean_N1, found, text_N), out_NO


def _again(task: Task, run: Restart, ref: SaeRef, value: Tensor, counts_BT: Tensor | None) -> Tensor:
    try:
        return run.again(ref.written, value, counts_BT)
    except NoSuchPlace as error:
        raise NoSuchPlace(f"{ref.name} cannot be spliced in at {ref.written}: {error}") from error


# -- zero ablation -----------------------------------------------------------------------------------------------------


def _place(task: Task, ref: SaeRef) -> tuple[str, int | None]:
    """Where an autoencoder writes; zero ablations of one place are the same."""
    return ref.written, task.saes(ref).about.head


def _without(task: Task, run: Restart, ref: SaeRef, ids_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """What the model unembeds when a site is zero everywhere: [N, D], or [1, D] where no text makes a difference.

    Where the whole residual stream is zero, nothing is left of the text. That is seen, not taken for granted: all rows
    and positions come out alike though their tokens are not. Then it is measured once for a model and a site.
    """
    kept, place = task.engine.baselines, _place(task, ref)
    if place not in kept:
        hidden_BTD = _again(task, run, ref, zeroed(task.saes(ref), run.sites[ref.written]), None)
        if not _alike(hidden_BTD) or len(ids_BT.unique()) < 2:
            return hidden_BTD[counts_BT]
        kept[place] = hidden_BTD[0, :1].clone()
    return kept[place]


def _alike(hidden_BTD: Tensor) -> bool:
    # Rows of one product may round differently by where they stand in it.
    tolerance = min(100 * torch.finfo(hidden_BTD.dtype).eps, 2e-2)
    off = (hidden_BTD - hidden_BTD[:1, :1]).abs().max()
    return bool(off <= tolerance * hidden_BTD.abs().max())


# -- the model's output ------------------------------------------------------------------------------------------------


def _compare(run: Restart, counts_BT: Tensor, next_BT: Tensor, others: Sequence[_Other]) -> Downstream:
    """Adds losses and divergences to `others`, and returns what is the clean model's own, in slices of positions.

    Logits are the largest tensors by far, so none are kept; clean ones are made once for all that is compared.
    """
    clean_ND, next_N, total = run.hidden_BTD[counts_BT], next_BT[counts_BT], Downstream()
    step = _positions_at_once(run)
    same = {id(other): run.unembed(other.hidden_ND) for other in others if len(other.hidden_ND) == 1 < len(clean_ND)}
    for begin in range(0, len(clean_ND), step):
        rows = slice(begin, begin + step)
        predictions = Predictions(run.unembed(clean_ND[rows]), next_N[rows])
        total += predictions.clean
        for other in others:
            logits = same[id(other)] if id(other) in same else run.unembed(other.hidden_ND[rows])
            loss, divergence = predictions.compared(logits)
            other.loss, other.divergence = other.loss + loss, other.divergence + divergence
    return total


def _positions_at_once(run: Restart) -> int:
    return max(1, UNEMBEDDED["cpu" if run.model.device.type == "cpu" else "gpu"] // run.model.vocab_size)
