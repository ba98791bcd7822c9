"""Arithmetic of a model's forwards, from what the catalog knows of it. No torch."""

from dataclasses import dataclass

from raymi.catalog import CachedModel


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic of a model at one prompt length. What the catalog does not know counts as nothing."""

    n_layers: int
    n_tokens: int
    per_position: int
    """Of one position through one layer: its weights, and attention to the whole prompt."""
    unembedding: int
    hidden: int

    @classmethod
    def of(cls, model: CachedModel, n_tokens: int) -> "Cost":
        hidden, vocabulary, n_layers = model.hidden_size or 0, model.vocab_size or 0, max(1, model.n_layers or 1)
        # A head of its own counts among the layers' weights: the catalog does not say whether it is tied.
        weights = max(0, (model.parameters or 0) - vocabulary * hidden) // n_layers
        return cls(n_layers, n_tokens, 2 * weights + 4 * n_tokens * hidden, 2 * vocabulary * hidden, hidden)

    @property
    def full(self) -> int:
        """One forward of the whole prompt, one position unembedded."""
        return self.n_layers * self.n_tokens * self.per_position + self.unembedding

    @property
    def elsewhere(self) -> int:
        """Unembedding all positions but one."""
        return (self.n_tokens - 1) * self.unembedding

    def restarted(self, layer: int, position: int) -> int:
        """From a layer and a position on, one position unembedded."""
        layers, positions = max(0, self.n_layers - layer), self.n_tokens - position
        return layers * positions * self.per_position + self.unembedding


def full_forward_flops(model: CachedModel, n_tokens: int) -> int:
    """Arithmetic of one prompt through the whole model."""
    return Cost.of(model, n_tokens).full
