"""A loaded model, and what can be measured with it.

Legend: A ablations, P prompts, T positions, V vocabulary.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from raymi import answers
from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments import sweep
from raymi.experiments.knockout.run import run
from raymi.experiments.knockout.spec import Ablation
from raymi.job import Job
from raymi.model.engine import Engine, measure_capability
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Intervention
from raymi.model.loading import Loaded, check_length
from raymi.model.meant import on_prompt
from raymi.model.offered import offered
from raymi.notebook import asked, html
from raymi.notebook.frames import in_order, with_texts
from raymi.notebook.results import Ablated, Forward, Knockouts, Sweep, compared
from raymi.outlet import clean
from raymi.plan.units import units
from raymi.prompts import Bos, Prompt, TokenizedPrompt, tokenize
from raymi.vocabulary import check_loaded


class Model:
    """A loaded model. Made by `raymi.load`."""

    def __init__(self, cached: CachedModel, tokenizer: Any, loaded: Loaded, dtype: str) -> None:
        self.cached, self.tokenizer, self.loaded, self.dtype = cached, tokenizer, loaded, dtype
        self.engine: Engine = loaded.engine
        """How ablations are measured. `engine.way = "full"` has `knockout` and `sweep` make a full forward of each."""

    @property
    def id(self) -> str:
        return self.cached.id

    @property
    def hooked(self) -> HookedModel:
        """The model itself, for what is not offered here."""
        return self.loaded.model

    @property
    def revision(self) -> str:
        return self.cached.revision

    @property
    def sites(self) -> pl.DataFrame:
        """All that can be captured, one row a site of a layer.

        `site` is its name for `capture`; `layer` (null for the embedding) and `name` are the same in two parts, as
        interventions take it; `editable` says whether they can change it.
        """
        found = offered(self.hooked)
        return pl.DataFrame(
            {
                "site": [str(site) for site, _ in found],
                "layer": [site.layer for site, _ in found],
                "name": [site.name for site, _ in found],
                "editable": [editable for _, editable in found],
            },
            schema_overrides={"layer": pl.Int16},
        )

    @overload
    def tokenize(self, prompt: str | Prompt, *, bos: Bos = ..., chat_template: bool = ...) -> TokenizedPrompt: ...
    @overload
    def tokenize(
        self, prompt: asked.Prompts, *, bos: Bos = ..., chat_template: bool = ...
    ) -> list[TokenizedPrompt]: ...

    def tokenize(
        self, prompt: str | Prompt | asked.Prompts, *, bos: Bos = "auto", chat_template: bool = False
    ) -> TokenizedPrompt | list[TokenizedPrompt]:
        """A prompt as this model reads it; of several, each.

        Args:
            prompt: a text, or a Prompt; what its answer and wrong answer begin alike is appended to its tokens. Or a
                list of them.
            bos: `auto` adds what the tokenizer itself adds, `always` exactly one beginning of sequence, `never` none.
            chat_template: make it a user's turn, followed by the beginning of the model's.

        Raises:
            UserError: it has no tokens, too many, or none that can be followed by its answer.
        """
        several = asked.prompts(prompt)
        given = [_called(cast(str | Prompt, prompt))] if several is None else several
        # A job says what the options may be.
        asked.job(self.id, self.dtype, {"text": "any"}, {"layers": "all"}, bos=bos, chat_template=chat_template)
        read = tokenize(given, self.tokenizer, bos=bos, chat_template=chat_template, model_id=self.id)
        found = [self._fits(each) for each in read]
        return found[0] if several is None else found

    @overload
    def clean(
        self, prompt: str | Prompt, *, capture: str | Sequence[str] = ..., bos: Bos = ..., chat_template: bool = ...
    ) -> Forward: ...
    @overload
    def clean(
        self, prompt: asked.Prompts, *, capture: str | Sequence[str] = ..., bos: Bos = ..., chat_template: bool = ...
    ) -> list[Forward]: ...

    def clean(
        self,
        prompt: str | Prompt | asked.Prompts,
        *,
        capture: str | Sequence[str] = (),
        bos: Bos = "auto",
        chat_template: bool = False,
    ) -> Forward | list[Forward]:
        """Runs a prompt as it is; of several, each by itself, in their order.

        Args:
            prompt: see `tokenize`, as are `bos` and `chat_template`.
            capture: TransformerLens names of the sites to keep, such as `blocks.3.attn.hook_pattern` [1, H, T, T]; one
                may stand alone. `sites` lists them.
            bos: see `tokenize`.
            chat_template: see `tokenize`.

        Raises:
            UserError: see `tokenize`.
            UnknownSite: there is no such site; the error lists those there are.
            NotFinite: a logit is NaN or infinite.
        """
        names = asked.sites(capture)
        read = self.tokenize(prompt, bos=bos, chat_template=chat_template)
        if isinstance(read, list):
            return [self._run(each, names) for each in read]
        return self._run(read, names)

    def _run(self, read: TokenizedPrompt, names: Sequence[str]) -> Forward:
        out = self.hooked.forward(torch.tensor([read.token_ids]), capture=names)
        return Forward(read, out.logits_BV[0], out.cache, self.tokenizer)

    def ablate(
        self,
        prompt: str | Prompt,
        interventions: Intervention | Sequence[Intervention],
        *,
        capture: str | Sequence[str] = (),
        bos: Bos = "auto",
        chat_template: bool = False,
    ) -> Ablated:
        """Runs a prompt clean and, in the same batch, with interventions that are applied together.

        Args:
            prompt: a text, or a Prompt.
            interventions: such as `raymi.Mask(layer=15, heads=None, edges=((4, 0),))`; see `raymi.interventions`.
            capture: as of `clean`; kept from both runs, after interventions at the site.
            bos: see `tokenize`.
            chat_template: see `tokenize`.

        Raises:
            UserError: see `tokenize`.
            UnknownSite, NotFinite: see `clean`.
            NoSuchPlace: an intervention names a site, layer, head or position that is not there, or its value does not
                fit there.
            NotFired: an intervention did not act.
        """
        names, together = asked.sites(capture), sweep.together(interventions)
        read = self.tokenize(asked.one_prompt(prompt, "ablate"), bos=bos, chat_template=chat_template)
        ids_BT = torch.tensor([read.token_ids] * 2)
        out = self.hooked.forward(ids_BT, [(), on_prompt(self.hooked, together, len(read.token_ids))], names)
        clean, ablated = (
            Forward(read, out.logits_BV[row], {k: v[row : row + 1] for k, v in out.cache.items()}, self.tokenizer)
            for row in (0, 1)
        )
        kl = compared(clean.logits, ablated.logits, 1).kl_A
        closed = None if out.closed_B is None else int(out.closed_B[1])
        return Ablated(clean, ablated, float(kl), int(out.fired_B[1]), int(out.empty_B[1]), closed)

    def knockout(
        self,
        prompt: str | Prompt,
        *,
        answer: str | None = None,
        wrong: str | None = None,
        subject: str | None = None,
        layers: object = "middle",
        heads: object = "all",
        queries: object = "last",
        keys: object = "first",
        top_k: int = 10,
        bos: Bos = "auto",
        chat_template: bool = False,
        keep_logits: bool = False,
    ) -> Knockouts:
        """Measures what attention edges are good for by cutting them: the product of four axes, as in a job file.

        An axis is one value or a list, and each element is an ablation of its own; `{"together": [...]}` cuts all
        elements at once, `{"each": [...]}` says what a bare list says. Heads are all together unless you say else.

        Args:
            prompt: a text, or a Prompt with answers of its own.
            answer: what should follow, with its leading blank; its logit, probability and rank are measured.
            wrong: another answer, to measure the first against.
            subject: a piece of the text that positions can name.
            layers: all, middle, indices (negative: from the end), fractions of depth (0.5), {"window": k}.
            heads: all, indices.
            queries: first, last, all, subject, {"text": "France"}, indices.
            keys: as `queries`.
            top_k: how many of the most changed tokens a row lists.
            bos: see `tokenize`.
            chat_template: see `tokenize`.
            keep_logits: keep the ablated logits of every ablation.

        Raises:
            UserError: see `tokenize`; an axis says what cannot be, or what this model or prompt has not.
            NotFinite, NotFired, OutOfMemory: measuring failed; nothing is returned rather than a wrong number.

        Warns:
            UserWarning: something was measured by full forwards, which is slower, where the model's way is another.
        """
        axes = {"layers": layers, "heads": heads, "queries": queries, "keys": keys}
        given = asked.written(asked.one_prompt(prompt, "knockout"), answer=answer, wrong=wrong, subject=subject)
        options: dict[str, object] = {"top_k": top_k, "bos": bos, "chat_template": chat_template}
        job = asked.job(self.id, self.dtype, given, axes, **options)
        read = self._read(job)
        work = units(job, job.experiments[0], self.cached, [read])
        self._check_past(len(read.token_ids))
        self._start_anew()
        keeping = _KeepsLogits(self.engine)
        tables = [
            run(
                cast(Engine, keeping) if keep_logits else self.engine,
                unit,
                {read.prompt.id: read},
                model_id=self.id,
                revision=self.revision,
                dtype=self.dtype,
                top_k=top_k,
            )
            for unit in work
        ]
        self._warn_of_full()
        frame = with_texts(pa.concat_tables(tables), self.tokenizer, read.tokens, ("query", "key"))
        self._warn_of_answer(read, frame, chat_template=chat_template)
        planned = [ablation for unit in work for _, ablations in unit.of(Ablation) for ablation in ablations]
        return Knockouts(read, in_order(frame, planned), torch.cat(keeping.units) if keep_logits else None)

    def sweep(
        self,
        prompt: str | Prompt,
        ablations: sweep.Ablations,
        *,
        answer: str | None = None,
        wrong: str | None = None,
        top_k: int = 10,
        bos: Bos = "auto",
        chat_template: bool = False,
        keep_logits: bool = False,
    ) -> Sweep:
        """Measures many ablations of one prompt, whatever they do, by the fastest way that is exact on the model.

        Args:
            prompt: a text, or a Prompt with answers of its own.
            ablations: each an intervention, or several that are applied together; see `raymi.interventions`. (What
                `ablate` takes is one of these.) A single intervention is one ablation.
            answer: what should follow, with its leading blank; its logit, probability and rank are measured.
            wrong: another answer, to measure the first against.
            top_k: how many of the most changed tokens a row lists.
            bos: see `tokenize`.
            chat_template: see `tokenize`.
            keep_logits: keep the ablated logits of every ablation.

        Raises:
            UserError: see `tokenize`; there are no ablations, or one of them has no interventions.
            NoSuchPlace: an intervention names a site, layer, head or position that is not there, or its value does not
                fit there.
            NotFinite, NotFired, OutOfMemory: measuring failed; nothing is returned rather than a wrong number.

        Warns:
            UserWarning: something was measured by full forwards, which is slower, where the model's way is another.
        """
        given = asked.written(asked.one_prompt(prompt, "sweep"), answer=answer, wrong=wrong)
        options: dict[str, object] = {"top_k": top_k, "bos": bos, "chat_template": chat_template}
        # A job says what a prompt and its options may be; of its experiment nothing is measured.
        read = self._read(asked.job(self.id, self.dtype, given, {"layers": "all"}, **options))
        cells = sweep.cells(self.hooked, read, ablations)
        self._check_past(len(read.token_ids))
        self._start_anew()
        keeping = _KeepsLogits(self.engine)
        table = sweep.run(
            cast(Engine, keeping) if keep_logits else self.engine,
            read,
            cells,
            model_id=self.id,
            revision=self.revision,
            dtype=self.dtype,
            top_k=top_k,
        )
        self._warn_of_full()
        frame = with_texts(table, self.tokenizer, read.tokens, ("position",))
        self._warn_of_answer(read, frame, chat_template=chat_template)
        return Sweep(read, frame, torch.cat(keeping.units) if keep_logits else None)

    def _read(self, job: Job) -> TokenizedPrompt:
        """The one prompt of a job."""
        options: dict[str, Any] = {"bos": job.bos, "chat_template": job.chat_template, "pieces": job.pieces}
        return self._fits(tokenize(job.prompts, self.tokenizer, **options, model_id=self.id)[0])

    def _check_past(self, n_tokens: int) -> None:
        """Checks the model anew on a longer prompt when this one is the first to get past a window of its attention."""
        n_needed = check_length(self.hooked.model.config.get_text_config(), n_tokens)
        if n_needed > self.engine.capability.n_tokens:
            engine, capability = self.engine, measure_capability(self.hooked, n_needed)
            if engine.way == engine.capability.way:  # else another one was chosen, and stays
                engine.way = capability.way
            engine.capability = capability

    def _start_anew(self) -> None:
        """Forgets what a call that failed has left, and clean runs: weights may have been changed since."""
        self.engine.gave_up.clear()
        self.engine.cones.clear()

    def _warn_of_full(self) -> None:
        """Says so when something did not go the model's way."""
        reasons, way = self.engine.gave_up, self.engine.way
        if not reasons:
            return
        many = f"{len(reasons)} batches of ablations were" if len(reasons) > 1 else "a batch of ablations was"
        first = "the first " if len(reasons) > 1 else ""
        warnings.warn(
            f"{self.id}: {many} measured by full forwards, exact but slower, and not by the model's way ({way}); "
            f"{first}because: {reasons[0]}",
            stacklevel=3,  # where `knockout` or `sweep` was called
        )
        reasons.clear()

    def _warn_of_answer(self, read: TokenizedPrompt, frame: pl.DataFrame, *, chat_template: bool) -> None:
        """Says so when an answer is unlikely, and probably because its blank is missing."""
        rank, prob = frame["answer_rank_clean"][0], frame["answer_prob_clean"][0]
        if rank is not None and not chat_template and answers.runs_on(read.prompt.text, read.prompt.answer):
            said = answers.warning([answers.Answer(read.prompt, rank, prob)])
            if said:
                warnings.warn(f"{self.id}: {said}", stacklevel=3)  # where `knockout` or `sweep` was called

    def _fits(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        check_loaded(self.id, prompt, self.hooked)
        context = self.cached.context
        if context is not None and len(prompt.token_ids) > context:
            raise UserError(
                f"{self.id}: prompt {prompt.prompt.id!r}: {len(prompt.token_ids)} tokens are more than its context of "
                f"{context}"
            )
        return prompt

    def __repr__(self) -> str:
        hooked, loaded, checked = self.hooked, self.loaded, self.engine.capability
        return clean(
            f"{self.id} at {self.revision[:7]}\n"
            f"  {self.cached.model_type}: {hooked.n_layers} layers, {hooked.n_heads} heads, hidden size "
            f"{hooked.hidden_size:,}, vocabulary {hooked.vocab_size:,}\n"
            f"  {self.dtype} on {hooked.device}: {hooked.weight_bytes / 1e6:,.0f} MB of weights, loaded in "
            f"{loaded.seconds:.1f} s\n"
            f"  differs from its own attention by {checked.disagreement:.1e} logits (noise {checked.noise:.1e})\n"
            f"  methods: clean, knockout, ablate, sweep, tokenize; `sites` lists its sites"
        )

    def _repr_html_(self) -> str:
        return html.block(repr(self))


def _called(prompt: str | Prompt) -> Prompt:
    return Prompt("prompt", prompt) if isinstance(prompt, str) else prompt


@dataclass(slots=True)
class _KeepsLogits:
    """An engine that keeps the ablated logits of what is measured by it: what `run` needs of an Engine, and no more."""

    engine: Engine
    units: list[Tensor] = field(default_factory=list[Tensor])
    """[A, V] of every call, on the CPU."""

    @property
    def model(self) -> HookedModel:
        return self.engine.model

    def ablations(self, ids_PT: Tensor, cells: Sequence[Cell]) -> Iterator[Batch]:
        kept_AV = torch.empty(len(cells), self.model.vocab_size)
        self.units.append(kept_AV)
        for batch in self.engine.ablations(ids_PT, cells):
            kept_AV[list(batch.cells)] = batch.ablated_AV.float().cpu()
            yield batch
