"""Sparse autoencoders on a model: what is measured with which of them, and what rows of the results say. No torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from raymi.catalog import CachedModel
from raymi.corpus import Corpus
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import FACTS, SaeRef, WithSaes, gone
from raymi.experiments.axes import Axis, Position, positions
from raymi.experiments.columns import EFFECTS, HOW
from raymi.experiments.costs import Cost
from raymi.experiments.kind import Kind, Table, Work
from raymi.fields import Fields, problem
from raymi.heads import Heads
from raymi.prompts import TokenizedPrompt

Measure = Literal["features", "quality", "injection", "ablation"]


@dataclass(frozen=True, slots=True)
class Injection(Work):
    """One row to measure: `strength` times a feature's decoder row is added at `positions`."""

    sae: SaeRef
    feature: int
    strength: float
    positions: tuple[int, ...]
    """Ascending, non-negative."""

    def said(self, heads: Heads | None) -> Sequence[object]:
        return [self.sae.identity, self.feature, self.strength, self.positions]

    def starts_at(self) -> tuple[int, int]:
        return self.sae.layer, self.positions[0]

    def autoencoders(self) -> tuple[SaeRef, ...]:
        return (self.sae,)


class Skip(Fields):
    """Tokens that do not count."""

    special: bool = Field(default=True, strict=True)
    """BOS, EOS and the tokenizer's other special tokens but those of chat templates, as SAELens has it."""
    first: int = Field(default=0, strict=True, ge=0)
    """So many positions at the beginning of every text: first positions often carry activations of another size."""

    def __str__(self) -> str:
        parts = [*(["special tokens"] if self.special else []), *([f"the first {self.first}"] if self.first else [])]
        return " and ".join(parts) or "nothing"


def _listed(value: object) -> object:
    return cast(object, value) if isinstance(value, list | tuple) else [value]


class SaeSpec(WithSaes):
    """One experiment with autoencoders: every one that is chosen, on every text that is chosen.

    `features`: which features are active at every token. `quality`: how well activations are reconstructed, and what
    the model makes of the reconstruction. `injection`: what features do that are added. `ablation`: what each active
    feature of a prompt does, by taking it out.
    """

    kind: Literal["sae"]
    measure: Measure
    corpus: Corpus | None = None
    """Texts in place of the prompts; for `features` and `quality`."""
    skip: Skip = Skip()
    features: Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], BeforeValidator(_listed)] = ()
    """What to inject, each by itself."""
    strengths: Annotated[
        tuple[Annotated[float, Field(strict=True, allow_inf_nan=False)], ...], BeforeValidator(_listed)
    ] = ()
    positions: Axis[Position] = Axis[Position](each=("last",))
    """Where to inject."""

    named_by: ClassVar[str] = "measure"

    @model_validator(mode="after")
    def _fits_together(self) -> "SaeSpec":
        of_injection = {"features": self.features, "strengths": self.strengths}
        for field, given in of_injection.items():
            if self.measure == "injection" and not given:
                raise problem("found nothing; allowed: at least one", field)
            if self.measure != "injection" and given:
                raise problem(f"is for injection, not for {self.measure}", field)
        if self.measure != "injection" and self._says("positions"):
            raise problem(f"is for injection, not for {self.measure}; `skip` says which tokens count", "positions")
        if self.measure == "injection" and self._says("skip"):
            raise problem("injection measures at `positions`; there is nothing to skip", "skip")
        if self.corpus is not None and self.measure in ("injection", "ablation"):
            raise problem(f"is for features and quality; {self.measure} is measured on prompts", "corpus")
        if self.corpus is not None and self._says("prompts"):
            raise problem("found a corpus beside it; allowed: one of the two", "prompts")
        return self

    def _says(self, field: str) -> bool:
        """Whether a field was given anything but what it is without being given."""
        return getattr(self, field) != type(self).model_fields[field].default

    @property
    def canonical(self) -> str:
        said = self.model_dump(mode="json", exclude_defaults=True)
        if self.corpus is not None:
            said["corpus"] = self.corpus.canonical
        return json.dumps(said, sort_keys=True, separators=(",", ":"))

    @property
    def table(self) -> str:
        return TABLES[self.measure]

    @property
    def sums_prompts(self) -> bool:
        return self.measure == "quality" and self.corpus is None

    @property
    def texts(self) -> Corpus | None:
        return self.corpus

    @property
    def asks_for_answers(self) -> bool:
        return self.measure in ("injection", "ablation")

    @property
    def reads_texts(self) -> bool:
        return self.measure in ("features", "quality")

    def check_saes(self, model_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        widest = max(record["d_sae"] for record in records)
        for feature in self.features:
            if feature >= widest:
                raise UserError(
                    f"{model_id}: experiment {self.name!r}: features: {feature} is out of range: "
                    f"the widest of its SAEs has {widest:,} features (0 to {widest - 1})"
                )

    def check_prompt(self, prompt: TokenizedPrompt) -> None:
        if self.measure == "injection":
            super().check_prompt(prompt)

    def work(self, prompt: TokenizedPrompt, model: CachedModel, saes: Sequence[SaeRef]) -> Sequence[Work]:
        return work(self, prompt, saes)

    def clean_price(self, cost: Cost) -> int:
        return cost.full + (self.measure == "quality") * cost.elsewhere

    def price(self, work: Work, cost: Cost, *, full: bool) -> int:
        forward = super().price(work, cost, full=full)
        if not isinstance(work, SaeRef):
            return forward
        encoded = 2 * cost.n_tokens * cost.hidden * work.d_sae
        match self.measure:
            case "features":
                return encoded
            case "ablation":
                return encoded + work.n_rows(cost.n_tokens) * forward
            case _:  # with its output, and with zeros in the place
                return encoded + 2 * (forward + cost.elsewhere)

    def batches(
        self, items: Sequence[tuple[str, Sequence[Work]]], n_tokens: int, *, full: bool
    ) -> Iterator[tuple[int, int, int]]:
        if not self.reads_texts:
            yield from super().batches(items, n_tokens, full=full)
            return
        # Clean; for quality also with each autoencoder's output, and with zeros in the place.
        for _ in range(1 if self.measure == "features" else 1 + 2 * len(items[0][1])):
            yield len(items), n_tokens, n_tokens


TABLES: dict[Measure, str] = {
    "features": "sae_features",
    "quality": "sae_quality",
    "injection": "sae_injections",
    "ablation": "sae_ablations",
}


def work(spec: SaeSpec, prompt: TokenizedPrompt, saes: Sequence[SaeRef]) -> tuple[Work, ...]:
    """What an experiment measures on one text, ordered by (first position, autoencoder, feature, strength), none twice.

    Raises UserError when the prompt has not a position that it names.
    """
    if spec.measure != "injection":
        return tuple(saes)
    places = sorted(positions(spec.name, spec.positions, prompt))
    features, strengths = sorted(set(spec.features)), sorted(set(spec.strengths))
    return tuple(
        Injection(sae, feature, strength, at)
        for at in places
        for sae in saes
        for feature in features
        if feature < sae.d_sae
        for strength in strengths
    )


def cell_id(model_id: str, token_ids: Sequence[int], sae: SaeRef, what: Sequence[Any]) -> str:
    """16 hexadecimal digits that name an injection or an ablation in every run, revision and dtype."""
    said = ["sae", model_id, list(token_ids), sae.identity, what]
    return hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).hexdigest()[:16]


_ABOUT: tuple[tuple[str, pa.DataType], ...] = (
    ("unit_id", pa.string()),
    ("experiment", pa.string()),
    ("model_id", pa.string()),
    ("revision", pa.string()),
    ("dtype", pa.string()),
    ("sae", pa.string()),
    ("sae_version", pa.string()),
    ("site", pa.string()),
    # Whether its files say that texts began with BOS where these do not, or the other way round; null where they do not
    # say, or an older raymi did not look.
    ("bos_differs", pa.bool_()),
)

FEATURES = pa.schema(
    [
        *_ABOUT,
        ("skipped", pa.string()),
        ("prompt_id", pa.string()),
        ("n_tokens", pa.int32()),
        # Null, all three, in the one row of a text without a token that counts.
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        # The active features, the largest first, and their activations; parallel, perhaps empty.
        ("features", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
    ]
)
"""Table `sae_features`: one row a token that counts and autoencoder."""

QUALITY = pa.schema(
    [
        *_ABOUT,
        ("skipped", pa.string()),
        ("definitions", pa.string()),
        ("engine", pa.string()),
        ("texts", pa.int64()),
        ("d_sae", pa.int64()),
        # Sums over the tokens that count, of this unit's texts: rows add up to the sums of all texts.
        ("tokens", pa.int64()),
        ("sum_x", pa.list_(pa.float64())),
        *(
            (name, pa.float64())
            for name in (
                *("sum_x2", "sum_residual2", "sum_out2", "sum_x_out", "sum_norm_in", "sum_norm_out", "sum_norm_ratio"),
                *("sum_cosine", "sum_l0", "sum_l1"),
            )
        ),
        # Features that fired, ascending; at how many tokens, and in how many texts. All others fired at none.
        ("fired_features", pa.list_(pa.int32())),
        ("fired_tokens", pa.list_(pa.int64())),
        ("fired_texts", pa.list_(pa.int64())),
        # What became of the model's output: next-token losses and divergences in nats.
        ("loss_tokens", pa.int64()),
        *((name, pa.float64()) for name in ("sum_loss_clean", "sum_loss_sae", "sum_loss_ablated")),
        ("kl_tokens", pa.int64()),
        *((name, pa.float64()) for name in ("sum_kl_sae", "sum_kl_ablated")),
    ]
)
"""Table `sae_quality`: one row a unit and autoencoder."""

_CELL: tuple[tuple[str, pa.DataType], ...] = (
    *_ABOUT,
    ("ablation_id", pa.string()),
    ("prompt_id", pa.string()),
    ("n_tokens", pa.int32()),
    ("layer", pa.int16()),
    ("feature", pa.int32()),
    ("positions", pa.list_(pa.int32())),
)
_MEASURED: tuple[tuple[str, pa.DataType], ...] = (
    # The largest change of any logit.
    ("logit_shift", pa.float64()),
    *EFFECTS,
    *HOW,
)

INJECTIONS = pa.schema([*_CELL, ("strength", pa.float64()), *_MEASURED])
"""Table `sae_injections`: one row a feature, strength, set of positions and prompt."""

ABLATIONS = pa.schema([*_CELL, ("skipped", pa.string()), ("values", pa.list_(pa.float64())), *_MEASURED])
"""Table `sae_ablations`: one row a prompt and feature that was active, at all `positions` where it was, with the
`values` it had there; what the autoencoder does not explain stays. A prompt without any has one row without feature."""

SCHEMAS: dict[str, pa.Schema] = {
    "sae_features": FEATURES,
    "sae_quality": QUALITY,
    "sae_injections": INJECTIONS,
    "sae_ablations": ABLATIONS,
}

KIND = Kind(
    "sae",
    SaeSpec,
    {
        "sae_features": Table(
            FEATURES, ("sae", "site", "prompt_id", "position"), (*FACTS, "prompt_id"), facts=FACTS, gone=gone
        ),
        "sae_quality": Table(QUALITY, FACTS, FACTS, times="texts", facts=FACTS, gone=gone),
        "sae_injections": Table(INJECTIONS, facts=FACTS, gone=gone),
        "sae_ablations": Table(
            ABLATIONS, ("ablation_id", "prompt_id", "sae", "site"), (*FACTS, "prompt_id"), facts=FACTS, gone=gone
        ),
    },
    running="raymi.experiments.sae.run",
)
