"""What changes did, as columns of `EFFECTS`."""

from collections.abc import Sequence
from typing import Any

import torch

from raymi.model.metrics import Comparison, TokenEffects
from raymi.prompts import TokenizedPrompt

Columns = dict[str, list[Any]]


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
    answer = _one_token(compared, "answer", [prompt.answer_id for prompt in prompts])
    wrong = _one_token(compared, "wrong", [prompt.wrong_id for prompt in prompts])
    logit_diff = _minus(answer["answer_logit_clean"], answer["answer_logit_ablated"])
    wrong_diff = _minus(wrong["wrong_logit_clean"], wrong["wrong_logit_ablated"])
    return {
        **answer,
        **{name: column for name, column in wrong.items() if not name.startswith("wrong_rank")},
        "logit_diff": logit_diff,
        "margin_diff": _minus(logit_diff, wrong_diff),
    }


def _one_token(compared: Comparison, name: str, ids: list[int | None]) -> Columns:
    if all(token is None for token in ids):
        fields = (field.removesuffix("_A") for field in TokenEffects._fields)
        return {f"{name}_id": list(ids), **{f"{name}_{field}": list(ids) for field in fields}}
    found = compared.token(torch.tensor([token or 0 for token in ids], device=compared.prompt_A.device))
    columns: Columns = {
        f"{name}_{field.removesuffix('_A')}": [
            value if token is not None else None for token, value in zip(ids, column.tolist(), strict=True)
        ]
        for field, column in found._asdict().items()
    }
    return {f"{name}_id": list(ids), **columns}


def _minus(left: list[float | None], right: list[float | None]) -> list[float | None]:
    return [a - b if a is not None and b is not None else None for a, b in zip(left, right, strict=True)]
