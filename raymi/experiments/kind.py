"""What a kind of experiment is: all that jobs, plans, the cluster and the store know of one. No torch.

A kind is a folder of this room, or a package of somebody else's: `raymi.experiments.kinds` finds them. It says what is
measured of a prompt as pieces of work, each a row or, for kinds that read whole texts, as many as it makes.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field, model_validator

from raymi.catalog import CachedModel
from raymi.corpus import Corpus
from raymi.experiments.axes import Axis, Position, pieces_of, positions
from raymi.experiments.costs import Cost
from raymi.fields import Fields, Names, NotEmpty
from raymi.heads import Heads
from raymi.prompts import TokenizedPrompt

if TYPE_CHECKING:
    import pyarrow as pa

    from raymi.experiments.autoencoders.refs import SaeRef


class Work:
    """One piece of what is measured of one text; a frozen dataclass, equal where the same would be measured."""

    __slots__ = ()

    def said(self, heads: Heads | None) -> Sequence[object]:
        """What the name of a unit depends on, as values that JSON knows: by default all fields, in their order.

        `heads` are those of the model's layers, as its config says.
        """
        return [getattr(self, field.name) for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]

    def starts_at(self) -> tuple[int, int]:
        """The first layer and the first position that have to be computed again."""
        raise NotImplementedError(f"{type(self).__name__} does not say from where on it changes a forward")

    def n_rows(self, n_tokens: int) -> int:
        """About how many rows of a batch it is, in a text of so many tokens."""
        return 1

    def autoencoders(self) -> "tuple[SaeRef, ...]":
        """Those that it needs."""
        return ()

    def cut_edges(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The layers in which it cuts edges of the attention, and these: (query, key). By default it cuts none."""
        return (), ()


Company = list[tuple[TokenizedPrompt, tuple[Work, ...]]]
"""Work that is measured together: of prompts of one length."""


class Spec(Fields):
    """One experiment of a job. Each kind has fields of its own beside these."""

    kind: Any
    """Its kind's name, as a literal."""
    name: str = Field(default="", min_length=1)
    """What rows and reports call it."""
    prompts: Annotated[Names, NotEmpty] = ("*",)
    """Ids of the job's prompts to measure, as shell patterns."""

    named_by: ClassVar[str] = "kind"
    """The field that gives its name where nothing else is said."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        given = cast(Mapping[str, object], data)
        said = given.get(cls.named_by)
        return {"name": said, **given} if isinstance(said, str) else given

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def table(self) -> str:
        """The table of the store that its rows go to."""
        raise NotImplementedError(f"{type(self).__name__} does not say which table its rows go to")

    @property
    def texts(self) -> Corpus | None:
        """What it measures in place of the job's prompts."""
        return None

    @property
    def asks_for_answers(self) -> bool:
        """Whether it looks at the next token after a prompt."""
        return True

    @property
    def sums_prompts(self) -> bool:
        """Whether its rows are sums over prompts, out of which none can be taken afterwards."""
        return False

    @property
    def axes(self) -> Mapping[str, Axis[Position]]:
        """The axes along which it names positions, by field."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name, field in fields.items() if field.annotation == Axis[Position]}

    @property
    def pieces(self) -> frozenset[str]:
        """The pieces of the prompts' texts whose positions it names: `subject`, `text:...`."""
        return frozenset(piece for axis in self.axes.values() for piece in pieces_of(axis))

    @property
    def canonical(self) -> str:
        """The same experiment, however written, as the same JSON: what the names of runs and units are made of."""
        # Defaults are left out, so that a field to come does not give the experiments of today other names.
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))

    def chooses(self, prompt_id: str) -> bool:
        """Whether the text is one that this experiment measures."""
        if self.texts is not None:
            return self.texts.holds(prompt_id)
        return any(fnmatchcase(prompt_id, pattern) for pattern in self.prompts)

    # -- what it measures --------------------------------------------------------------------------------------------

    def check(self, model: CachedModel) -> None:
        """Raises UserError with what the experiment names and a model, by its config, has not."""

    def check_prompt(self, prompt: TokenizedPrompt) -> None:
        """Raises UserError with the position that the experiment names and a prompt has not."""
        for axis in self.axes.values():
            positions(self.name, axis, prompt)

    def confirm(self, model: CachedModel, attention_layers: Sequence[int], heads: Heads | None) -> None:
        """Whether what was planned by a model's config is what the loaded model has.

        Args:
            model: as it was planned for.
            attention_layers: the layers that have attention, ascending, as the loaded model shows them.
            heads: the heads of its layers, as its attention is called with them; None: not looked at.

        Raises:
            UserError: it is not, and the experiment would measure something else.
        """

    def work(self, prompt: TokenizedPrompt, model: CachedModel, saes: "Sequence[SaeRef]") -> Sequence[Work]:
        """All that is measured of one text, in an order that is always the same, nothing twice.

        Args:
            prompt: as the model reads it.
            model: the model.
            saes: the autoencoders that it uses on the model (`raymi.experiments.autoencoders`).

        Raises:
            UserError: the prompt or the model has not what the experiment names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    # -- what that costs ---------------------------------------------------------------------------------------------

    @property
    def reads_texts(self) -> bool:
        """Whether whole texts are measured, and not changes at places of them."""
        return False

    def clean_price(self, cost: Cost) -> int:
        """Arithmetic of the clean run of a text."""
        return cost.full

    def price(self, work: Work, cost: Cost, *, full: bool) -> int:
        """Arithmetic of a piece of work; by full forwards, or from where it starts."""
        return cost.full if full else cost.restarted(*work.starts_at())

    def batches(
        self, items: Sequence[tuple[str, Sequence[Work]]], n_tokens: int, *, full: bool
    ) -> Iterator[tuple[int, int, int]]:
        """(rows, positions computed, positions attended to) of what a unit's items go through the model in."""
        by_start = Counter[int]()
        for _, its in items:
            for work in its:
                by_start[work.starts_at()[1]] += work.n_rows(n_tokens)
        if full:
            yield by_start.total() + len(items), n_tokens, n_tokens
            return
        for start, n_rows in by_start.items():
            yield n_rows + 1, n_tokens - start, n_tokens


Facts = frozenset[tuple[Any, ...]]
"""Of a unit's rows, the values of some columns."""


def _nothing_known(facts: Facts, planned: Sequence[Work]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of rows of units."""

    schema: "pa.Schema"
    of_row: tuple[str, ...] = ("ablation_id",)
    """Columns that name a row within its unit."""
    of_work: tuple[str, ...] = ("ablation_id",)
    """Columns that name a piece of work within its unit, as plans count them."""
    times: str | None = None
    """A column that says how many of them a row is; None: one."""
    facts: tuple[str, ...] = ()
    """Columns that tell units apart which an older raymi has planned otherwise."""
    gone: Callable[[Facts, Sequence[Work]], str | None] = _nothing_known
    """Why a stored unit with such facts is not among what is planned of its experiment now; None: it cannot tell."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of experiment, as the registry hands it out."""

    name: str
    """What `kind:` of a job file says."""
    spec: type[Spec]
    tables: "Mapping[str, Table]"
    """Where rows of its units go, by name."""
    running: str
    """Module with its functions `measure` and `verify`; imported where a model is, since it needs torch."""
