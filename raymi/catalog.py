"""The models in a Hugging Face cache: what is there, what of it can run, and why the rest cannot."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One snapshot of one model, described by what its own files say (config.json, safetensors headers)."""

    id: str
    revision: str
    """The commit: 40 hexadecimal digits."""
    path: Path
    """The snapshot folder."""
    model_type: str | None
    n_layers: int | None
    n_heads: int | None
    """Query heads."""
    hidden_size: int | None
    vocab_size: int | None
    context: int | None
    """Longest prompt in tokens, where the config states one."""
    parameters: int | None
    size_on_disk: int
    """Bytes."""
    dtype: str | None
    """As stored: float32, bfloat16, ..."""
    reason: str | None
    """Why it cannot run, or None when it can."""

    @property
    def runnable(self) -> bool:
        return self.reason is None
