"""Sparse autoencoders on a model: what is measured with which of them, and what rows of the results say. No torch."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pyarrow as pa
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from raymi.corpus import Corpus
from raymi.experiments.axes import Axis, Position, pieces_of, positions
from raymi.experiments.columns import EFFECTS, HOW
from raymi.fed import Fed
from raymi.fields import Fields, Names, NotEmpty, problem
from raymi.prompts import TokenizedPrompt
from raymi.sae.description import MLP_INPUT, NORMALISED

Measure = Literal["features", "quality", "injection", "ablation"]


@dataclass(frozen=True, slots=True)
class SaeRef:
    """One autoencoder as a plan knows it, pinned."""

    name: str
    """What rows call it: `repo:path`, or the folder as the job writes it."""
    where: str
    """What `raymi.sae.load` is given: `repo@commit:path`, or a folder."""
    version: str
    """The commit, or the sha256 of a local file."""
    site: str
    site_out: str | None
    """What a transcoder predicts; None for an autoencoder, which writes where it reads."""
    d_sae: int
    input_scale: float | None = None
    centred: bool = False
    """Whether it takes activations without their mean over the width."""
    prepend_bos: bool | None = None
    """Whether its files say that its texts began with BOS."""
    bos: Fed | None = None
    """How texts begin for the experiment, where its autoencoders want that otherwise than the tokenizer has it."""
    plain: str | None = None
    """What the plan took for the same place: `mlp.hook_out` where no norm stands behind the module. To be confirmed."""
    z_moved: bool = False
    """Whether its site is an `attn.hook_z` that an older raymi took to be something else."""

    @property
    def written(self) -> str:
        """The site that its output belongs to."""
        return self.site_out or self.site

    @property
    def layer(self) -> int:
        """The layer of the place that its output belongs to; embeddings count as the first."""
        match = re.match(r"blocks\.(\d+)\.", self.written)
        return int(match[1]) if match else 0

    @property
    def identity(self) -> list[object]:
        """What its numbers depend on, beside the model and the text."""
        # What an MLP is fed was called so when the first rows were measured.
        site = self.site.replace(MLP_INPUT, NORMALISED)
        said: list[object] = [self.name, self.version, site, self.site_out, self.input_scale]
        if self.site.endswith(NORMALISED):
            said.append("before the norm's weights")
        return [*said, *(["centred"] if self.centred else []), *(["z before gates and norms"] if self.z_moved else [])]


@dataclass(frozen=True, slots=True)
class Injection:
    """One row to measure: `strength` times a feature's decoder row is added at `positions`."""

    sae: SaeRef
    feature: int
    strength: float
    positions: tuple[int, ...]
    """Ascending, non-negative."""


class SaeChoice(Fields):
    """Autoencoders of a job: a folder, `repo[@revision][:path]`, or a shell pattern over those in the cache."""

    sae: str = Field(min_length=1)
    site: str | None = None
    """The hook point, where its files do not say."""
    site_out: str | None = None
    """The one that a transcoder predicts, where its files do not say."""
    input_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What its inputs are multiplied with, where it normalises them by an average that no file states."""
    _folder: Path | None = PrivateAttr(default=None)
    """Of the job file, which a folder is relative to."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: object) -> object:
        return {"sae": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _is_a_place(self, info: ValidationInfo) -> "SaeChoice":
        if self._folder is None:
            self._folder = Path((info.context or {}).get("folder", Path())).absolute()
        if not self.is_pattern and self.local is None and not _REPOSITORY.match(self.sae):
            message = f"there is no folder {str(self._folder / self.sae)!r}, and repositories are written org/name:path"
            raise problem(message, "sae")
        if self.is_pattern and self.input_scale is not None:
            raise problem("is for one SAE, and this is a pattern; name the SAE", "input_scale")
        return self

    @property
    def is_pattern(self) -> bool:
        return any(character in self.sae for character in "*?[")

    @property
    def local(self) -> Path | None:
        """The folder that it names, or file, if there is one; such a name wins over a repository's."""
        path = (self._folder or Path()) / Path(self.sae).expanduser()
        return path if path.exists() else None


class Skip(Fields):
    """Tokens that do not count."""

    special: bool = Field(default=True, strict=True)
    """BOS, EOS and the tokenizer's other special tokens but those of chat templates, as SAELens has it."""
    first: int = Field(default=0, strict=True, ge=0)
    """So many positions at the beginning of every text: first positions often carry activations of another size."""

    def __str__(self) -> str:
        parts = [*(["special tokens"] if self.special else []), *([f"the first {self.first}"] if self.first else [])]
        return " and ".join(parts) or "nothing"


_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(@|:|$)")


def _listed(value: object) -> object:
    return cast(object, value) if isinstance(value, list | tuple) else [value]


class SaeSpec(Fields):
    """One experiment with autoencoders: every one that is chosen, on every text that is chosen.

    `features`: which features are active at every token. `quality`: how well activations are reconstructed, and what
    the model makes of the reconstruction. `injection`: what features do that are added. `ablation`: what each active
    feature of a prompt does, by taking it out.
    """

    kind: Literal["sae"]
    measure: Measure
    name: str = Field(default="", min_length=1)
    saes: Annotated[tuple[SaeChoice, ...], BeforeValidator(_listed), NotEmpty] = (SaeChoice(sae="*"),)
    any_model: bool = Field(default=False, strict=True)
    """Whether an autoencoder may be used on another model than its own, if the sizes fit."""
    prompts: Annotated[Names, NotEmpty] = ("*",)
    """Ids of the job's prompts, as shell patterns."""
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

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        given = cast(Mapping[str, object], data)
        return {"name": given["measure"], **given} if isinstance(given.get("measure"), str) else given

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
    def pieces(self) -> frozenset[str]:
        """The pieces of the prompts' texts whose positions it names."""
        return frozenset(pieces_of(self.positions))

    @property
    def canonical(self) -> str:
        """The same experiment, however written, as the same JSON: what the names of runs and units are made of."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        if self.corpus is not None:
            said["corpus"] = self.corpus.canonical
        return json.dumps(said, sort_keys=True, separators=(",", ":"))

    def chooses(self, prompt_id: str) -> bool:
        """Whether the prompt is one that this experiment measures."""
        if self.corpus is not None:
            return self.corpus.holds(prompt_id)
        return any(fnmatchcase(prompt_id, pattern) for pattern in self.prompts)

    @property
    def table(self) -> str:
        """Where its rows go."""
        return TABLES[self.measure]

    @property
    def sums_prompts(self) -> bool:
        """Whether its rows are sums over prompts, out of which none can be taken afterwards."""
        return self.measure == "quality" and self.corpus is None


TABLES: dict[Measure, str] = {
    "features": "sae_features",
    "quality": "sae_quality",
    "injection": "sae_injections",
    "ablation": "sae_ablations",
}


def fed_as(saes: Sequence[SaeRef]) -> Fed | None:
    """How the texts of an experiment with these autoencoders begin; None: as the tokenizer has it."""
    return saes[0].bos if saes else None


Work = SaeRef | Injection
"""What is done with one text: an autoencoder reads all of it, or one injection is made."""


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
