"""What `raymi sae run` asks, as its options say it, and as a job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymi import catalog
from raymi.errors import UserError
from raymi.sae import discover
from raymi.sae.description import Description, same_model

if TYPE_CHECKING:
    from raymi.job import Job

MEASURES = ("quality", "features", "injection", "ablation")
_OF_TEXTS = ("quality", "features")
"""Those that a corpus is for."""


@dataclass(frozen=True, slots=True)
class Question:
    """The options, as written; None or nothing where one was not given."""

    measures: tuple[str, ...]
    corpus: Path | None
    context: int | None
    chunks: int | None
    prompt: str | None
    answer: str | None
    prompt_set: str | None
    features: tuple[int, ...]
    strengths: tuple[float, ...]
    skip_first: int | None
    device: str | None

    def data(self, saes: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
        """The same as the values of a job file.

        Raises:
            UserError: options that do not go together, or texts that are missing.
        """
        self._check()
        prompts = self._prompts()
        return {
            "name": "sae",
            "models": list(models),
            **({"device": self.device} if self.device else {}),
            **({"prompts": [prompts[1]]} if prompts else {}),
            "experiments": [
                {"kind": "sae", "measure": measure, "saes": list(saes), **self._on(measure, prompts and prompts[0])}
                for measure in dict.fromkeys(self.measures)
            ],
        }

    def _check(self) -> None:
        on_prompts = [measure for measure in self.measures if measure not in _OF_TEXTS or self.corpus is None]
        given = {
            "--feature": self.features,
            "--strength": self.strengths,
            "--context": self.context,
            "--chunks": self.chunks,
            "--answer": self.answer,
            "--skip-first": self.skip_first,
        }
        for option in [option for option, value in given.items() if value not in (None, ())]:
            if option in ("--feature", "--strength") and "injection" not in self.measures:
                raise UserError(f"{option} is for --measure injection")
            if option in ("--context", "--chunks") and self.corpus is None:
                raise UserError(f"{option} is for --corpus")
            if option == "--answer" and self.prompt is None:
                raise UserError("--answer is for --prompt")
            if option == "--skip-first" and set(self.measures) == {"injection"}:
                raise UserError("--skip-first says which tokens count; an injection is made at the last one")
        if self.prompt is not None and self.prompt_set is not None:
            raise UserError("--prompt and --set-of-prompts: allowed: one of the two")
        of_prompts = "--set-of-prompts" if self.prompt is None else "--prompt"
        if self.corpus is not None and set(self.measures).isdisjoint(_OF_TEXTS):
            raise UserError(f"--corpus is for quality and features; {self.measures[0]} is measured on prompts")
        if not on_prompts and (self.prompt is not None or self.prompt_set is not None):
            raise UserError(f"{of_prompts}: {self.measures[0]} is measured on the corpus")
        if on_prompts and self.prompt is None and self.prompt_set is None:
            other = "--corpus FILE, " if on_prompts[0] in _OF_TEXTS else ""
            raise UserError(
                f"there is no text to measure {on_prompts[0]} on",
                hint=f"Name one: {other}--prompt TEXT or --set-of-prompts capitals.",
            )

    def _prompts(self) -> tuple[str, dict[str, str]] | None:
        """(What an experiment calls them, what the job says of them)."""
        if self.prompt_set is not None:
            return f"{self.prompt_set}/*", {"set": self.prompt_set}
        if self.prompt is None:
            return None
        # Another prompt is another question, with a run of its own: the experiment names it by its text.
        name = f"given-{sha256(repr((self.prompt, self.answer)).encode()).hexdigest()[:8]}"
        answer = {"answer": self.answer} if self.answer is not None else {}
        return name, {"id": name, "text": self.prompt, **answer}

    def _on(self, measure: str, prompts: str | None) -> dict[str, Any]:
        """What an experiment measures on, and how."""
        if measure == "injection":
            return {"prompts": prompts, "features": list(self.features), "strengths": list(self.strengths)}
        skip = {"skip": {"first": self.skip_first}} if self.skip_first else {}
        if self.corpus is None or measure not in _OF_TEXTS:
            return {"prompts": prompts, **skip}
        size = {"context": self.context, "chunks": self.chunks}
        given = {name: value for name, value in size.items() if value is not None}
        return {"corpus": {"file": str(self.corpus), **given}, **skip}


def job_of(data: Mapping[str, object]) -> "Job":
    """The job of `Question.data`.

    Raises:
        UserError: naming the option, what was found and what is allowed.
    """
    from raymi.job import make_job

    try:
        return make_job(data)
    except UserError as error:
        said = dict.fromkeys(_as_option(line) for line in error.what.splitlines())
        raise UserError("\n".join(said), hint=error.hint) from None


def own_models(saes: Sequence[str], cache_dir: Path | None) -> list[str]:
    """The cached models that autoencoders were trained on.

    Args:
        saes: folders, `repo[@revision][:path]`, or patterns over those in the cache.
        cache_dir: the cache of both; by default the one HF_HOME names.

    Raises:
        UserError: there is no such autoencoder, it does not say what it was trained on, or that is not in the cache.
    """
    cached = [model.id for model in catalog.scan(cache_dir) if model.runnable]
    models: dict[str, None] = {}
    for where in saes:
        for about in _described(where, cache_dir):
            if about.model_id is None:
                raise UserError(
                    f"{about.source or where}: its files do not say which model it belongs to", hint="--model names it."
                )
            same = [id for id in cached if same_model(id, about.model_id)]
            if not same:
                raise UserError(
                    f"{about.source or where}: this SAE was trained on {about.model_id}, which is not in the cache, or "
                    "cannot run",
                    hint=f"`raymi fetch {about.model_id}` downloads it; --model names another.",
                )
            models |= dict.fromkeys([about.model_id] if about.model_id in same else same)
    return list(models)


def _described(where: str, cache_dir: Path | None) -> list[Description]:
    if not any(character in where for character in "*?["):
        return [discover.describe(where, cache_dir=cache_dir)]
    found = discover.scan(cache_dir=cache_dir)
    chosen = [sae.description for sae in found if sae.description and fnmatchcase(sae.source, where)]
    if not chosen:
        raise UserError(f"{where}: matches no SAE in the cache", hint="`raymi sae list` shows them.")
    return chosen


_EXPERIMENT = r"^experiments\.\d+\.(?:<?\w+>?\.)?"
_FIELDS = (
    (r"^prompts\.0\.(?:<?\w+>?\.)?text\b", "--prompt"),
    (r"^prompts\.0\.(?:<?\w+>?\.)?answer\b", "--answer"),
    (r"^models\b[\w.]*", "--model"),
    (r"^device\b", "--device"),
    (_EXPERIMENT + r"corpus\.(context|chunks)\b", r"--\1"),
    (_EXPERIMENT + r"corpus\b[\w.]*", "--corpus"),
    (_EXPERIMENT + r"(feature|strength)s\b[\w.]*", r"--\1"),
    (_EXPERIMENT + r"skip\b[\w.]*", "--skip-first"),
    (_EXPERIMENT + r"saes\b[\w.]*", "SAE"),
)
"""A job's fields, and how they are called on the command line."""


def _as_option(error: str) -> str:
    for pattern, replacement in _FIELDS:
        error = re.sub(pattern, replacement, error)
    return error
