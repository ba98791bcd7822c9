"""What was measured, and what it was meant to be."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FULL_EACH, FULL = "raymi, a full forward each", "raymi, full forwards in batches"


class PeerResult(NamedTuple):
    seconds: float
    """Of an ablation."""
    sample: int
    """How many were measured."""
    difference: float | None
    """Largest difference in logits from the plain loop."""


@dataclass(frozen=True)
class Measured:
    """A case, and what an ablation of it took."""

    name: str
    about: str
    n_cells: int
    seconds: float
    """Of an ablation, without metrics."""
    seconds_with_metrics: float
    clean_seconds: float
    """Of the clean run that comes before all of them; 0 where it is counted with the ablations."""
    flops: float
    """Needed for an ablation."""
    matmul_rates: tuple[float, float]
    """Floating-point operations a second of a large matrix product, right before and right after."""
    peak_bytes: int
    """Memory that measuring took, beside the weights."""
    peers: Mapping[str, PeerResult]
    difference: float
    """Largest difference in logits from the plain loop."""
    effect: float
    """Largest effect on a logit in the plain loop."""

    @property
    def share(self) -> float:
        """Of the machine's matrix-product rate (the better of the two), that what was needed was computed with."""
        return self.flops / self.seconds / max(self.matmul_rates)

    def ratio(self, peer: str) -> float | None:
        """How many times as long a peer takes."""
        return self.peers[peer].seconds / self.seconds if peer in self.peers else None


class Aim(NamedTuple):
    what: str
    wanted: float
    found: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


SHARES = {"heads-5": 0.6, "heads-128": 0.8, "heads-1000": 0.6}
RATIOS = {
    # In batches a full forward of 5 tokens costs seven times the arithmetic of the cone, and no more.
    FULL_EACH: {"heads-5": 40, "heads-128": 200, "heads-1000": 800},
    "TransformerLens": {"heads-5": 100, "heads-128": 300, "heads-1000": 1500},
    "plain loop": {"prompts": 10},
}
LARGEST_DIFFERENCE = 5e-4
"""In float32, and in logits."""
METRICS = 1.2
LONG_AGAINST_SHORT = 1.5


def aims(results: Sequence[Measured], dtype: str) -> Iterator[Aim]:
    """What raymi is to reach on a quiet machine of two cores with the demo model, and what it did."""
    by_name = {result.name: result for result in results}
    for name, share in SHARES.items():
        if name in by_name:
            yield Aim(f"{name}: share of the matrix-product rate", share, by_name[name].share, True)
    if {"heads-16", "heads-1000"} <= by_name.keys():
        longer = by_name["heads-1000"].seconds / by_name["heads-16"].seconds
        yield Aim("an ablation at 1,000 tokens against one at 16", LONG_AGAINST_SHORT, longer, False)
    for peer, ratios in RATIOS.items():
        for name, wanted in ratios.items():
            found = by_name[name].ratio(peer) if name in by_name else None
            if found is not None:
                yield Aim(f"{name}: times as fast as {peer}", wanted, found, True)
    for result in results:
        yield Aim(f"{result.name}: with metrics", METRICS, result.seconds_with_metrics / result.seconds, False)
    if dtype == "float32":
        yield Aim("largest difference in logits", LARGEST_DIFFERENCE, max(r.difference for r in results), False)
