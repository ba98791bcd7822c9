"""What a model in a notebook gives, and how it is shown.

Legend: A ablations, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from raymi.errors import UserError, quoted
from raymi.heatmap import heatmap
from raymi.model.metrics import Comparison, Effects
from raymi.notebook import html
from raymi.outlet import clean
from raymi.prompts import TokenizedPrompt
from raymi.tokenizer import token_texts

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Forward:
    """What one forward of one prompt gave. Tensors are on the model's device."""

    prompt: TokenizedPrompt
    """With `token_ids` and `tokens`: what the model was given."""
    logits: Tensor
    """[V] float32, of the last position."""
    cache: dict[str, Tensor]
    """Site name -> what was there, with TransformerLens's shapes and a batch axis of 1, in the model's dtype."""
    tokenizer: Any

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.prompt.tokens

    def top(self, k: int = 10) -> pl.DataFrame:
        """The k most likely next tokens: rank (0 is the first), token_id, token, logit, prob."""
        return top_tokens(self.logits, self.tokenizer, k)

    def __repr__(self) -> str:
        sites = "".join(f"\n{name} {list(value.shape)}" for name, value in self.cache.items())
        return clean(f"{list(self.tokens)} ->\n{self.top(5)}{sites}")

    def _repr_html_(self) -> str:
        sites = [f"{name} {list(value.shape)}" for name, value in self.cache.items()]
        return html.block(f"{list(self.tokens)} ->", self.top(5), *sites)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ablated:
    """A prompt run clean and run with interventions, in one batch."""

    clean: Forward
    ablated: Forward
    kl: float
    """KL(clean || ablated) of the next token, in nats."""
    fired: int
    """How often the interventions acted, counted where they did."""
    empty_rows: int
    """Attention lines (layer, head, query) left without any key, which attend to nothing."""
    closed: int | None = None
    """Edges to cut that the model's own mask (a window, a chunk) had closed before; None where that is not known."""

    def changed(self, k: int = 10) -> pl.DataFrame:
        """The k most changed tokens, |change| descending: token_id, token, prob_clean, prob_ablated."""
        _check_count(k)
        found = compared(self.clean.logits, self.ablated.logits, k)
        ids: list[int] = found.changed_AC[0].tolist()
        texts = token_texts(self.clean.tokenizer, ids)
        return pl.DataFrame(
            {
                "token_id": ids,
                "token": [texts[i] for i in ids],
                "prob_clean": found.changed_clean_AC[0].tolist(),
                "prob_ablated": found.changed_ablated_AC[0].tolist(),
            }
        )

    @property
    def _said(self) -> str:
        closed = f", {self.closed} edges were closed before" if self.closed else ""
        return f"KL {self.kl:.6f} nats; {self.fired} interventions fired{closed}"

    def __repr__(self) -> str:
        return clean(f"{self._said}\n{self.changed(5)}")

    def _repr_html_(self) -> str:
        return html.block(self._said, self.changed(5))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Sweep:
    """Ablations of one prompt, measured."""

    prompt: TokenizedPrompt
    frame: pl.DataFrame
    """One row an ablation, in the order asked for: the columns of `raymi.experiments.sweep.SCHEMA`, and beside its
    token ids and positions their texts (`position_token`, `answer_token`, `wrong_token`, `top1_clean_token`,
    `top1_ablated_token`, and `token` in `changed`)."""
    logits: Tensor | None = None
    """[A, V] float32 on the CPU, ablated, in the order of the frame; only with `keep_logits=True`."""

    _what: ClassVar[str] = "ablations"
    _asked: ClassVar[tuple[str, ...]] = ("layers", "sites", "head", "position")
    """Columns that say what was done."""

    @property
    def _said(self) -> str:
        return f"{self._what} of {list(self.prompt.tokens)}"

    @property
    def _shown(self) -> pl.DataFrame:
        return self.frame.select(*self._asked, "kl", "logit_diff", "top1_clean_token", "top1_ablated_token")

    def __repr__(self) -> str:
        return clean(f"{self._said}\n{self._shown}")

    def _repr_html_(self) -> str:
        return html.block(self._said, self._shown)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Knockouts(Sweep):
    """Knockouts of one prompt, measured.

    The frame has the columns of table `ablations`; `query_token` and `key_token` are the texts of its positions.
    """

    _what: ClassVar[str] = "knockouts"
    _asked: ClassVar[tuple[str, ...]] = ("layers", "heads", "queries", "keys")

    def heatmap(self, value: str = "logit_diff", x: str | None = None, y: str | None = None) -> "alt.Chart":
        """A heat map, drawn by altair (`pip install 'raymi[plots]'`).

        Args:
            value: a column of the frame, such as logit_diff (answer: clean - ablated), margin_diff or kl.
            x: layer, head, query or key; by default one in which the ablations differ.
            y: as `x`. Over what differs beside these two, the mean is drawn.

        Raises:
            UserError: altair is missing, the column is not there or null, or there is only one ablation.
        """
        return heatmap(self.frame, self.prompt.tokens, value, x, y, self.prompt.prompt.text)


def top_tokens(logits_V: Tensor, tokenizer: Any, k: int) -> pl.DataFrame:
    """The k most likely tokens, ties by id: rank (0 is the first), token_id, token, logit, prob."""
    _check_count(k)
    logits_V = logits_V.cpu().double()
    ids: list[int] = logits_V.sort(descending=True, stable=True).indices[:k].tolist()
    texts, probs_V = token_texts(tokenizer, ids), logits_V.softmax(0)
    return pl.DataFrame(
        {
            "rank": range(len(ids)),
            "token_id": ids,
            "token": [texts[i] for i in ids],
            "logit": logits_V[ids].tolist(),
            "prob": probs_V[ids].tolist(),
        }
    )


def compared(clean_V: Tensor, ablated_V: Tensor, top_k: int) -> Effects:
    """What one ablation did."""
    return Comparison(clean_V[None], ablated_V[None], torch.tensor([0], device=clean_V.device)).effects(top_k)


def _check_count(k: object) -> None:
    """Below 1 it would be cut off from the end, as slices are."""
    if not isinstance(k, int) or k < 1:
        raise UserError(f"k: found {quoted(k)}; allowed: 1 or more")
