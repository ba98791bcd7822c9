"""The job: what to measure, on which models and prompts, as a YAML file says it."""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from raymi.corpus import Corpus
from raymi.errors import UserError, quoted
from raymi.experiments.autoencoders.refs import WithSaes
from raymi.experiments.axes import pieces_of
from raymi.experiments.kind import Spec
from raymi.experiments.kinds import kinds, unusable
from raymi.fed import Fed, plain_id
from raymi.fields import NOTHING, Fields, Names, NotEmpty, all_said, found, missing, near, problem, say
from raymi.prompts import Bos, Prompt
from raymi.promptsets import resolve
from raymi.yamlfile import YamlFile


def _number(value: object) -> object:
    """A size as a number, which may be written `500M` or `1.5B`."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMB])", value.strip().upper()) if isinstance(value, str) else None
    if size:
        return round(float(size[1]) * {"K": 10**3, "M": 10**6, "B": 10**9}[size[2]])
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise problem(f"{found(value)}; allowed: a number of parameters, such as 500M or 1.5B", found=value)


def _device(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        return value
    kinds = ("auto", "cpu", "mps", "cuda")
    raise problem(f"{found(value)}; allowed: auto, cpu, mps, cuda or cuda:1{near(value, kinds)}", found=value)


def _name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        allowed = "letters, digits, '-', '_' and '.', beginning with a letter or digit, at most 100 of them"
        raise problem(f"found {value!r}; allowed: {allowed}, for runs and folders are called so", found=value)
    return value


class Models(Fields):
    """Which of the cached models: ids (`org/name`), other revisions (`org/name@revision`), shell patterns (`org/*`)."""

    include: Annotated[Names, NotEmpty] = ("*",)
    exclude: Names = ()
    max_parameters: Annotated[int | None, BeforeValidator(_number)] = None
    """The largest model to take."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: object) -> object:
        return {"include": cast(object, data)} if isinstance(data, str | list | tuple) else data


def _experiment(value: object, info: ValidationInfo) -> Any:
    """An experiment of the kind that it says. The error of a union would say what is wrong for each of the kinds."""
    if isinstance(value, Spec) or not isinstance(value, Mapping):
        return value
    kind = cast(Mapping[str, object], value).get("kind", _MISSING)
    if kind is _MISSING:
        raise missing("kind", found=value)
    known = kinds()
    if isinstance(kind, str) and kind in known:
        return known[kind].spec.model_validate(value, context=info.context)
    for each in unusable():
        if each.name == kind:
            raise problem(f"{found(kind)}, which cannot be used: {each.why}", "kind", found=kind)
    raise problem(f"{found(kind)}; allowed: {', '.join(known)}{near(kind, known)}", "kind", found=kind)


_MISSING = object()


class Job(Fields):
    """A job with its prompts read: what travels to the replicas, and into the manifest, as JSON."""

    name: Annotated[str, BeforeValidator(_name)]
    """What its runs are called; a file's own name when it gives none."""
    models: Models = Models()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(resolve)] = ()
    """There may be none where every experiment has a corpus."""
    bos: Bos = "auto"
    chat_template: bool = Field(default=False, strict=True)
    experiments: Annotated[tuple[Annotated[SerializeAsAny[Spec], BeforeValidator(_experiment)], ...], NotEmpty]
    top_k: int = Field(default=10, strict=True, ge=0)
    """How many of the most changed tokens a row holds."""
    seed: int = Field(default=0, strict=True)
    engine: Literal["auto", "full"] = "auto"
    """`auto` measures by the fastest way that is exact on a model, `full` by one full forward an ablation."""
    verify: int = Field(default=8, strict=True, ge=0)
    """How many ablations every replica measures a second time, by full forwards, before anything else."""
    on_mismatch: Literal["fail", "full"] = "fail"
    """When they do not agree: `fail` the model, or go on by `full` forwards."""
    strict: bool = Field(default=False, strict=True)
    """Whether one prompt that a model can never measure fails the model; if not, it fails alone."""
    unit_ablations: int = Field(default=512, strict=True, ge=1)
    """Most ablations that are leased, retried and committed together."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Job":
        if self.chat_template and self.bos != "auto":
            raise problem(f"found {self.bos!r}; allowed: auto, since a chat template writes BOS itself", "bos")
        names = [spec.name for spec in self.experiments]
        for index, spec in enumerate(self.experiments):
            if spec.name in names[:index]:
                raise problem(
                    f"found {spec.name!r} again; every experiment has a name of its own", "experiments", index
                )
            if spec.texts is None:
                self._has_what_it_measures(spec, index)
        for index, prompt in enumerate(self.prompts):
            if any(corpus.holds(prompt.id) for corpus in self.corpora):
                raise problem(f"found the id {prompt.id!r}, which is that of a corpus's chunk", "prompts", index)
        return self

    def _has_what_it_measures(self, spec: Spec, index: int) -> None:
        """Whether there are the prompts that an experiment chooses, and in them the pieces of text that it names."""
        if not self.prompts:
            raise missing("prompts") if "prompts" not in self.model_fields_set else problem(NOTHING, "prompts")
        ids = [prompt.id for prompt in self.prompts]
        for at, pattern in enumerate(spec.prompts):
            if not matching(ids, pattern):
                message = f"found {quoted(pattern)}, which matches the id of no prompt{near(pattern, ids)}"
                raise problem(message, "experiments", index, "prompts", at)
        for field, axis in spec.axes.items():
            for piece in pieces_of(axis):
                for prompt in self.prompts:
                    if spec.chooses(prompt.id) and prompt.piece(piece) is None:
                        message = f"found {quoted(piece)}, which prompt {prompt.id!r} has not: {quoted(prompt.text)}"
                        raise problem(message, "experiments", index, field)

    @property
    def run_name(self) -> str:
        """The name, and a hash of all that changes the numbers. Models and prompts may be added to a run."""
        experiments = sorted(spec.canonical for spec in self.experiments)
        what = json.dumps([experiments, self.dtype, self.bos, self.chat_template, self.top_k])
        return f"{self.name}-{sha256(what.encode()).hexdigest()[:8]}"

    @property
    def pieces(self) -> frozenset[str]:
        """The pieces of text whose positions its experiments name."""
        return frozenset[str]().union(*(spec.pieces for spec in self.experiments))

    @cached_property
    def corpora(self) -> tuple[Corpus, ...]:
        """The corpora of its experiments, each once."""
        corpora = [corpus for spec in self.experiments if (corpus := spec.texts)]
        return tuple({(corpus.id, corpus.chunks): corpus for corpus in corpora}.values())

    @property
    def sae_experiments(self) -> tuple[WithSaes, ...]:
        """Those that need autoencoders."""
        return tuple(spec for spec in self.experiments if isinstance(spec, WithSaes))

    def chooses(self, spec: Spec, prompt_id: str, bos: Fed | None = None) -> bool:
        """Whether an experiment measures a text: a prompt of the job, or a chunk of its own corpus.

        Args:
            spec: the experiment.
            prompt_id: of the text; that of one with another beginning says so (`fed.fed_id`).
            bos: how its texts begin where that is not as the tokenizer has it (`experiments.autoencoders.refs.fed_as`).
        """
        name, begins = plain_id(prompt_id)
        if begins != bos:
            return False
        prompt_id = name
        if not spec.chooses(prompt_id):
            return False
        return spec.texts is not None or not any(corpus.holds(prompt_id) for corpus in self.corpora)


def load_job(path: Path, sets: Sequence[str] = (), notes: list[str] | None = None) -> Job:
    """Reads a job file.

    Args:
        path: the YAML file; the prompt files that it names are relative to it.
        sets: `key=value` with dotted keys, such as `experiments.0.layers=all`; they win over the file.
        notes: gets what is no error, and what the user may want to know all the same.

    Raises:
        UserError: naming file (or `--set`), line, field, what was found and what is allowed.
    """
    file = YamlFile(path)
    for assignment in sets:
        file.set(assignment)
    data = file.data()
    named = "name" in data
    data.setdefault("name", path.stem)
    context = {"folder": path.parent, "notes": [] if notes is None else notes}
    try:
        return Job.model_validate(data, context=context)
    except ValidationError as errors:
        raise UserError(all_said(errors, lambda error: _at(file, error, named=named))) from None


def _at(file: YamlFile, error: ErrorDetails, *, named: bool) -> str:
    *within, last = error["loc"]
    if last == "name" and not within and not named:
        return f"{file.place(())}: name is missing, and the file's own cannot stand in for it: {say(error)}"
    return (
        f"{file.place(within)}: {last} {say(error)}"
        if error["type"] == "missing"
        else f"{file.place(error['loc'])}: {say(error)}"
    )


def make_job(data: Mapping[str, object]) -> Job:
    """The same from values, such as those of a command line; errors name the field."""
    try:
        return Job.model_validate(data)
    except ValidationError as errors:
        said = all_said(errors, lambda error: f"{'.'.join(map(str, error['loc']))}: {say(error)}")
        raise UserError(said) from None
