"""Which features are active at every token that counts."""

from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.spec import FEATURES
from raymi.experiments.sae.texts import Task, clean, counting, ids_of, in_batches, read_counted
from raymi.model.hooked import NotFinite
from raymi.model.restart import Restart
from raymi.prompts import TokenizedPrompt
from raymi.sae import Sparse


def features(task: Task) -> pa.Table:
    """Rows of table `sae_features`, by autoencoder, text and position."""
    parts: dict[SaeRef, list[pa.Table]] = {}
    for refs, texts in task.groups():
        n_sites = len({ref.site for ref in refs})
        for found in in_batches(task.engine, texts, n_sites, partial(_measure, task, refs)):
            for ref, table in found:
                parts.setdefault(ref, []).append(table)
    return pa.concat_tables([table for tables in parts.values() for table in tables])


def _measure(task: Task, refs: Sequence[SaeRef], texts: Sequence[TokenizedPrompt]) -> list[tuple[SaeRef, pa.Table]]:
    ids_BT = ids_of(texts)
    counts_BT = counting(task.spec, ids_BT, task.special)
    run = clean(task, refs, ids_BT, stop=True)
    return [(ref, _table(task, ref, texts, counts_BT, active(task, ref, run, counts_BT))) for ref in refs]


def active(task: Task, ref: SaeRef, run: Restart, counts_BT: Tensor) -> Sparse:
    """The features of the tokens that count, N rows.

    Raises:
        NotFinite: naming the autoencoder.
    """
    found = task.saes(ref).encode_sparse(read_counted(task, ref, ref.site, run, counts_BT))
    if not bool(found.values.sum().isfinite()):
        raise NotFinite(f"{task.engine.model.name}: NaN or infinity among the features of {ref.name}")
    return found


def _table(task: Task, ref: SaeRef, texts: Sequence[TokenizedPrompt], counts_BT: Tensor, found: Sparse) -> pa.Table:
    text_N, position_N = (index.tolist() for index in counts_BT.nonzero(as_tuple=True))
    token_N = ids_of(texts)[counts_BT].tolist()
    offsets = pa.array(found.offsets.cpu().to(torch.int32).numpy())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values.cpu().numpy()))
        for values in (found.indices.to(torch.int32), found.values.float())
    ]
    rows = _rows(task, ref, texts, text_N, [position_N, token_N, *lists])
    empty = (~counts_BT.any(1)).nonzero()[:, 0].tolist()
    if not empty:
        return rows
    nothing = _rows(task, ref, texts, empty, [[None] * len(empty)] * 4)
    order = sorted(range(len(text_N) + len(empty)), key=[*text_N, *empty].__getitem__)
    return pa.concat_tables([rows, nothing]).take(order)


def _rows(
    task: Task, ref: SaeRef, texts: Sequence[TokenizedPrompt], text_N: list[int], columns: Sequence[object]
) -> pa.Table:
    constant = {**task.about(ref), "skipped": str(task.spec.skip)}
    n_tokens = len(texts[0].token_ids)
    return pa.table(
        {
            **{name: pa.repeat(value, len(text_N)) for name, value in constant.items()},
            "prompt_id": [texts[text].prompt.id for text in text_N],
            "n_tokens": [n_tokens] * len(text_N),
            **dict(zip(("position", "token_id", "features", "values"), columns, strict=True)),
        },
        schema=FEATURES,
    )
