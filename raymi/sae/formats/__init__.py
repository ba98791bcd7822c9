"""One module per format on disk. Each says which folders are its own, and what is in them. No torch."""

from raymi.sae.formats import dictionary_learning, gemma_scope, gemma_scope_2, llama_scope, saelens, sparsify
from raymi.sae.formats.base import Format
from raymi.sae.source import Source

FORMATS: tuple[Format, ...] = (
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    llama_scope.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    saelens.FORMAT,
)
"""In the order in which they are asked."""


def recognise(source: Source) -> Format | None:
    """The format of the autoencoder in a folder, None where there is none."""
    return next((form for form in FORMATS if form.file(source) is not None), None)
