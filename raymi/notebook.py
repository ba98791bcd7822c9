"""raymi in a notebook: one model in this process, without Ray; what it gives are tensors, Polars frames and heat maps.

Legend: A ablations, B rows of a batch, T positions, V vocabulary.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from raymi import answers, catalog
from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments import sweep
from raymi.experiments.knockout.run import run
from raymi.experiments.knockout.spec import Ablation
from raymi.fields import near
from raymi.heatmap import heatmap
from raymi.job import Job, make_job
from raymi.model.engine import Engine, measure_capability
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Intervention
from raymi.model.loading import DTYPES, Loaded, check_length
from raymi.model.loading import load as load_weights
from raymi.model.metrics import Comparison, Effects
from raymi.plan.units import units
from raymi.prompts import Bos, Prompt, TokenizedPrompt, tokenize
from raymi.tokenizer import load_tokenizer, token_texts
from raymi.vocabulary import check_loaded

if TYPE_CHECKING:
    import altair as alt


def load(
    id: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    cache_dir: Path | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    allow_unused: bool = False,
) -> "Model":
    """Opens a model of the Hugging Face cache. Nothing is downloaded (`raymi fetch ID` does that) and Ray is not used.

    Args:
        id: `org/name`, or `org/name@revision` with a branch, a tag, a commit or the beginning of one.
        dtype: what to compute in: float32, bfloat16 or float16.
        device: `auto` (CUDA, then Apple's GPU, then the CPU), or cpu, mps, cuda, cuda:1.
        cache_dir: the cache, in place of the one that HF_HOME or HF_HUB_CACHE names.
        trust_remote_code: run the Python code that the model brings along.
        allow_pickle: accept weights that are not safetensors, and can run any code when they are loaded.
        allow_unused: leave out tensors that its files hold and the model of its config has no place for.

    Raises:
        UserError: there is no such model, it cannot run (the reason is given), or there is no such device or dtype.
        RuntimeError: its weights do not fit its config, or raymi does not compute what the model's own code does.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: found {dtype!r}; allowed: {', '.join(DTYPES)}{near(dtype, DTYPES)}")
    check_device(device)
    cache = None if cache_dir is None else Path(cache_dir)
    found = catalog.find(id, cache, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if found.reason is not None:
        raise UserError(f"{found.id} cannot run: {found.reason}")
    tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
    loaded = load_weights(
        found.path,
        name=found.id,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        allow_unused=allow_unused,
    )
    # What config.json does not tell, the loaded model does.
    found = replace(found, attention_layers=tuple(loaded.model.attention_layers))
    return Model(found, tokenizer, loaded, dtype)


def check_device(device: str) -> None:
    """UserError when this machine has not the device: `auto`, cpu, mps, cuda or cuda:1."""
    kind, _, index = device.partition(":")
    there = {"auto": 1, "cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or not (index.isdecimal() or not index) or int(index or 0) >= there[kind]:
        usable = [name for name, count in there.items() if count]
        raise UserError(f"device: found {device!r}; there is here: {', '.join(usable)}")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Forward:
    """What one forward of one prompt gave. Tensors are on the model's device."""

    prompt: TokenizedPrompt
    """With `token_ids` and `tokens`: what the model was given."""
    logits: Tensor
    """[V] float32, of the last position."""
    cache: dict[str, Tensor]
    """Site name -> what was there, with TransformerLens's shapes and a batch axis of 1, in the model's dtype."""
    tokenizer: Any

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.prompt.tokens

    def top(self, k: int = 10) -> pl.DataFrame:
        """The k most likely next tokens: rank (0 is the first), token_id, token, logit, prob."""
        return top_tokens(self.logits, self.tokenizer, k)

    def __repr__(self) -> str:
        sites = "".join(f"\n{name} {list(value.shape)}" for name, value in self.cache.items())
        return f"{list(self.tokens)} ->\n{self.top(5)}{sites}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ablated:
    """A prompt run clean and run with interventions, in one batch."""

    clean: Forward
    ablated: Forward
    kl: float
    """KL(clean || ablated) of the next token, in nats."""
    fired: int
    """How often the interventions acted, counted where they did."""
    empty_rows: int
    """Attention lines (layer, head, query) left without any key, which attend to nothing."""
    closed: int | None = None
    """Edges to cut that the model's own mask (a window, a chunk) had closed before; None where that is not known."""

    def changed(self, k: int = 10) -> pl.DataFrame:
        """The k most changed tokens, |change| descending: token_id, token, prob_clean, prob_ablated."""
        found = _compared(self.clean.logits, self.ablated.logits, k)
        ids: list[int] = found.changed_AC[0].tolist()
        texts = token_texts(self.clean.tokenizer, ids)
        return pl.DataFrame(
            {
                "token_id": ids,
                "token": [texts[i] for i in ids],
                "prob_clean": found.changed_clean_AC[0].tolist(),
                "prob_ablated": found.changed_ablated_AC[0].tolist(),
            }
        )

    def __repr__(self) -> str:
        closed = f", {self.closed} edges were closed before" if self.closed else ""
        return f"KL {self.kl:.6f} nats; {self.fired} interventions fired{closed}\n{self.changed(5)}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Sweep:
    """Ablations of one prompt, measured."""

    prompt: TokenizedPrompt
    frame: pl.DataFrame
    """One row an ablation, in the order asked for: the columns of `raymi.experiments.sweep.SCHEMA`, and beside its
    token ids and positions their texts (`position_token`, `answer_token`, `wrong_token`, `top1_clean_token`,
    `top1_ablated_token`, and `token` in `changed`)."""
    logits: Tensor | None = None
    """[A, V] float32 on the CPU, ablated, in the order of the frame; only with `keep_logits=True`."""

    def __repr__(self) -> str:
        return self._shown("ablations", "layers", "sites", "head", "position")

    def _shown(self, what: str, *asked: str) -> str:
        shown = [*asked, "kl", "logit_diff", "top1_clean_token", "top1_ablated_token"]
        return f"{what} of {list(self.prompt.tokens)}\n{self.frame.select(shown)}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Knockouts(Sweep):
    """Knockouts of one prompt, measured.

    The frame has the columns of table `ablations`; `query_token` and `key_token` are the texts of its positions.
    """

    def heatmap(self, value: str = "logit_diff", x: str | None = None, y: str | None = None) -> "alt.Chart":
        """A heat map, drawn by altair (`pip install 'raymi[plots]'`).

        Args:
            value: a column of the frame, such as logit_diff (answer: clean - ablated), margin_diff or kl.
            x: layer, head, query or key; by default one in which the ablations differ.
            y: as `x`. Over what differs beside these two, the mean is drawn.

        Raises:
            UserError: altair is missing, the column is not there or null, or there is only one ablation.
        """
        return heatmap(self.frame, self.prompt.tokens, value, x, y, self.prompt.prompt.text)

    def __repr__(self) -> str:
        return self._shown("knockouts", "layers", "heads", "queries", "keys")


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

    def tokenize(self, prompt: str | Prompt, *, bos: Bos = "auto", chat_template: bool = False) -> TokenizedPrompt:
        """A prompt as this model reads it.

        Args:
            prompt: a text, or a Prompt; what its answer and wrong answer begin alike is appended to its tokens.
            bos: `auto` adds what the tokenizer itself adds, `always` exactly one beginning of sequence, `never` none.
            chat_template: make it a user's turn, followed by the beginning of the model's.

        Raises:
            UserError: it has no tokens, too many, or none that can be followed by its answer.
        """
        asked = Prompt("prompt", prompt) if isinstance(prompt, str) else prompt
        return self._fits(tokenize([asked], self.tokenizer, bos=bos, chat_template=chat_template, model_id=self.id)[0])

    def clean(
        self, prompt: str | Prompt, *, capture: Sequence[str] = (), bos: Bos = "auto", chat_template: bool = False
    ) -> Forward:
        """Runs a prompt as it is.

        Args:
            prompt: see `tokenize`, as are `bos` and `chat_template`.
            capture: TransformerLens names of the sites to keep, such as `blocks.3.attn.hook_pattern` [1, H, T, T].
            bos: see `tokenize`.
            chat_template: see `tokenize`.

        Raises:
            UserError: see `tokenize`.
            UnknownSite: there is no such site; the error lists those there are.
            NotFinite: a logit is NaN or infinite.
        """
        read = self.tokenize(prompt, bos=bos, chat_template=chat_template)
        out = self.hooked.forward(torch.tensor([read.token_ids]), capture=capture)
        return Forward(read, out.logits_BV[0], out.cache, self.tokenizer)

    def ablate(
        self,
        prompt: str | Prompt,
        interventions: Intervention | Sequence[Intervention],
        *,
        capture: Sequence[str] = (),
        bos: Bos = "auto",
        chat_template: bool = False,
    ) -> Ablated:
        """Runs a prompt clean and, in the same batch, with interventions that are applied together.

        Args:
            prompt: see `clean`, as are `capture`, `bos` and `chat_template`.
            interventions: such as `raymi.Mask(layer=15, heads=None, edges=((4, 0),))`; see `raymi.interventions`.
            capture: kept from both runs, after interventions at the site.
            bos: see `tokenize`.
            chat_template: see `tokenize`.

        Raises:
            UserError: see `tokenize`.
            UnknownSite, NotFinite: see `clean`.
            NoSuchPlace: an intervention names a layer, head or position that is not there.
            NotFired: an intervention did not act.
        """
        read = self.tokenize(prompt, bos=bos, chat_template=chat_template)
        ids_BT = torch.tensor([read.token_ids] * 2)
        out = self.hooked.forward(ids_BT, [(), sweep.together(interventions)], capture)
        clean, ablated = (
            Forward(read, out.logits_BV[row], {k: v[row : row + 1] for k, v in out.cache.items()}, self.tokenizer)
            for row in (0, 1)
        )
        kl = _compared(clean.logits, ablated.logits, 1).kl_A
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
        given = _written(prompt, answer=answer, wrong=wrong, subject=subject)
        job = _job(self, given, axes, top_k=top_k, bos=bos, chat_template=chat_template)
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
        frame = _with_texts(pa.concat_tables(tables), self.tokenizer, read.tokens, ("query", "key"))
        self._warn_of_answer(read, frame, chat_template=chat_template)
        asked = [ablation for unit in work for _, ablations in unit.of(Ablation) for ablation in ablations]
        return Knockouts(read, _in_order(frame, asked), torch.cat(keeping.units) if keep_logits else None)

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
        given = _written(prompt, answer=answer, wrong=wrong)
        # A job says what a prompt and its options may be; of its experiment nothing is measured.
        read = self._read(_job(self, given, {"layers": "all"}, top_k=top_k, bos=bos, chat_template=chat_template))
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
        frame = _with_texts(table, self.tokenizer, read.tokens, ("position",))
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
            raise UserError(f"{self.id}: {len(prompt.token_ids)} tokens are more than its context of {context}")
        return prompt

    def __repr__(self) -> str:
        hooked, loaded, checked = self.hooked, self.loaded, self.engine.capability
        return (
            f"{self.id} at {self.revision[:7]}\n"
            f"  {self.cached.model_type}: {hooked.n_layers} layers, {hooked.n_heads} heads, hidden size "
            f"{hooked.hidden_size:,}, vocabulary {hooked.vocab_size:,}\n"
            f"  {self.dtype} on {hooked.device}: {hooked.weight_bytes / 1e6:,.0f} MB of weights, loaded in "
            f"{loaded.seconds:.1f} s\n"
            f"  differs from its own attention by {checked.disagreement:.1e} logits (noise {checked.noise:.1e})\n"
            f"  methods: clean, knockout, ablate, sweep, tokenize"
        )


def top_tokens(logits_V: Tensor, tokenizer: Any, k: int) -> pl.DataFrame:
    """The k most likely tokens, ties by id: rank (0 is the first), token_id, token, logit, prob."""
    logits_V = logits_V.cpu().double()
    ids: list[int] = logits_V.sort(descending=True, stable=True).indices[:k].tolist()
    texts, probs_V = token_texts(tokenizer, ids), logits_V.softmax(0)
    return pl.DataFrame(
        {
            "rank": range(len(ids)),
            "token_id": ids,
            "token": [texts[i] for i in ids],
            "logit": logits_V[ids].tolist(),
            "prob": probs_V[ids].tolist(),
        }
    )


def _compared(clean_V: Tensor, ablated_V: Tensor, top_k: int) -> Effects:
    """What one ablation did."""
    return Comparison(clean_V[None], ablated_V[None], torch.tensor([0], device=clean_V.device)).effects(top_k)


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


def _in_order(frame: pl.DataFrame, asked: Sequence[Ablation]) -> pl.DataFrame:
    """The rows in the order of the ablations: an engine measures in an order of its own."""
    place = {(a.layers, a.heads, a.edges): index for index, a in enumerate(asked)}
    order = [
        place[tuple(layers), None if heads is None else tuple(heads), tuple(zip(queries, keys, strict=True))]
        for layers, heads, queries, keys in frame.select("layers", "heads", "queries", "keys").iter_rows()
    ]
    return frame[sorted(range(len(order)), key=order.__getitem__)]


def _written(prompt: str | Prompt, **given: str | None) -> dict[str, str]:
    """A prompt as a job writes it."""
    said = {key: value for key, value in given.items() if value is not None}
    if isinstance(prompt, str):
        return {"text": prompt, **said}
    prompt = replace(prompt, **said)
    fields = {key: getattr(prompt, key) for key in ("id", "text", "answer", "wrong", "subject")}
    return {key: value for key, value in fields.items() if value is not None}


def _job(model: Model, prompt: Mapping[str, str], axes: Mapping[str, object], **options: object) -> Job:
    experiment = {"kind": "knockout", **axes}
    data = {"models": model.id, "dtype": model.dtype, "prompts": [prompt], "experiments": [experiment], **options}
    try:
        return make_job({"name": "notebook", **data})
    except UserError as error:
        # In a notebook there is one prompt and one experiment.
        plain = re.sub(r"^(prompts|experiments)\.0\.(<\w+>\.)?", "", error.what, flags=re.MULTILINE)
        raise UserError(plain, hint=error.hint) from None


def _with_texts(table: pa.Table, tokenizer: Any, tokens: Sequence[str], positions: Sequence[str]) -> pl.DataFrame:
    """Rows as a frame, with the text beside every token id and every position in the columns `positions`."""
    frame = cast(pl.DataFrame, pl.from_arrow(table))
    ids = ("answer_id", "wrong_id", "top1_clean", "top1_ablated")
    changed = frame["changed"].explode().struct.field("token_id")
    texts = token_texts(tokenizer, pl.concat([changed, *(frame[name] for name in ids)]).drop_nulls().to_list())

    def text_of(column: pl.Expr) -> pl.Expr:
        return column.replace_strict(list(texts), list(texts.values()), return_dtype=pl.String)

    named = pl.element().struct.with_fields(token=text_of(pl.element().struct.field("token_id")))
    return frame.with_columns(
        *(text_of(pl.col(name)).alias(f"{name.removesuffix('_id')}_token") for name in ids),
        *(
            pl.col(name).replace_strict(range(len(tokens)), tokens, return_dtype=pl.String).alias(f"{name}_token")
            for name in positions
        ),
        pl.col("changed").list.eval(named),
    )
