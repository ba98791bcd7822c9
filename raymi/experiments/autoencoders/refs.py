"""Autoencoders as jobs choose them and plans know them: shared by the kinds that need some. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from raymi import paths
from raymi.experiments.kind import Facts, Spec, Work
from raymi.fed import Fed
from raymi.fields import Fields, NotEmpty, problem
from raymi.heads import Heads
from raymi.sae.description import MLP_INPUT, NORMALISED


@dataclass(frozen=True, slots=True)
class SaeRef(Work):
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

    # As a piece of work, it reads a whole text.

    def said(self, heads: Heads | None) -> Sequence[object]:
        return self.identity

    def starts_at(self) -> tuple[int, int]:
        return self.layer, 0

    def n_rows(self, n_tokens: int) -> int:
        return min(self.d_sae, ACTIVE * n_tokens)

    def autoencoders(self) -> "tuple[SaeRef, ...]":
        return (self,)


ACTIVE = 32
"""Features that are taken for active at one token: plans are made before anything is encoded."""


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
        path = (self._folder or Path()) / paths.at_home(self.sae)
        return path if paths.exists(path) else None


_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(@|:|$)")


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


class WithSaes(Spec):
    """An experiment that needs autoencoders."""

    saes: Annotated[tuple[SaeChoice, ...], BeforeValidator(_listed), NotEmpty] = (SaeChoice(sae="*"),)
    any_model: bool = Field(default=False, strict=True)
    """Whether an autoencoder may be used on another model than its own, if the sizes fit."""

    def check_saes(self, model_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError when these, rows of table `saes`, have not what the experiment names."""


FACTS = ("sae", "sae_version", "site")
"""Columns by which stored units with autoencoders are told apart (`Table.facts`)."""


def gone(facts: Facts, planned: Sequence[Work]) -> str | None:
    """Why a stored unit is not planned any more (`Table.gone`)."""
    saes = {sae for work in planned for sae in work.autoencoders()}
    by_name = {sae.name: sae for sae in saes}
    for name, version, site in sorted(facts):
        if name not in by_name:
            return f"{name} is not among the autoencoders of this experiment any more"
        now = by_name[name]
        if not any((sae.name, sae.site) == (name, site) for sae in saes):
            return f"{name} was measured at {site}, and belongs at {now.site}"
        if not any((sae.name, sae.version) == (name, version) for sae in saes):
            return f"{name} was measured as of {version[:12]}, and is now at {now.version[:12]}"
    return (
        f"what {', '.join(sorted({name for name, _, _ in facts}))} is given or stands for has changed"
        if facts
        else None
    )


def fed_as(saes: Sequence[SaeRef]) -> Fed | None:
    """How the texts of an experiment with these autoencoders begin; None: as the tokenizer has it."""
    return saes[0].bos if saes else None
