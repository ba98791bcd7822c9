"""Texts by the chunk: a corpus of a file, cut to a model's tokens."""

from pathlib import Path
from typing import Any

from pydantic import Field

from raymi.fields import Fields


class Corpus(Fields):
    """The texts of a file, cut into chunks of equally many tokens by each model's tokenizer."""

    file: Path
    """JSONL, Parquet, or plain text; relative to the job file."""
    field: str = "text"
    """Of a JSONL or Parquet row."""
    context: int = Field(default=128, strict=True, ge=2)
    """Tokens of a chunk, BOS included."""
    chunks: int | None = Field(default=None, strict=True, ge=1)
    """At most so many, from the beginning."""

    @property
    def canonical(self) -> dict[str, Any]:
        raise NotImplementedError

    def holds(self, prompt_id: str) -> bool:
        raise NotImplementedError
