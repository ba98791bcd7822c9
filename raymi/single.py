"""One ablation of one prompt on one model, as a record that needs nothing else to be understood or made again."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from raymi.catalog import CachedModel
from raymi.experiments.knockout.spec import Ablation
from raymi.experiments.unit import Unit
from raymi.job import Job
from raymi.plan.units import units
from raymi.prompts import Prompt, TokenizedPrompt, tokenize
from raymi.store.manifest import hardware, versions
from raymi.tokenizer import load_tokenizer, token_texts
from raymi.vocabulary import check_ids, check_loaded

if TYPE_CHECKING:
    from raymi.model.hooked import HookedModel
    from raymi.model.loading import Loaded

T = TypeVar("T")
Record = dict[str, Any]
"""Plain JSON values: bytes, seconds, nats. Ranks count from 1; `heads` null means all of them."""

CLEAN_TOP = 5


def measure(
    job: Job,
    model: CachedModel,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    allow_unused: bool = False,
) -> Record:
    """Loads a model, measures the job's one ablation on it, and lets go of it.

    Args:
        job: one prompt, and experiments that differ in their edges only: all edges are cut together.
        model: the model.
        trust_remote_code: see `raymi.load`.
        allow_pickle: see `raymi.load`.
        allow_unused: see `raymi.load`.

    Raises:
        UserError: the model or its tokenizer has not what the job names.
        RuntimeError: it cannot be loaded, or measuring it failed.
    """
    from raymi.model.loading import load

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    [read] = tokenize(job.prompts, tokenizer, bos=job.bos, chat_template=False, pieces=job.pieces, model_id=model.id)
    check_ids(model.id, read, model.vocab_size, model.vocab_size)
    unit = _unit(job, model, read)
    loaded = load(
        model.path,
        name=model.id,
        dtype=job.dtype,
        device=job.device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        allow_unused=allow_unused,
        longest=len(read.token_ids),
    )
    check_loaded(model.id, read, loaded.model)
    return {
        **_about_model(model, loaded),
        **_about_prompt(read),
        **_measured(job, model, loaded, unit, read, tokenizer),
        "versions": versions(),
        "hardware": hardware(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _unit(job: Job, model: CachedModel, read: TokenizedPrompt) -> Unit:
    """The one ablation that cuts what the job's experiments would cut one after the other."""
    parts = [unit for spec in job.experiments for unit in units(job, spec, model, [read])]
    cuts = [ablation for part in parts for _, ablations in part.of(Ablation) for ablation in ablations]
    edges = tuple(sorted({edge for cut in cuts for edge in cut.edges}))
    return replace(parts[0], items=((read.prompt.id, (replace(cuts[0], edges=edges),)),))


def _about_model(model: CachedModel, loaded: "Loaded") -> Record:
    import torch

    hooked, device = loaded.model, loaded.model.device
    return {
        "model_id": model.id,
        "revision": model.revision,
        "model_type": model.model_type,
        "n_layers": hooked.n_layers,
        "n_heads": hooked.n_heads,
        "hidden_size": hooked.hidden_size,
        "dtype": str(hooked.dtype).removeprefix("torch."),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "weight_bytes": hooked.weight_bytes,
        "not_built": list(loaded.not_built),
        "unused": list(loaded.unused),
        "memory": {"before_load": loaded.before._asdict(), "after_load": loaded.after._asdict()},
        "capability": asdict(loaded.capability),
    }


def _about_prompt(read: TokenizedPrompt) -> Record:
    return {
        "prompt": read.prompt.text,
        "token_ids": list(read.token_ids),
        "tokens": list(read.tokens),
        "bos": read.bos,
    }


def _measured(
    job: Job, model: CachedModel, loaded: "Loaded", unit: Unit, read: TokenizedPrompt, tokenizer: Any
) -> Record:
    """The row that a run of the job would give, and two forwards by themselves for their times."""
    from raymi.experiments.knockout.run import run

    [(_, (ablation,))] = unit.of(Ablation)
    clean_top, clean_seconds, ablated_seconds = _forwards(loaded.model, read, ablation)
    table, seconds = _timed(
        lambda: run(
            loaded.engine,
            unit,
            {read.prompt.id: read},
            model_id=model.id,
            revision=model.revision,
            dtype=job.dtype,
            top_k=job.top_k,
        )
    )
    [row] = table.to_pylist()
    changed: list[dict[str, Any]] = row["changed"]
    named = {*(each["token_id"] for each in changed), *(token for token, _ in clean_top)}
    targets = {"answer": read.answer_id, "wrong": read.wrong_id}
    texts = token_texts(tokenizer, named | {token for token in targets.values() if token is not None})
    return {
        "layers": list(ablation.layers),
        "heads": None if ablation.heads is None else list(ablation.heads),
        "edges": [list(edge) for edge in ablation.edges],
        "target_layer": row["layer"],
        "knockout_edge": list(ablation.edges[0]) if len(ablation.edges) == 1 else None,
        "ablation_id": row["ablation_id"],
        "kl_divergence": row["kl"],
        "total_variation": row["total_variation"],
        "logit_diff": row["logit_diff"],
        "margin_diff": row["margin_diff"],
        **{
            name: None if token is None else _target(name, texts[token], row, read, tokenizer, job)
            for name, token in targets.items()
        },
        "clean_top": [
            {"rank": rank, "token_id": token, "token": texts[token], "prob": prob}
            for rank, (token, prob) in enumerate(clean_top, 1)
        ],
        "top_changed": [
            {
                "rank": rank,
                "token_id": each["token_id"],
                "token": texts[each["token_id"]],
                "baseline_prob": each["prob_clean"],
                "ablated_prob": each["prob_ablated"],
                "abs_diff": abs(each["prob_ablated"] - each["prob_clean"]),
            }
            for rank, each in enumerate(changed, 1)
        ],
        "empty_rows": row["empty_rows"],
        "fired": row["fired"],
        "closed": row["closed"],
        "engine": row["engine"],
        "seconds": {
            "load": loaded.seconds,
            "check": loaded.check_seconds,
            "clean_forward": clean_seconds,
            "ablated_forward": ablated_seconds,
            "measure": seconds,
        },
    }


def _target(name: str, token: str, row: Record, read: TokenizedPrompt, tokenizer: Any, job: Job) -> Record:
    """What happened to the answer or the wrong answer: to its one token that was measured."""
    text = getattr(read.prompt, name)
    numbers: Record = {
        f"{number}_{when}": row.get(f"{name}_{number}_{when}")
        for number in ("logit", "prob", "rank")
        for when in ("clean", "ablated")
    }
    for when in ("rank_clean", "rank_ablated"):
        numbers[when] = None if numbers[when] is None else numbers[when] + 1
    pieces = _pieces(read.prompt.text, text, tokenizer, job)
    return {"text": text, "token_id": row[f"{name}_id"], "token": token, "pieces": pieces, **numbers}


def _pieces(prompt: str, answer: str, tokenizer: Any, job: Job) -> list[str]:
    """All tokens of an answer behind the prompt, of which one is measured."""
    both = [Prompt("before", prompt), Prompt("after", prompt + answer)]
    before, after = tokenize(both, tokenizer, bos=job.bos, chat_template=False)
    return list(after.tokens[len(before.tokens) :])


def _forwards(
    model: "HookedModel", read: TokenizedPrompt, ablation: Ablation
) -> tuple[list[tuple[int, float]], float, float]:
    """The most likely tokens of a clean forward with their probabilities, its seconds, and those of an ablated one."""
    import torch

    from raymi.model.interventions import Mask

    ids_1T = torch.tensor([read.token_ids])
    masks = [Mask(layer, ablation.heads, ablation.edges) for layer in ablation.layers]
    model.forward(ids_1T, [masks])  # the first forward of a length also pays for what it makes for the later ones
    clean, clean_seconds = _timed(lambda: model.forward(ids_1T))
    _, ablated_seconds = _timed(lambda: model.forward(ids_1T, [masks]))
    top = clean.logits_BV[0].cpu().double().softmax(0).topk(min(CLEAN_TOP, model.vocab_size))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True)), clean_seconds, ablated_seconds


def _timed(do: Callable[[], T]) -> tuple[T, float]:
    # What is timed ends by looking at its numbers, so a GPU has finished.
    started = time.perf_counter()
    return do(), time.perf_counter() - started
