"""A run's models and prompts as it first saw them: commits do not move under it, and units do not change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymi import catalog
from raymi.catalog import CachedModel
from raymi.errors import UserError, quoted
from raymi.job import Job
from raymi.plan.selection import Rejected, selected
from raymi.prompts import Prompt
from raymi.store.manifest import Issue, Manifest


@dataclass(frozen=True, slots=True)
class Cache:
    """A Hugging Face cache, and what the user allows to be done with what it holds.

    Args:
        folder: where it is; None: where Hugging Face keeps it.
        remote_code: ids of models that may run code of their own.
        pickle: ids of models whose weights may be pickles.
        unused: ids of models whose files may hold tensors that their configs have no place for.
        download: whether missing models may be fetched.
    """

    folder: Path | None = None
    remote_code: frozenset[str] = frozenset()
    pickle: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    download: bool = False

    def scan(self) -> list[CachedModel]:
        """Every cached model."""
        trusted = self.remote_code | self.pickle
        return [self.find(model.id) if model.id in trusted else model for model in catalog.scan(self.folder)]

    def find(self, ref: str) -> CachedModel:
        """The model of an `id` or `id@revision`, fetched if that is allowed; UserError when it is not there."""
        id = ref.partition("@")[0]
        pickle, code = id in self.pickle, id in self.remote_code
        try:
            found = catalog.find(ref, self.folder, allow_pickle=pickle, trust_remote_code=code)
        except UserError:
            if not self.download:
                raise
        else:
            if found.runnable or not self.download:
                return found
        catalog.fetch(ref, self.folder, allow_pickle=pickle)
        return catalog.find(ref, self.folder, allow_pickle=pickle, trust_remote_code=code)


@dataclass(frozen=True, slots=True)
class Choice:
    """The models of a job on one machine."""

    models: list[CachedModel]
    rejected: list[Rejected]
    commits: dict[str, str]
    """What must not move from now on: the ids and references of the job -> commit."""


def choose(job: Job, cache: Cache, commits: Mapping[str, str]) -> Choice:
    """The models that a job names, each at the commit at which the run first saw it.

    Raises:
        UserError: as `plan.selected`.
    """
    seen: dict[str, str] = {}
    gone: list[Rejected] = []

    def find(ref: str) -> CachedModel:
        commit = commits.get(ref)
        found = cache.find(f"{ref.partition('@')[0]}@{commit}" if commit else ref)
        seen[ref] = found.revision
        return found

    def frozen(model: CachedModel) -> CachedModel | None:
        commit = commits.get(model.id, model.revision)
        if commit == model.revision:
            return model
        try:
            return cache.find(f"{model.id}@{commit}")
        except UserError as error:
            gone.append(Rejected(model.id, f"the run has it at commit {commit[:12]}: {error.what}", named=True))
            return None

    present = [model for each in cache.scan() if (model := frozen(each)) is not None]
    if gone and not present:  # not an empty cache
        raise UserError(
            "\n".join(f"{each.model_id}: {each.reason}" for each in gone),
            hint="Fetch that commit (raymi fetch ID@COMMIT), or start another run with --new.",
        )
    models, rejected = selected(job, present, find)
    pinned = {id_of for ref in seen if (id_of := ref.partition("@")[0]) != ref}
    seen |= {model.id: model.revision for model in models if model.id not in pinned}
    return Choice(models, [*rejected, *gone], seen)


def freeze_prompts(job: Job, manifest: Manifest, settled: Mapping[str, Prompt]) -> tuple[Prompt, ...]:
    """Makes the prompts that the run has not yet had a generation of their own.

    Args:
        job: the job.
        manifest: of the run; it is changed.
        settled: by id, the prompts that some model measures. Others may be mended: nothing was measured of them.

    Returns:
        Those it once had and the job has no longer: units that hold them beside others may be half done.

    Raises:
        UserError: a prompt is not what it was.
    """
    for prompt in job.prompts:
        if (before := settled.get(prompt.id, prompt)) != prompt:
            raise UserError(
                f"prompt {prompt.id!r} is not what it was when the run {manifest.run} first saw it: "
                f"{quoted(before.text)}",
                hint="Give it another id, or start another run with --new.",
            )
    ids = {prompt.id: prompt for prompt in job.prompts}
    issued = [prompt for issue in manifest.jobs for prompt in _prompts(issue, manifest)]
    # One that was mended would change the units of those that it came with.
    mended = {each.id for each in issued if each.id not in settled and ids.get(each.id, each) != each}
    manifest.generations = [kept for each in manifest.generations if (kept := [p for p in each if p not in mended])]
    manifest.add_prompts(ids)
    known = {**{prompt.id: prompt for prompt in issued}, **settled}
    frozen = [prompt_id for generation in manifest.generations for prompt_id in generation]
    if lost := [prompt_id for prompt_id in frozen if prompt_id not in known and prompt_id not in ids]:
        raise _damaged(manifest, f"no job of the run has the prompt {quoted(lost[0])}")
    return tuple(known[prompt_id] for prompt_id in frozen if prompt_id not in ids)


def _prompts(issue: Issue, manifest: Manifest) -> Sequence[Prompt]:
    try:
        return [Prompt(**prompt) for prompt in issue.resolved["prompts"]]
    except (KeyError, TypeError):
        raise _damaged(
            manifest, f"the prompts of the job issued at {issue.issued_at:%Y-%m-%d %H:%M:%S} are none"
        ) from None


def _damaged(manifest: Manifest, why: str) -> UserError:
    return UserError(
        f"the manifest of the run {manifest.run} is damaged: {why}",
        hint="Put back a good copy of it, or start another run with --new.",
    )
