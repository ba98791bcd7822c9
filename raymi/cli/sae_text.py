"""What `raymi report` says of autoencoders."""

from collections.abc import Iterator
from textwrap import fill
from typing import TYPE_CHECKING, Any

from raymi.cli.text import bars, formatted, number, plural, table

if TYPE_CHECKING:
    import polars as pl

    from raymi.report.saes import Saes

_FEATURES, _ABLATIONS, _INJECTIONS = 10, 10, 20
"""Rows of an autoencoder that are shown; exports have all of them."""


def sections(saes: "Saes", width: int) -> Iterator[str]:
    """The lines of all that was measured, each with a blank line before what begins anew.

    Args:
        saes: of a run.
        width: of the terminal in characters, of which tables need about 80; 0 folds nothing.
    """
    for each in (_quality, _activity, _injections, _ablations):
        yield from each(saes, width)
    if not saes.absent.is_empty():
        yield "\nnot measured:"
    for about, its in _by(saes.absent, "model_id", "note"):
        said = f"{about['model_id']}: {', '.join(its['experiment'])}: {about['note']}"
        yield from fill(said, width or 10_000, initial_indent="  ", subsequent_indent="    ").splitlines()


def _quality(saes: "Saes", width: int) -> Iterator[str]:
    for about, its in _by(saes.quality, "experiment", "model_id", "skipped", "definitions"):
        said = f"how well activations are reconstructed, {_left_out(about)} ({about['definitions']})"
        yield from _heading(width, f"{about['experiment']}: {about['model_id']}", said)
        rows = [
            [
                row["sae"],
                formatted(row["tokens"], ","),
                _short(row["l0"]),
                number(row["explained_variance"]),
                number(row["cossim"]),
                number(row["l2_ratio"]),
                f"{formatted(row['dead_features'], ',.0f')} of {formatted(row['d_sae'], ',')}",
            ]
            for row in its.iter_rows(named=True)
        ]
        header = ("SAE", "tokens", "L0", "expl. var.", "cossim", "L2 ratio", "dead")
        yield from table(header, rows, right=range(1, 7), width=width)
        yield from _heading(width, "what the model makes of it: next-token loss and KL in nats")
        yield from table(
            ("SAE", "loss", "with SAE", "zeros", "score", "KL", "with zeros", "score"),
            [[row["sae"], *_downstream(row)] for row in its.iter_rows(named=True)],
            right=range(1, 8),
            width=width,
        )
        yield from _heading(width, "features by density, from the rarest to the densest that fires")
        sae = ["model_id", "revision", "dtype", "experiment", "sae", "sae_version", "site", "skipped"]
        of_model = saes.densities.join(its, on=sae, how="semi")
        yield from _densities(of_model, width)


def _downstream(row: dict[str, Any]) -> list[str]:
    losses = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score")
    return [number(row[name]) for name in (*losses, "kl_div_with_sae", "kl_div_with_ablation", "kl_div_score")]


def _densities(densities: "pl.DataFrame", width: int) -> list[str]:
    rows: list[list[str]] = []
    for about, its in _by(densities.filter(densities["at_least"] > 0), "sae", "site"):
        low, high = its["at_least"].min(), its["below"].max()
        rows.append([about["sae"], f"{low:.1e}", "".join(bars(its["features"].to_list())), f"{high:.1e}"])
    return table(("SAE", "from", "features", "below"), rows, right=(), width=width) if rows else ["none was active"]


def _activity(saes: "Saes", width: int) -> Iterator[str]:
    for about, its in _by(saes.activity, "experiment", "model_id", "skipped"):
        said = f"how many features are active, {_left_out(about)}"
        yield from _heading(width, f"{about['experiment']}: {about['model_id']}", said)
        rows = [
            [
                row["sae"],
                formatted(row["texts"], ","),
                formatted(row["tokens"], ","),
                _short(row["mean_l0"]),
                formatted(row["features"], ","),
            ]
            for row in its.iter_rows(named=True)
        ]
        yield from table(("SAE", "texts", "tokens", "mean L0", "features"), rows, right=range(1, 5), width=width)
    by = ["model_id", "revision", "dtype", "experiment", "sae", "sae_version", "site", "skipped", "feature"]
    first = saes.examples.filter(saes.examples["rank"] == 1).select(*by, "prompt_id", "position", "context")
    found = saes.features.join(first, on=by, how="left", maintain_order="left")
    for about, its in _by(found, "experiment", "model_id", "sae", "site"):
        yield from _heading(width, *_of(about, "the strongest features, each at another token: where it is strongest"))
        # A token whose activations are of another size would have all the rows.
        ordered = its.sort("max", "feature", descending=[True, False])
        most = ordered.unique(["prompt_id", "position"], keep="first", maintain_order=True).head(_FEATURES)
        numbers = [
            [str(row["feature"]), number(row["density"]), _short(row["mean"]), _short(row["max"])]
            for row in most.iter_rows(named=True)
        ]
        header = ("feature", "density", "mean", "max", "at its strongest")
        room = _room(header, numbers, width)
        rows = [[*cells, clipped(text or "", room)] for cells, text in zip(numbers, most["context"], strict=True)]
        yield from table(header, rows, right=range(4), width=width)


def _injections(saes: "Saes", width: int) -> Iterator[str]:
    for about, its in _by(saes.injections, "experiment", "model_id", "sae", "site"):
        yield from _heading(width, *_of(about, "features added; logit diff of the answer, clean - injected"))
        most = its.sort("mean_kl", descending=True, nulls_last=True).head(_INJECTIONS).sort("feature", "strength")
        numbers = [
            [
                str(row["feature"]),
                f"{row['strength']:g}",
                formatted(row["injections"], ","),
                number(row["mean_logit_shift"]),
                number(row["mean_kl"]),
                number(row["mean_logit_diff"], "+"),
            ]
            for row in most.iter_rows(named=True)
        ]
        header = ("feature", "strength", "n", "largest shift", "KL", "logit diff", "raises (%)")
        room = _room(header, numbers, width)
        rows = [[*cells, _fitting(text or "-", room)] for cells, text in zip(numbers, most["raised"], strict=True)]
        yield from table(header, rows, right=range(6), width=width)
        yield from _more(its.height - most.height, "the others change less")


def _ablations(saes: "Saes", width: int) -> Iterator[str]:
    for about, its in _by(saes.ablations, "experiment", "model_id", "sae", "site", "skipped"):
        yield from _heading(
            width,
            *_of(about, f"active features taken out, {_left_out(about)}"),
            "logit diff of the answer, clean - without it; its size in the mean over all prompts",
        )
        most = its.head(_ABLATIONS)
        rows = [
            [
                str(row["feature"]),
                f"{formatted(row['prompts'], ',')} of {formatted(row['of_prompts'], ',')}",
                _short(row["mean_value"]),
                number(row["mean_kl"]),
                number(row["mean_logit_diff"], "+"),
                number(row["effect"]),
            ]
            for row in most.iter_rows(named=True)
        ]
        header = ("feature", "active in", "activation", "mean KL", "logit diff", "size")
        yield from table(header, rows, right=range(6), width=width)
        yield from _more(its.height - most.height, "the others change less")


def _by(frame: "pl.DataFrame", *columns: str) -> "Iterator[tuple[dict[str, Any], pl.DataFrame]]":
    for key, its in frame.group_by(columns, maintain_order=True):
        yield dict(zip(columns, key, strict=True)), its


def _heading(width: int, *sentences: str) -> list[str]:
    """A blank line and some sentences, each on a line of its own."""
    folded = (fill(each, width or 10_000, break_long_words=False, break_on_hyphens=False) for each in sentences)
    return ["", *(line for each in folded for line in each.splitlines())]


def _of(about: dict[str, Any], said: str) -> tuple[str, str, str]:
    return f"{about['experiment']}: {about['sae']}", f"at {about['site']} of {about['model_id']}", said


def _left_out(about: dict[str, Any]) -> str:
    return "all tokens" if about["skipped"] == "nothing" else f"without {about['skipped']}"


def _more(n: int, why: str) -> list[str]:
    return [f"and {plural(n, 'more row')} in --csv and --parquet: {why}"] if n > 0 else []


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _room(header: tuple[str, ...], rows: list[list[str]], width: int) -> int | None:
    """Characters that are left for the last column; None where there is no end to them."""
    if not width:
        return None
    taken = sum(max(map(len, column)) + 2 for column in zip(header[:-1], *rows, strict=True))
    return max(width - taken, len(header[-1]))


def clipped(context: str, room: int | None) -> str:
    """A text on one line, of which the end and then the beginning go where there is no room, but not what is marked."""
    text = " ".join(context.replace("\n", "\\n").split())
    if room is None or len(text) <= room:
        return text
    until = text.find("»", text.find("«")) + 1
    text = text[: max(until + room // 4, room)]
    return text if len(text) <= room else f"…{text[len(text) - room + 1 :]}"


def _fitting(listed: str, room: int | None) -> str:
    """As many of some tokens as there is room for, at least one."""
    tokens = listed.replace("\n", "\\n").split(', "')
    while room is not None and len(tokens) > 1 and len(', "'.join(tokens)) > room:
        tokens.pop()
    return ', "'.join(tokens)
