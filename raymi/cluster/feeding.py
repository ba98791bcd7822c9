"""How the texts of an experiment with autoencoders begin: as their files say, where the job does not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import WithSaes
from raymi.experiments.autoencoders.resolve import Record
from raymi.fed import Fed, fed_id, plain_id
from raymi.job import Job
from raymi.prompts import Prompt, PromptFault, TokenizedPrompt, tokenize_each

Texts = Mapping[str, TokenizedPrompt]


def feed(
    job: Job,
    records: Sequence[Record],
    texts: Texts,
    former: Sequence[Prompt],
    tokenizer: Any,
    *,
    model_id: str,
    faults: dict[str, PromptFault],
) -> tuple[list[Record], dict[str, TokenizedPrompt]]:
    """Autoencoders with how their experiments' texts begin, and the texts that none but these measure.

    A `bos` that the job writes wins, and so does a chat template. Where a text is the same either way it is no other.

    Args:
        job: the job.
        records: rows of table `saes` of one model.
        texts: of the job, as the tokenizer has them, by id; and what the run has stored.
        former: prompts that the run once had.
        tokenizer: of the model.
        model_id: what errors call the model.
        faults: by id, why prompts cannot be read; those that begin otherwise are added, by their own ids.

    Raises:
        UserError: autoencoders of one experiment want texts to begin differently; it names the groups to split.
    """
    fed: dict[str, Fed | None] = {}
    more: dict[str, TokenizedPrompt] = {}
    for spec in job.sae_experiments:
        its = [row for row in records if row["experiment"] == spec.name and row["sae"] is not None]
        bos = _asked(spec, its, job, tokenizer, model_id)
        if bos is None:
            continue
        here = _texts(job, spec, bos, texts, former, tokenizer, model_id, faults)
        if any(row["bos"] for row in its) or _differ(here, texts):
            fed[spec.name] = bos
            more |= {fed_id(text_id, bos): _renamed(text, bos) for text_id, text in here.items()}
    return [row | {"bos": fed.get(row["experiment"])} if row["sae"] else row for row in records], more


def holds(job: Job, records: Iterable[Record], texts: Texts) -> bool:
    """Whether all the texts are there that these autoencoders' experiments measure."""
    specs = {spec.name: spec for spec in job.sae_experiments}
    for experiment, bos in {(row["experiment"], row.get("bos")) for row in records if row.get("bos")}:
        spec = specs.get(experiment)
        if spec is None:
            continue
        wanted = [spec.texts.chunk_id(0)] if spec.texts else [p.id for p in job.prompts if job.chooses(spec, p.id)]
        if any(fed_id(text_id, bos) not in texts for text_id in wanted):
            return False
    return True


def _asked(spec: WithSaes, records: Sequence[Record], job: Job, tokenizer: Any, model_id: str) -> Fed | None:
    """How texts are to begin, as an experiment's autoencoders agree; None where nothing is to be done about it."""
    if job.bos != "auto" or (job.chat_template and spec.texts is None):
        return None
    wants = {want: [row["sae"] for row in records if row["prepend_bos"] is want] for want in (True, False)}
    if wants[True] and wants[False]:
        groups = "".join(
            f"\n  {'with' if want else 'without'} BOS: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for want, names in wants.items()
        )
        raise UserError(
            f"{model_id}: experiment {spec.name!r}: its SAEs were trained on texts that begin differently{groups}",
            hint="Make two experiments of it, or write `bos: always` or `bos: never`, which holds for all.",
        )
    if wants[False]:
        return "never"
    # Where there is no such token, there is none to place before a text: rows say that it differs.
    return "always" if wants[True] and tokenizer.bos_token_id is not None else None


def _texts(
    job: Job,
    spec: WithSaes,
    bos: Fed,
    texts: Texts,
    former: Sequence[Prompt],
    tokenizer: Any,
    model_id: str,
    faults: dict[str, PromptFault],
) -> dict[str, TokenizedPrompt]:
    """An experiment's texts that begin so, by their plain ids; what the run has stored is taken as it is."""
    if spec.texts is not None:
        stored: dict[str, TokenizedPrompt] = {}
        while (chunk := texts.get(fed_id(spec.texts.chunk_id(len(stored)), bos))) and (
            spec.texts.chunks is None or len(stored) < spec.texts.chunks
        ):
            stored[spec.texts.chunk_id(len(stored))] = chunk
        read = [] if stored else spec.texts.read(tokenizer, bos=bos, model_id=model_id)
        return stored | {each.prompt.id: each for each in read}
    found: dict[str, TokenizedPrompt] = {}
    for prompt in (*job.prompts, *former):
        if not job.chooses(spec, prompt.id):
            continue
        if known := texts.get(fed_id(prompt.id, bos)):
            found[prompt.id] = known
        elif prompt.id not in faults:  # as the tokenizer has it, it can be read
            options: dict[str, Any] = {"bos": bos, "chat_template": False, "pieces": job.pieces}
            read, bad = tokenize_each([prompt], tokenizer, **options, model_id=model_id)
            found |= {each.prompt.id: each for each in read}
            if prompt in job.prompts:
                faults |= {fed_id(prompt_id, bos): fault for prompt_id, fault in bad.items()}
    return found


def _differ(fed: Texts, plain: Texts) -> bool:
    """Whether any of the texts are not the same tokens either way."""
    return any(text_id not in plain or plain[text_id].token_ids != text.token_ids for text_id, text in fed.items())


def _renamed(text: TokenizedPrompt, bos: Fed) -> TokenizedPrompt:
    name, _ = plain_id(text.prompt.id)
    return replace(text, prompt=replace(text.prompt, id=fed_id(name, bos)))
