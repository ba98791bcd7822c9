"""Single features added or taken out, through the causal cone, and the rows that say what that did.

Legend: B texts, P positions, N tokens that count, O width of what is written, H heads, W head width, M entries.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.effects import Columns, in_order, measure
from raymi.experiments.sae.features import active
from raymi.experiments.sae.spec import ABLATIONS, INJECTIONS, Injection, cell_id
from raymi.experiments.sae.texts import Task, clean, counting, ids_of, in_batches, read
from raymi.model.editing import place
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import EDITABLE, Edit, add
from raymi.model.restart import Restart
from raymi.model.sites import NoSuchPlace
from raymi.prompts import TokenizedPrompt
from raymi.sae import SAE

_NUMBERS = 1 << 26
"""Of vectors to add that are held at a time: features of a long prompt are many, at many positions each."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One row to measure."""

    prompt: TokenizedPrompt
    sae: SaeRef
    feature: int | None
    edit: Edit | None
    """None where there is nothing to change, and a row that says so."""
    what: Sequence[Any]
    """What makes it this one, beside prompt and autoencoder."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Those that only its own table has."""


# -- injections --------------------------------------------------------------------------------------------------------


def injections(task: Task) -> pa.Table:
    """Rows of table `sae_injections`, in the unit's order."""
    changes = (
        injected(task.engine.model, task.prompts[prompt_id], work, task.saes(work.sae))
        for prompt_id, its in task.items
        for work in its
        if isinstance(work, Injection)
    )
    return pa.concat_tables([_measured(task, part, INJECTIONS) for part in _parts(changes)])


def injected(model: HookedModel, prompt: TokenizedPrompt, work: Injection, sae: SAE) -> Change:
    """An injection as something to measure: strength x decoder vector is added.

    Raises:
        UserError: where the model cannot be written to; names autoencoder and site.
    """
    vector_O = work.strength * sae.decoder_vector(work.feature)
    return Change(
        prompt,
        work.sae,
        work.feature,
        added(model, work.sae, sae, work.positions, vector_O),
        ["injection", work.feature, work.strength, work.positions],
        {"strength": work.strength},
    )


def added(model: HookedModel, ref: SaeRef, sae: SAE, positions: tuple[int, ...], vector: Tensor) -> Edit:
    """What adds to the site that an autoencoder writes.

    Args:
        model: the model.
        ref: the autoencoder.
        sae: the same, opened.
        positions: where.
        vector: [O], or [P, O] for each position its own.

    Raises:
        UserError: where that site of the model cannot be written to; names autoencoder and site.
    """
    layer, site = _writable(model, ref)
    # What is added to the residual stream between attention and MLP is added to it by the attention.
    site = "hook_attn_out" if site == "hook_resid_mid" else site
    if site != "attn.hook_z":
        return add(layer, site, positions, vector)
    if sae.about.head is None:
        return add(layer, site, positions, vector.unflatten(-1, (model.heads(layer), -1)))
    return add(layer, site, positions, vector[..., None, :], (sae.about.head,))


def _writable(model: HookedModel, ref: SaeRef) -> tuple[int, str]:
    """Layer and name of the site that an autoencoder writes."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", ref.written)
    try:
        if match is None or match[2] not in (*EDITABLE, "hook_resid_mid"):
            raise NoSuchPlace("nothing can be added there")
        layer, site = int(match[1]), match[2]
        if not layer < model.n_layers:
            raise NoSuchPlace(f"its layers are 0 to {model.n_layers - 1}")
        place(model.blocks[layer], site)
        if site == "hook_resid_mid":
            place(model.blocks[layer], "hook_attn_out")
    except NoSuchPlace as error:
        raise UserError(
            f"{ref.name} writes at {ref.written}, where features can neither be added nor taken out "
            f"in {model.name}: {error}",
            hint="`features` and `quality` can be measured with it." if ref.site_out is None else None,
        ) from error
    return layer, site


# -- ablations ---------------------------------------------------------------------------------------------------------


def ablations(task: Task) -> pa.Table:
    """Rows of table `sae_ablations`, by text, autoencoder and feature."""
    tables: list[pa.Table] = []
    for refs, texts in task.groups():
        for ref in refs:
            _writable(task.engine.model, ref)
        n_sites = len({ref.site for ref in refs})
        for of_texts in in_batches(task.engine, texts, n_sites, partial(active_in, task, refs)):
            changes = (change for each in of_texts for change in _without(task, each))
            tables += [_measured(task, part, ABLATIONS) for part in _parts(changes)]
    return pa.concat_tables(tables)


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """What one autoencoder finds active in one text."""

    prompt: TokenizedPrompt
    sae: SaeRef
    x_TD: Tensor
    """What it reads."""
    features: tuple[tuple[int, tuple[int, ...], Tensor], ...]
    """Every active feature, ascending: where it is, and its activations there, [P]."""


def active_in(task: Task, refs: Sequence[SaeRef], texts: Sequence[TokenizedPrompt]) -> list[Active]:
    """What autoencoders find active at the tokens of texts of one length that count, by text and autoencoder."""
    ids_BT = ids_of(texts)
    counts_BT = counting(task.spec, ids_BT, task.special)
    run = clean(task, refs, ids_BT, stop=True)
    by_sae = [_active_in(task, ref, texts, run, counts_BT) for ref in refs]
    return [each for of_text in zip(*by_sae, strict=True) for each in of_text]


def _active_in(
    task: Task, ref: SaeRef, texts: Sequence[TokenizedPrompt], run: Restart, counts_BT: Tensor
) -> list[Active]:
    found = active(task, ref, run, counts_BT)
    x_BTD = read(task.saes(ref), run.sites[ref.site])
    text_N, position_N = (index.tolist() for index in counts_BT.nonzero(as_tuple=True))
    places: list[dict[int, list[tuple[int, int]]]] = [{} for _ in texts]
    for entry, (row, feature) in enumerate(zip(found.rows.tolist(), found.indices.tolist(), strict=True)):
        places[text_N[row]].setdefault(feature, []).append((position_N[row], entry))
    return [
        Active(
            text,
            ref,
            x_TD,
            tuple(
                (feature, tuple(at for at, _ in its), found.values[[entry for _, entry in its]])
                for feature, its in sorted(of_text.items())
            ),
        )
        for text, x_TD, of_text in zip(texts, x_BTD, places, strict=True)
    ]


def _without(task: Task, found: Active) -> Iterator[Change]:
    """Taking out each active feature by itself; nothing to measure where none is active."""
    skipped = str(task.spec.skip)
    if not found.features:
        yield Change(found.prompt, found.sae, None, None, [], {"skipped": skipped, "values": None})
    for index in range(len(found.features)):
        yield without(task, found, index)


def without(task: Task, found: Active, index: int) -> Change:
    """Taking out one of the active features, wherever it is active: what the autoencoder does not explain stays."""
    feature, positions, values_P = found.features[index]
    sae, skipped = task.saes(found.sae), str(task.spec.skip)
    share_PO = sae.contributions([feature] * len(positions), values_P, found.x_TD[list(positions)])
    return Change(
        found.prompt,
        found.sae,
        feature,
        added(task.engine.model, found.sae, sae, positions, -share_PO),
        ["ablation", feature, skipped],
        {"skipped": skipped, "values": values_P.tolist()},
    )


def _parts(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """The same in order, as many at a time as may be held."""
    part: list[Change] = []
    room = _NUMBERS
    for change in changes:
        part.append(change)
        room -= change.edit.shift.numel() if change.edit is not None and change.edit.shift is not None else 0
        if room < 0:
            yield part
            part, room = [], _NUMBERS
    if part:
        yield part


# -- rows --------------------------------------------------------------------------------------------------------------


def _measured(task: Task, changes: Sequence[Change], schema: pa.Schema) -> pa.Table:
    """One row a change, in their order."""
    texts = {change.prompt.prompt.id: change.prompt for change in changes if change.edit is not None}
    of_text = {prompt_id: row for row, prompt_id in enumerate(texts)}
    asked = [i for i, change in enumerate(changes) if change.edit is not None]
    cells = [Cell(of_text[changes[i].prompt.prompt.id], (edit,)) for i in asked if (edit := changes[i].edit)]
    unasked = [i for i, change in enumerate(changes) if change.edit is None]
    tables = [pa.table(_padded(_asked(task, [changes[i] for i in unasked]), schema), schema=schema)]

    def about(batch: Batch) -> Columns:
        of_batch = [changes[asked[cell]] for cell in batch.cells]
        return {**_asked(task, of_batch), "logit_shift": _logit_shift(batch)}

    if cells:
        prompts, ids_PT = [changes[i].prompt for i in asked], ids_of(list(texts.values()))
        tables.append(measure(task.engine, ids_PT, cells, prompts, about, schema=schema, top_k=task.top_k))
    return in_order(tables, [*unasked, *asked])


def _asked(task: Task, changes: Sequence[Change]) -> Columns:
    """What was changed."""
    rows = [
        {
            **task.about(change.sae),
            "ablation_id": None if change.edit is None else name(task.model_id, change),
            "prompt_id": change.prompt.prompt.id,
            "n_tokens": len(change.prompt.token_ids),
            "layer": _writable(task.engine.model, change.sae)[0],
            "feature": change.feature,
            "positions": None if change.edit is None else list(change.edit.positions),
            **change.columns,
        }
        for change in changes
    ]
    return {column: [row[column] for row in rows] for column in rows[0]} if rows else {}


def name(model_id: str, change: Change) -> str:
    """The `ablation_id` of a change."""
    return cell_id(model_id, change.prompt.token_ids, change.sae, change.what)


def _padded(columns: Columns, schema: pa.Schema) -> Columns:
    """Columns with nulls in place of those that are not there."""
    n_rows = len(next(iter(columns.values()), []))
    return {column: columns.get(column, [None] * n_rows) for column in schema.names}


def _logit_shift(batch: Batch) -> list[float]:
    """The largest change of any logit, of every row."""
    rows = zip(batch.ablated_AV, batch.prompt_A.tolist(), strict=True)
    return torch.stack([(row_V - batch.clean_PV[at]).abs_().max() for row_V, at in rows]).tolist()
