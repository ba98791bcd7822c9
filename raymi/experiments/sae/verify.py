"""A second opinion on a few measurements: full forwards by the family's own eager attention.

What is changed in them is changed at places that are found a second time, by `raymi.model.elsewhere`: a wrong place is
no opinion that two forwards share.

Legend: T positions, N tokens that count, V vocabulary, O width of what is written.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.kind import Work
from raymi.experiments.sae.cells import Change, active_in, injected, name, without
from raymi.experiments.sae.spec import Injection, SaeSpec, cell_id
from raymi.experiments.sae.texts import Task, clean, counting, ids_of, read, written
from raymi.experiments.verifying import beside_full, beside_truth, is_beside_truth, judge, of_verdict
from raymi.model.elsewhere import elsewhere
from raymi.model.engine import Engine
from raymi.model.full import Batch, Way
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import BY_HEAD, replace
from raymi.model.proof import Truth
from raymi.model.sites import Site, parse
from raymi.model.truth import in_float32
from raymi.prompts import TokenizedPrompt
from raymi.sae import SAE, Sparse

Drawn = Sequence[tuple[SaeSpec, TokenizedPrompt, Work]]

_SAME = 1e-3, 5e-2
"""Relative differences of an activation, in float32 and in half precision, that may be noise."""


class _Opinions(NamedTuple):
    """Of one measurement."""

    name: str
    found: dict[str, Any]
    """Fields of the record."""


def verify(
    engine: Engine,
    drawn: Drawn,
    saes: Callable[[SaeRef], SAE],
    *,
    special: frozenset[int],
    model_id: str,
    revision: str,
) -> list[dict[str, Any]]:
    """Measure both ways: an injection's logits, and those of every token that counts with an autoencoder spliced in.

    Of `ablation` one feature that is active is also taken out both ways, and has a record of its own.

    Args:
        engine: the model, and the way it is measured.
        drawn: which measurements, each with its experiment.
        saes: opens an autoencoder, or has it open.
        special: ids of the tokens that `skip.special` leaves out.
        model_id: written into the records.
        revision: written into the records.

    Returns:
        Records of table `verifications`, in the order of `drawn`; differences and effects in logits. A text of which no
        token counts has none.
    """
    records: list[dict[str, Any]] = []
    for spec, prompt, work in drawn:
        items = ((prompt.prompt.id, (work,)),)
        prompts = {prompt.prompt.id: prompt}
        task = Task(engine, spec, "", items, prompts, saes, special, model_id, revision, "", 0)
        for each in _opinions(task, prompt, work):
            records.append(
                {
                    "ablation_id": each.name,
                    "model_id": model_id,
                    "revision": revision,
                    "prompt_id": prompt.prompt.id,
                    **each.found,
                }
            )
    return records


def _opinions(task: Task, prompt: TokenizedPrompt, work: Work) -> Iterator[_Opinions]:
    if isinstance(work, Injection):
        yield _of_change(task, injected(task.engine.model, prompt, work, task.saes(work.sae)))
        return
    assert isinstance(work, SaeRef)
    yield from _of_splice(task, prompt, work)
    if task.spec.measure == "ablation":
        [found] = active_in(task, [work], [prompt])
        if found.features:
            yield _of_change(
                task,
                without(task, found, Random(f"{found.sae.name} {prompt.prompt.id}").randrange(len(found.features))),
            )


def _of_change(task: Task, change: Change) -> _Opinions:
    """A single feature added or taken out: the cone against a full forward."""
    assert change.edit is not None
    ids_1T, cell = ids_of([change.prompt]), Cell(0, (change.edit,))
    [batch] = task.engine.ablations(ids_1T, [cell])
    with elsewhere(task.engine.model, ids_1T, [change.edit.layer], by_head=change.edit.site == BY_HEAD):
        return _Opinions(name(task.model_id, change), _beside(task, ids_1T, cell, batch))


def _beside(task: Task, ids_1T: Tensor, cell: Cell, batch: Batch) -> dict[str, Any]:
    if is_beside_truth(task.engine):
        return beside_truth(task.engine, ids_1T, cell, batch, 0)
    full_V, clean_V = (
        task.engine.model.forward(ids_1T, [its], own_attention=True).logits_BV[0] for its in (cell.interventions, ())
    )
    return beside_full(task.engine, batch.ablated_AV[0], full_V, clean_V, batch.way)


# -- an autoencoder spliced in -----------------------------------------------------------------------------------------


def _of_splice(task: Task, prompt: TokenizedPrompt, ref: SaeRef) -> Iterator[_Opinions]:
    """An autoencoder in the model's way wherever tokens count: going on from its site against two full forwards.

    The second of these has in it what the autoencoder makes of the first one's activations.
    """
    model, sae, ids_1T = task.engine.model, task.saes(ref), ids_of([prompt])
    counts_1T = counting(task.spec, ids_1T, task.special).to(model.device)
    if not bool(counts_1T.any()):
        return
    run = clean(task, [ref], ids_1T, stop=False)
    x_ND = read(sae, run.sites[ref.site])[counts_1T]
    out_NO = sae.reconstruct(x_ND)
    value = written(sae, run.sites[ref.written], counts_1T, out_NO)
    first_NV = run.unembed(run.again(ref.written, value, counts_1T)[counts_1T])

    def second() -> tuple[Tensor, Tensor]:
        """Clean and spliced, [N, V]."""
        own = _captured(task, ref, ids_1T)
        clean_NV = model.predictions(ids_1T, [()], own_attention=True)[counts_1T]
        own_NO = _out(sae, read(sae, own[ref.site])[counts_1T], x_ND, out_NO)
        value = written(sae, own[ref.written], counts_1T, own_NO)
        return clean_NV, _spliced(model, ids_1T, ref, value, counts_1T, own)

    way: Way = "layers" if task.layers else "full"
    places = [parse(site, model.n_layers).layer for site in (ref.site, ref.written)]
    by_head = any(site.endswith(BY_HEAD) for site in (ref.site, ref.written))
    with elsewhere(model, ids_1T, [layer for layer in places if layer is not None], by_head=by_head):
        if is_beside_truth(task.engine):
            with in_float32(model):
                true = second()
            truth = Truth(*true, *second())
            first_clean_NV = run.unembed(run.hidden_BTD[counts_1T])
            found = of_verdict(judge(task.engine, truth, first_NV - first_clean_NV, way), truth, way)
        else:
            clean_NV, second_NV = second()
            found = beside_full(task.engine, first_NV, second_NV, clean_NV, way)
    yield _Opinions(cell_id(task.model_id, prompt.token_ids, ref, ["splice", str(task.spec.skip)]), found)


def _captured(task: Task, ref: SaeRef, ids_1T: Tensor) -> dict[str, Tensor]:
    """What a full forward by the family's own attention has at an autoencoder's sites."""
    model, sites = task.engine.model, {ref.site, ref.written}
    at = parse(ref.written, model.n_layers)
    if at.name == "hook_resid_mid":
        sites.add(str(Site(at.layer, "hook_resid_pre")))
    return model.forward(ids_1T, capture=sorted(sites), own_attention=True).cache


def _out(sae: SAE, own_ND: Tensor, x_ND: Tensor, out_NO: Tensor) -> Tensor:
    """What an autoencoder makes of the full forward's own activations, [N, O].

    A feature at its threshold, or among the largest by a hair, may be active in one forward and not in the other: a
    jump that is no mistake of either. At such tokens, if their activations are equal but for noise, the other forward's
    output is taken, so that the rest can be compared.
    """
    own, other = sae.encode_sparse(own_ND), sae.encode_sparse(x_ND)
    # Of what is measured: the other forward may be the truth of half precision, which is in float32.
    same = _SAME[0] if x_ND.dtype in (torch.float32, torch.float64) else _SAME[1]
    alike_N = (own_ND - x_ND).float().norm(dim=-1) <= same * x_ND.float().norm(dim=-1)
    jumped_N = torch.zeros_like(alike_N)
    for one, two in ((own, other), (other, own)):
        jumped_N[one.rows[torch.isin(_entries(one), _entries(two), invert=True)]] = True
    return torch.where((alike_N & jumped_N)[:, None], out_NO, sae.reconstruct(own_ND, own))


def _entries(features: Sparse) -> Tensor:
    return features.rows * features.shape[-1] + features.indices


def _spliced(
    model: HookedModel, ids_1T: Tensor, ref: SaeRef, value: Tensor, counts_1T: Tensor, own: dict[str, Tensor]
) -> Tensor:
    """Logits of the tokens that count, [N, V], of a full forward with a value at a site where tokens count."""
    site, positions = parse(ref.written, model.n_layers), tuple(counts_1T[0].nonzero()[:, 0].tolist())
    if site.layer is None:
        # No intervention reaches the embedding.
        handle = model.model.get_input_embeddings().register_forward_hook(lambda *_: value)
        try:
            return model.predictions(ids_1T, [()], own_attention=True)[counts_1T]
        finally:
            handle.remove()
    name, value_TX = site.name, value[0]
    if name == "hook_resid_mid":
        name, value_TX = "hook_attn_out", value_TX - own[str(Site(site.layer, "hook_resid_pre"))][0]
    edit = replace(site.layer, name, positions, value_TX[list(positions)])
    return model.predictions(ids_1T, [(edit,)], own_attention=True)[counts_1T]
