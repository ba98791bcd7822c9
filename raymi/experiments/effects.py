"""From ablations to rows: what they did, as columns of `EFFECTS`, and how that was measured."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from raymi.model.engine import Engine
from raymi.model.full import Batch
from raymi.model.hooked import Cell, NotFinite
from raymi.model.metrics import Comparison, TokenEffects
from raymi.prompts import TokenizedPrompt

Columns = dict[str, list[Any]]
T = TypeVar("T")


def measure(
    engine: Engine,
    ids_PT: Tensor,
    cells: Sequence[Cell],
    prompts: Sequence[TokenizedPrompt],
    about: Callable[[Batch], Columns],
    *,
    schema: pa.Schema,
    top_k: int,
) -> pa.Table:
    """Measures ablations.

    Args:
        engine: the model, and the way it is measured.
        ids_PT: token ids of the prompts, all of one length.
        cells: the ablations, at least one.
        prompts: the prompt of every ablation.
        about: those columns of a batch's rows that its kind of experiment adds to effects and ways.
        schema: which columns there are; what it has not is left out.
        top_k: how many of the most changed tokens a row lists.

    Returns:
        A table of `schema`, one row an ablation, in the order of `cells`.

    Raises:
        NotFinite: a logit is NaN or infinite; names the prompts.
        NotFired, NoSuchPlace, OutOfMemory: from the model room.
    """
    tables: list[pa.Table] = []
    done: list[int] = []
    try:
        for batch in engine.ablations(ids_PT, cells):
            columns = {**about(batch), **_measured(batch, [prompts[i] for i in batch.cells], top_k)}
            tables.append(pa.table({name: columns[name] for name in schema.names}, schema=schema))
            done += batch.cells
    except NotFinite as error:
        names = dict.fromkeys(prompt.prompt.id for prompt in prompts)
        raise NotFinite(f"{error} (prompts {', '.join(names)})") from error
    return in_order(tables, done)


def _measured(batch: Batch, prompts: Sequence[TokenizedPrompt], top_k: int) -> Columns:
    compared = Comparison(batch.clean_PV, batch.ablated_AV, batch.prompt_A)
    return {
        **effects(compared, top_k),
        **answers(compared, prompts),
        "empty_rows": batch.empty_A.tolist(),
        "fired": batch.fired_A.tolist(),
        "closed": [None] * len(prompts) if batch.closed_A is None else batch.closed_A.tolist(),
        "engine": [batch.way] * len(prompts),
        "clean_error": [batch.clean_error] * len(prompts),
    }


def in_order(tables: Sequence[pa.Table], places: Sequence[int]) -> pa.Table:
    """Rows of several tables by their places."""
    return pa.concat_tables(tables).take(sorted(range(len(places)), key=places.__getitem__))


def only(values: Iterable[T] | None) -> T | None:
    """The one value, where there is just one of them: what people group by."""
    found = set(values or ())
    return found.pop() if len(found) == 1 else None


def effects(compared: Comparison, top_k: int) -> Columns:
    """Distances and the `top_k` most changed tokens."""
    found = compared.effects(top_k)
    changed = zip(
        found.changed_AC.tolist(), found.changed_clean_AC.tolist(), found.changed_ablated_AC.tolist(), strict=True
    )
    return {
        "kl": found.kl_A.tolist(),
        "total_variation": found.total_variation_A.tolist(),
        "top1_clean": found.top1_clean_A.tolist(),
        "top1_ablated": found.top1_ablated_A.tolist(),
        "changed": [
            [{"token_id": i, "prob_clean": p, "prob_ablated": q} for i, p, q in zip(*row, strict=True)]
            for row in changed
        ],
    }


def answers(compared: Comparison, prompts: Sequence[TokenizedPrompt]) -> Columns:
    """What happened to the answer and to the wrong answer; null where a prompt has none."""
    answer_ids, wrong_ids = [prompt.answer_id for prompt in prompts], [prompt.wrong_id for prompt in prompts]
    answer, wrong = _token(compared, "answer", answer_ids), _token(compared, "wrong", wrong_ids)
    logit_diff = _minus(answer["answer_logit_clean"], answer["answer_logit_ablated"])
    wrong_diff = _minus(wrong["wrong_logit_clean"], wrong["wrong_logit_ablated"])
    return {
        **answer,
        **_ranks(compared, "answer", answer_ids),
        **wrong,
        "logit_diff": logit_diff,
        "margin_diff": _minus(logit_diff, wrong_diff),
    }


def _token(compared: Comparison, name: str, ids: list[int | None]) -> Columns:
    fields = [f"{name}_{field.removesuffix('_A')}" for field in TokenEffects._fields]
    if all(token is None for token in ids):
        return {f"{name}_id": list(ids), **{field: list(ids) for field in fields}}
    found = compared.token(_known(ids, compared))
    return {f"{name}_id": list(ids), **dict(zip(fields, (_where(ids, column) for column in found), strict=True))}


def _ranks(compared: Comparison, name: str, ids: list[int | None]) -> Columns:
    fields = f"{name}_rank_clean", f"{name}_rank_ablated"
    if all(token is None for token in ids):
        return {field: list(ids) for field in fields}
    found = compared.ranks(_known(ids, compared))
    return dict(zip(fields, (_where(ids, column) for column in found), strict=True))


def _known(ids: list[int | None], compared: Comparison) -> Tensor:
    """Token ids as a tensor, any number where there is none."""
    return torch.tensor([token or 0 for token in ids], device=compared.prompt_A.device)


def _where(ids: list[int | None], column: Tensor) -> list[Any]:
    return [value if token is not None else None for token, value in zip(ids, column.tolist(), strict=True)]


def _minus(left: list[float | None], right: list[float | None]) -> list[float | None]:
    return [a - b if a is not None and b is not None else None for a, b in zip(left, right, strict=True)]
