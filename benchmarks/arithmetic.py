"""What has to be computed for an ablation, in floating-point operations, and how fast the machine multiplies matrices.

Counted are matrix products only, a multiplication and an addition as two: linear layers, scores and mixing of values
over the keys that a query may see, and the unembedding of one position.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from raymi.model.hooked import Cell, HookedModel


class Arithmetic:
    """The operations of one model, from the shapes of its weights."""

    def __init__(self, model: HookedModel) -> None:
        config = model.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.linear = [
            2 * sum(m.weight.numel() for m in block.module.modules() if isinstance(m, nn.Linear))
            for block in model.blocks
        ]
        """By layer, of one position."""
        self.key = 4 * config.num_attention_heads * width
        """Of one query and one key, in one layer: their score, and the weighing of the value."""
        self.unembedding = 2 * model.model.get_output_embeddings().weight.numel()

    def row(self, n_tokens: int, layer: int, query: int) -> int:
        """Of the layers from `layer` on, at the positions from `query` on."""
        keys = sum(range(query + 1, n_tokens + 1))
        positions = n_tokens - query
        return sum(positions * linear + keys * self.key for linear in self.linear[layer:]) + self.unembedding

    def clean(self, n_tokens: int) -> int:
        """Of one clean run."""
        return self.row(n_tokens, 0, 0)

    def cone(self, n_tokens: int, cells: Sequence[Cell]) -> int:
        """Of all cells, and of one clean row for every query position that they begin at."""
        lowest: dict[int, int] = {}
        for cell in cells:
            lowest[cell.first_query] = min(lowest.get(cell.first_query, cell.first_layer), cell.first_layer)
        rows = sum(self.row(n_tokens, cell.first_layer, cell.first_query) for cell in cells)
        return rows + sum(self.row(n_tokens, layer, query) for query, layer in lowest.items())


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that work took."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def matmul_size(device: torch.device) -> int:
    """Rows and columns of the matrices that the machine's rate is measured with: enough to keep it busy."""
    return 8192 if device.type == "cuda" else 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, times: int = 10) -> float:
    """Operations a second of the best of several products of two square matrices."""
    n = matmul_size(device)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    return 2 * n**3 / min(timed(device, lambda: torch.mm(a, b, out=out)) for _ in range(times))


def onednn_rate(times: int = 10) -> float:
    """The same on a CPU in float32 by oneDNN, where torch asks MKL, which does not use all of every processor."""
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    product = torch.ops.mkldnn._linear_pointwise
    cpu = torch.device("cpu")
    return 2 * n**3 / min(timed(cpu, lambda: product(a, b, None, "none", [], "")) for _ in range(times))


class PeakMemory:
    """How much more memory was in use, at most, than when it was entered: a GPU's, or this process's on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self.before = device, 0, 0

    def __enter__(self) -> "PeakMemory":
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
        self.before = self._peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._peak() - self.before

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0
