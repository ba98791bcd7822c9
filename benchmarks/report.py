"""The table, for people and for `benchmarks/RESULTS.md`."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import onednn_rate
from benchmarks.results import FULL, FULL_EACH, Measured, aims
from raymi.model.hooked import HookedModel

PACKAGES = ("raymi", "torch", "transformers", "transformer-lens", "nnsight", "sae-lens")
ORDER = (FULL, FULL_EACH, "plain loop", "TransformerLens", "nnsight")


def setting(name: str, model: HookedModel, way: str, missing: Mapping[str, str], *, quick: bool) -> list[str]:
    """Where this is measured, and on what: one fact a line."""
    dtype = str(model.dtype).removeprefix("torch.")
    n_parameters = sum(p.numel() for p in model.model.parameters())
    lines = [
        f"date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{', quick: not to be quoted' if quick else ''}",
        f"model: {name}, {n_parameters / 1e6:,.0f}M parameters, {dtype}, {model.weight_bytes / 2**30:.1f} GiB",
        f"cases: {model.n_layers} layers, {model.n_heads} heads; measured by: {way}",
        f"machine: {_machine(model.device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f} before",
        f"versions: Python {platform.python_version()}, {', '.join(_versions())}",
    ]
    if model.device.type == "cpu" and model.dtype == torch.float32:
        lines.append(f"beside torch's matrix product, oneDNN's: {onednn_rate() / 1e9:,.0f} GFLOP/s")
    return lines + [f"left out: {peer} ({why})" for peer, why in missing.items()]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


# ---- what stands in the tables ---------------------------------------------------------------------------------------


def _costs(results: Sequence[Measured]) -> Iterator[list[str]]:
    """Of raymi's cone."""
    yield [
        *("case", "ablations", "ms", "with metrics", "clean run, ms", "MFLOP", "GFLOP/s", "of matmul"),
        *("matmul before, after", "off by", "effects to", "memory, GiB"),
    ]
    for r in results:
        yield [
            r.name,
            f"{r.n_cells:,}",
            f"{1e3 * r.seconds:.2f}",
            f"{1e3 * r.seconds_with_metrics:.2f} (+{r.seconds_with_metrics / r.seconds - 1:.0%})",
            f"{1e3 * r.clean_seconds:.0f}" if r.clean_seconds else "counted",
            f"{r.flops / 1e6:,.0f}",
            f"{r.flops / r.seconds / 1e9:,.0f}",
            f"{r.share:.0%}",
            ", ".join(f"{rate / 1e9:,.0f}" for rate in r.matmul_rates),
            f"{r.difference:.0e}",
            f"{r.effect:.2f}",
            f"{r.peak_bytes / 2**30:.2f}",
        ]


def _ratios(results: Sequence[Measured]) -> Iterator[list[str]]:
    """Of the peers: milliseconds, how many were measured, how many times raymi's cone that is."""
    names = [name for name in ORDER if any(name in r.peers for r in results)]
    yield ["case", "raymi's cone, ms", *names]
    for r in results:
        yield [r.name, f"{1e3 * r.seconds:.2f}", *(_peer(r, name) for name in names)]


def _peer(result: Measured, name: str) -> str:
    if name not in result.peers:
        return "-"
    seconds, sample, off = result.peers[name]
    differs = f", off by {off:.0e}" if off else ""
    ratio = result.ratio(name) or 0.0
    return f"{ratio:,.{0 if ratio >= 10 else 1}f}x: {1e3 * seconds:,.1f} ms ({sample}{differs})"


def _aims(results: Sequence[Measured], dtype: str) -> Iterator[list[str]]:
    yield ["aim", "wanted", "found", ""]
    for aim in aims(results, dtype):
        sign = "≥" if aim.at_least else "≤"
        yield [aim.what, f"{sign} {aim.wanted:g}", f"{aim.found:.3g}", "met" if aim.met else "NOT MET"]


NOTES = """\
ms: milliseconds per ablation, without the clean run of the prompt, which everyone needs; raymi's are medians of rounds
over all ablations of a case, a peer's the median of as many as stand in brackets, spread over the case. MFLOP: what an
ablation needs, matrix products only (layers from its own on, positions from its query on, one unembedding; a clean row
a sweep). Of matmul: that, over the time, over the rate of a square matrix product by torch right before or right after
(the better one), which stand beside it in GFLOP/s. Off by: largest difference in logits from the plain loop.\
"""


def _tables(results: Sequence[Measured], dtype: str) -> dict[str, list[list[str]]]:
    return {
        "raymi's cone": list(_costs(results)),
        "against others": list(_ratios(results)),
        "aims, for the demo model on a quiet machine of two cores": list(_aims(results, dtype)),
    }


# ---- on a screen and in a file ---------------------------------------------------------------------------------------


def print_report(results: Sequence[Measured], dtype: str, console: Console) -> None:
    print_tables(_tables(results, dtype), NOTES, console)


def print_tables(tables: Mapping[str, list[list[str]]], notes: str, console: Console) -> None:
    """Title -> head and rows."""
    for title, (head, *rows) in tables.items():
        table = Table(*head, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(notes, markup=False, highlight=False)


def append_markdown(path: Path, head: Sequence[str], results: Sequence[Measured], dtype: str) -> None:
    """A section for `RESULTS.md`."""
    about = "\n".join(f"- `{r.name}`: {r.about}" for r in results)
    append_tables(path, head, about, _tables(results, dtype), NOTES)


def append_tables(
    path: Path, head: Sequence[str], about: str, tables: Mapping[str, list[list[str]]], notes: str
) -> None:
    """A section of such tables."""
    date = head[0].removeprefix("date: ")
    parts = [f"## {date}", "\n".join(f"- {line}" for line in head[1:]), *([about] if about else [])]
    for title, (first, *rows) in tables.items():
        ruled = [first, ["---"] * len(first), *rows]
        parts += [f"### {title}", "\n".join(f"| {' | '.join(row)} |" for row in ruled)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n\n".join([*parts, notes]) + "\n\n")
