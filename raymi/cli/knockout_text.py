"""How the result of `raymi knockout` is shown: one block of lines a model, and a table of all of them."""

import json
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from raymi.answers import runs_on, unlikely
from raymi.catalog import CachedModel
from raymi.cli.text import count, size, table

if TYPE_CHECKING:
    from raymi.single import Record

_LABEL = 10
"""Characters of the column of labels."""
_TOKENS_SHOWN = 24
_BLANK = "\ue000"
"""Stands for a blank at which no line is broken."""


def header(model: CachedModel, width: int) -> list[str]:
    """What is known before a model is loaded."""
    shape = f"{model.n_layers} layers, {model.heads} heads, hidden size {model.hidden_size}"
    about = f"{model.model_type}, {shape}, {count(model.parameters)} parameters"
    return [f"{model.id} at {model.revision[:7]}", *_item("model", [about], width)]


def lines(record: "Record", width: int) -> list[str]:
    """A result, folded to `width` characters; 0 folds nothing."""
    seconds = record["seconds"]
    out = [
        *_item("weights", [f"{size(record['weight_bytes'])} as {record['dtype']} on {_device(record)}"], width),
        *_item("load", [f"{duration(seconds['load'])};", *_memory(record)], width),
        *_item("tokens", _tokens(record), width),
        *_item("cut", _cut(record), width),
        *_item("forward", [f"clean {duration(seconds['clean_forward'])}, ablated "
                           f"{duration(seconds['ablated_forward'])}"], width),
        *_item("clean top", _commas(f"{quoted(t['token'])} {percent(t['prob'])}" for t in record["clean_top"]), width),
    ]  # fmt: skip
    for name in ("answer", "wrong"):
        if record[name] is not None:
            out += _item(name, _target(record[name]), width)
    kl: float = record["kl_divergence"]
    out += _item("KL", [f"{kl:.6f} nats" + (f" ({kl:.2e})" if kl < 1e-4 else "")], width)
    if record["logit_diff"] is not None:
        out += _item("logit diff", [f"{record['logit_diff']:+.5f} (answer, clean - ablated)"], width)
    if record["margin_diff"] is not None:
        out += _item("margin", [f"{record['margin_diff']:+.5f} (answer - wrong, clean - ablated)"], width)
    out += [line for label, note in _notes(record) for line in _item(label, note.split(" "), width)]
    return [*out, "", *_changed(record["top_changed"])]


def comparison(records: "Sequence[Record]", width: int) -> list[str]:
    """One line a model."""

    def cells(record: "Record") -> list[str]:
        answer, top = record["answer"], record["top_changed"][0]
        layers = str(record["target_layer"]) if record["target_layer"] is not None else f"{len(record['layers'])} of"
        before_after = [percent(answer[f"prob_{when}"]) for when in ("clean", "ablated")] if answer else ["-", "-"]
        logit_diff = "-" if record["logit_diff"] is None else f"{record['logit_diff']:+.5f}"
        at = f"{layers}/{record['n_layers']}"
        return [
            record["model_id"],
            at,
            f"{record['kl_divergence']:.6f}",
            logit_diff,
            *before_after,
            quoted(top["token"]),
        ]

    head = ("model", "layer", "KL", "logit diff", "before", "after", "changes most")
    return [*table(head, map(cells, records), right=range(1, 6), width=width), ""]


def quoted(token: str) -> str:
    """A token between quotes, with line breaks and the like spelt out."""
    return json.dumps(token, ensure_ascii=False)


def percent(probability: float) -> str:
    """45.1% from one per cent on, 0.123% from one in ten thousand on, else 3.1e-05."""
    if probability >= 0.01:
        return f"{probability:.1%}"
    return f"{probability:.3%}" if probability >= 0.0001 else f"{probability:.1e}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _item(label: str, words: Iterable[str], width: int) -> list[str]:
    """Words behind a label; a line is broken between them only."""
    text = " ".join(word.replace(" ", _BLANK) for word in words)
    room = max(20, width - _LABEL - 4) if width else max(1, len(text))
    folded = wrap(text, room, break_on_hyphens=False, break_long_words=False)
    labels = [label, *[""] * (len(folded) - 1)]
    return [f"  {a:<{_LABEL}}  {b.replace(_BLANK, ' ')}" for a, b in zip(labels, folded, strict=True)]


def _commas(items: Iterable[str], mark: str = ",") -> list[str]:
    *first, last = items
    return [*(item + mark for item in first), last]


def _device(record: "Record") -> str:
    name = record["device_name"]
    return f"{record['device']} ({name})" if name else record["device"]


def _memory(record: "Record") -> list[str]:
    before, after = record["memory"]["before_load"], record["memory"]["after_load"]
    kinds = [kind for kind in ("ram", "vram") if after[kind] is not None]
    return _commas(f"{kind.upper()} {size(before[kind])} -> {size(after[kind])}" for kind in kinds)


def _tokens(record: "Record") -> list[str]:
    """The prompt's tokens with their positions; of a long one both ends."""
    shown = [f"{at} {quoted(token)}" for at, token in enumerate(record["tokens"])]
    half = _TOKENS_SHOWN // 2
    return _commas(shown) if len(shown) <= _TOKENS_SHOWN else _commas([*shown[:half], "...", *shown[-half:]])


def _cut(record: "Record") -> list[str]:
    tokens = [f"{at} {quoted(token)}" for at, token in enumerate(record["tokens"])]
    layers, heads = record["layers"], record["heads"]
    return _commas(
        [
            f"layer{'s' * (len(layers) > 1)} {_numbers(layers)}",
            "all heads" if heads is None else f"head{'s' * (len(heads) > 1)} {_numbers(heads)}",
            *(f"{tokens[query]} -> {tokens[key]}" for query, key in record["edges"][:_TOKENS_SHOWN]),
            *[f"... ({len(record['edges'])} edges)"] * (len(record["edges"]) > _TOKENS_SHOWN),
        ],
        ";",
    )


def _numbers(ascending: Sequence[int]) -> str:
    if len(ascending) > 2 and ascending[-1] - ascending[0] == len(ascending) - 1:
        return f"{ascending[0]}-{ascending[-1]}"
    return ", ".join(map(str, ascending))


def _target(target: dict[str, Any]) -> list[str]:
    logit, prob, rank = ((target[f"{name}_clean"], target[f"{name}_ablated"]) for name in ("logit", "prob", "rank"))
    parts = [f"logit {logit[0]:.4f} -> {logit[1]:.4f}", f"probability {percent(prob[0])} -> {percent(prob[1])}"]
    ranks = [] if rank[0] is None else [f"rank {rank[0]} -> {rank[1]}"]
    return [f"{quoted(target['token'])}:", *_commas([*parts, *ranks])]


def _notes(record: "Record") -> list[tuple[str, str]]:
    """(label, text): what a reader has to know before he believes the numbers."""
    notes: list[tuple[str, str]] = []
    answer, top = record["answer"], record["clean_top"]
    if answer is not None and answer["token_id"] not in [each["token_id"] for each in top]:
        notes.append(("warning", unlikely(f"{quoted(answer['token'])} is", len(top)) + "."))
        if runs_on(record["prompt"], answer["text"]):
            notes.append(("warning", f"{quoted(answer['text'])} begins without the blank that stands before a word."))
    for name in ("answer", "wrong"):
        target = record[name]
        if target is not None and len(target["pieces"]) > 1:
            pieces = ", ".join(map(quoted, target["pieces"]))
            measured = f"{quoted(target['token'])} is measured"
            notes.append(("note", f"{quoted(target['text'])} is {len(target['pieces'])} tokens, {pieces}; {measured}."))
    if n := record["empty_rows"]:
        lines = f"{n} attention line{'s' * (n > 1)} (a query in a head of a layer)"
        notes.append(("note", f"{lines} {'were' if n > 1 else 'was'} left with no key: there the output is zero."))
    if n := record["closed"]:
        whole = n + record["fired"]
        said = f"{n} of {whole} edges had been closed by the model's own mask (a window or chunks)"
        notes.append(("warning", said + (": nothing was cut." if n == whole else ".")))
    return notes


def _changed(top: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the most changed tokens. Tokens may be of double-width letters, so columns are counted in cells."""
    tokens = [quoted(each["token"]) for each in top]
    widest = max([5, *map(cell_len, tokens)])
    out = [f"  rank  {'token':<{widest}}  {'before':>8}  {'after':>8}  {'difference':>10}"]
    for each, token in zip(top, tokens, strict=True):
        before, after = each["baseline_prob"], each["ablated_prob"]
        change = ("+" if after >= before else "-") + percent(each["abs_diff"])
        numbers = f"{percent(before):>8}  {percent(after):>8}  {change:>10}"
        out.append(f"  {each['rank']:>4}  {set_cell_size(token, widest)}  {numbers}")
    return out
