"""A few of a job's prompts, to try it out: part of the run that the whole job then goes on with."""

from dataclasses import dataclass
from hashlib import sha256

from raymi.errors import UserError
from raymi.job import Job


@dataclass(frozen=True, slots=True)
class Few:
    """How many prompts of a job a command takes; None: not asked for.

    A unit is always measured whole: in a run that has been issued with more prompts, those that share one come along.
    """

    limit: int | None = None
    """The first ones."""
    sample: int | None = None
    """Drawn by the job's seed: a larger number takes the same ones and more."""

    @property
    def option(self) -> str:
        return "--limit" if self.sample is None else "--sample"

    def of(self, job: Job) -> tuple[Job, list[str]]:
        """The job on those prompts alone, and what it leaves out, in words.

        Experiments on a corpus are left to the whole job: their texts are no prompts.

        Raises:
            UserError: both numbers are given, or nothing would be measured.
        """
        if self.limit is not None and self.sample is not None:
            raise UserError("--limit and --sample: allowed: one of the two")
        n = self.limit if self.sample is None else self.sample
        if n is None:
            return job, []
        kept = [spec for spec in job.experiments if spec.texts is None]
        if not kept:
            raise UserError(
                f"{self.option} takes prompts, and every experiment of this job is on a corpus",
                hint="`chunks` says how much of a corpus is taken: that makes another run.",
            )
        ids = [prompt.id for prompt in job.prompts]
        if self.sample is not None:
            ids.sort(key=lambda prompt_id: sha256(f"{job.seed} {prompt_id}".encode()).digest())
        taken = set(ids[:n])
        prompts = tuple(prompt for prompt in job.prompts if prompt.id in taken)
        idle = [spec.name for spec in kept if not any(spec.chooses(prompt.id) for prompt in prompts)]
        if len(idle) == len(kept):
            raise UserError(
                f"{self.option} {n} takes none of the prompts that the experiments measure", hint="Take more of them."
            )
        if (len(prompts), len(kept)) == (len(job.prompts), len(job.experiments)):
            return job, []
        few = job.model_copy(update={"prompts": prompts, "experiments": tuple(kept)})
        vars(few)["corpora"] = job.corpora  # the run may have their chunks, which must not be taken for prompts
        said = [f"{self.option}: {len(prompts):,} of {len(job.prompts):,} prompts"]
        said += [f"none of them is for experiment {name!r}" for name in idle]
        said += [
            f"experiment {spec.name!r}, on a corpus, is left out" for spec in job.experiments if spec.texts is not None
        ]
        return few, said
