"""What one replica does, in whatever process it lives: tokenise, load one model, measure units. Never imports ray."""

import json
import os
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymi.catalog import CachedModel
from raymi.cluster.feeding import feed
from raymi.cluster.reading import check_tokens, read
from raymi.cluster.testbed import testbed
from raymi.cluster.tokenised import to_rows
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.autoencoders.resolve import Record, check_unchanged, refs, renewed, resolve
from raymi.experiments.unit import Unit
from raymi.job import Job
from raymi.plan.verification import company, drawn
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.store import schemas
from raymi.store.secret import scrub
from raymi.tokenizer import load_tokenizer, special_ids, token_texts
from raymi.vocabulary import check_loaded

if TYPE_CHECKING:
    import pyarrow as pa

    from raymi.experiments.setting import Setting
    from raymi.model.engine import Engine
    from raymi.model.loading import Loaded
    from raymi.sae import SAE

_TRACEBACK = 4000
"""Characters of a traceback's end that are kept."""


@dataclass(frozen=True, slots=True)
class Done:
    """A unit that was measured."""

    unit_id: str
    tables: "dict[str, pa.Table]"
    """Its rows, by table of the store."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a unit (or, without `unit_id`, a model) could not be measured, in words that hold no secrets."""

    unit_id: str | None
    kind: str
    """The exception's class, or what happened to the process."""
    message: str
    traceback: str = ""
    oom: bool = False
    """The device had too little memory for even one row."""
    tables: "Mapping[str, pa.Table]" = field(default_factory=dict[str, Any])
    """Rows that say more, by table of the store."""
    prompt_id: str | None = None
    """The one prompt that the model can never measure; its others go on."""


class Mismatch(Exception):
    """Ablations that were measured twice do not agree."""

    def __init__(self, message: str, records: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.records = records
        """Of table `verifications`."""


def failure(error: Exception, unit_id: str | None = None) -> Failed:
    """An exception as plain text: where it goes, its class may not be known and its traceback cannot go."""
    expected = isinstance(error, UserError)
    trace = "" if expected else "".join(traceback.format_exception(error))
    oom = not expected and _is_out_of_memory(error)
    tables = {"verifications": schemas.rows("verifications", error.records)} if isinstance(error, Mismatch) else {}
    return Failed(unit_id, type(error).__name__, scrub(str(error)), scrub(trace)[-_TRACEBACK:], oom, tables)


def of_prompt(prompt_id: str, error: UserError) -> Failed:
    """Why a model can never measure one prompt."""
    return Failed(None, UserError.__name__, scrub(str(error)), prompt_id=prompt_id)


@dataclass(slots=True)
class Worker:
    """One model. What goes wrong is an answer, never an exception.

    Args:
        model: the snapshot, with a path on this machine.
        job: the job.
        former: prompts that the run once had and the job has no longer; what of them cannot be read is left out.
        known: prompts and chunks that the run has of this model already: what is measured, whatever the tokenizer says.
        pinned: rows of table `saes` that the run has of this model: what its experiments use from then on.
        cache_dir: the Hugging Face cache in which others are looked for; None: where Hugging Face keeps it.
        threads: what torch may use on the CPU; None leaves it to torch.
        trust_remote_code: run the Python code that the snapshot brings along.
        allow_pickle: accept weights that are not safetensors.
        allow_unused: leave out tensors that the model of its config has no place for.
    """

    model: CachedModel
    job: Job
    former: Sequence[Prompt] = ()
    known: Sequence[TokenizedPrompt] = ()
    pinned: Sequence[Record] = ()
    cache_dir: Path | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    allow_unused: bool = False
    _tokenizer: Any = None
    _prompts: dict[str, TokenizedPrompt] = field(default_factory=dict[str, TokenizedPrompt])
    _saes: dict[str, tuple[SaeRef, ...]] = field(default_factory=dict[str, tuple[SaeRef, ...]])
    """By experiment."""
    _opened: "dict[SaeRef, SAE]" = field(default_factory=dict[SaeRef, Any])
    _engine: "Engine | None" = None
    _testbed: Record = field(default_factory=Record)
    """The row of table `testbeds`."""
    _texts: dict[int, str] = field(default_factory=dict[int, str])
    """Of the tokens that rows have named so far."""
    _draining: bool = False

    def prepare(self) -> "dict[str, pa.Table] | Failed":
        """Reads the prompts with the model's tokenizer, without its weights, and finds the autoencoders.

        Returns:
            Rows of the tables `prompts` and `saes`, and of `failures`: of prompts that cannot be read.
        """
        try:
            about: dict[str, Any] = {"model_id": self.model.id}
            prompts, faults = read(self.job, self.former, self.known, self._get_tokenizer(), **about)
            texts = {**{text.prompt.id: text for text in self.known}, **prompts}
            records, more = feed(
                self.job, self._find(), texts, self.former, self._get_tokenizer(), **about, faults=faults
            )
            prompts |= more
            unread = [of_prompt(prompt_id, fault) for prompt_id, fault in faults.items()]
            rows = to_rows(self.model, list(prompts.values()), self._get_tokenizer())
        except Exception as error:
            return failure(error)
        self._prompts, self._saes = prompts, refs(records)
        failures = [
            {"stage": "prompt", "kind": each.kind, "message": each.message, "prompt_id": each.prompt_id}
            for each in unread
        ]
        return {"prompts": rows, "saes": schemas.rows("saes", records), "failures": schemas.rows("failures", failures)}

    def load(self) -> "dict[str, pa.Table] | Failed":
        """Loads the weights, and the prompts if that was not done before, and verifies a few ablations.

        Returns:
            Rows of the tables `models`, `testbeds`, `verifications` and `events`.
        """
        if not self._prompts and isinstance(failed := self.prepare(), Failed):
            return failed
        try:
            loaded = self._load()
            for spec in self.job.experiments:
                spec.confirm(self.model, loaded.model.attention_layers, loaded.model.all_heads)
            self._confirm_places(loaded)
            verified = self._verify(loaded.engine)
        except Exception as error:
            return failure(error)
        return {
            "models": schemas.rows("models", [_describe(self.model, self.job.dtype, loaded)]),
            "testbeds": schemas.rows("testbeds", [self._testbed]),
            "verifications": schemas.rows("verifications", verified),
            "events": self._gave_up("before the first unit"),
        }

    def run(self, units: Sequence[Unit]) -> Iterator[Done | Failed]:
        """Measures units in order; ends early, between two of them, when `drain` was called."""
        for unit in units:
            if self._draining:
                return
            try:
                item = self._measure(unit)
            except Exception as error:
                item = failure(error, unit.unit_id)
            yield item

    def drain(self) -> None:
        """Begin no further unit. May be called from another thread."""
        self._draining = True

    def _find(self) -> list[Record]:
        """The autoencoders of all experiments: those that the run has once found, and new ones of new experiments."""
        pinned = refs(self.pinned)
        for its in pinned.values():
            for ref in its:
                check_unchanged(ref)
        new = [spec for spec in self.job.sae_experiments if spec.name not in pinned]
        others = bool(self.pinned) or len(self.job.sae_experiments) < len(self.job.experiments)
        known = renewed(self.pinned, self.job.sae_experiments, self.model, cache_dir=self.cache_dir)
        return [*known, *resolve(new, self.model, cache_dir=self.cache_dir, others=others)]

    def _load(self) -> "Loaded":
        import torch

        from raymi.model.loading import load

        if self.threads:
            torch.set_num_threads(self.threads)
        loaded = load(
            self.model.path,
            name=self.model.id,
            dtype=self.job.dtype,
            device=self.job.device,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
            allow_unused=self.allow_unused,
            longest=self._longest(),
            way="full" if self.job.engine == "full" else None,
        )
        self._engine = loaded.engine
        self._testbed = testbed(loaded.model.device, self.job.dtype)
        return loaded

    def _longest(self) -> int:
        """Tokens of the longest text that is measured; beyond the model's context none is."""
        lengths = [len(text.token_ids) for text in self._prompts.values()]
        return max((n for n in lengths if self.model.context is None or n <= self.model.context), default=1)

    def _confirm_places(self, loaded: "Loaded") -> None:
        if self._saes:
            from raymi.experiments.autoencoders.places import confirm_places

            confirm_places(loaded.model, [ref for its in self._saes.values() for ref in its])

    def _verify(self, engine: "Engine") -> list[dict[str, Any]]:
        """Measures a little twice before any row is made; raises Mismatch, or turns to full forwards, verified too."""
        records = self._measure_twice(engine)
        if self.job.on_mismatch == "full" and engine.way != "full" and not all(each["passed"] for each in records):
            engine.way = "full"
            again = self._measure_twice(engine)
            _refuse_mismatch(self.model.id, again, records)
            return records + again
        _refuse_mismatch(self.model.id, records)
        return records

    def _measure_twice(self, engine: "Engine") -> list[dict[str, Any]]:
        """Records of table `verifications`, of work that is drawn from all experiments."""
        from raymi.experiments.setting import Drawn, running

        prompts = [each for each in self._prompts.values() if self._knows(each)]
        by_kind: dict[str, list[Drawn]] = {}
        for spec, prompt, work in drawn(self.job, self.model, prompts, self._saes):
            saes = self._saes.get(spec.name, ())
            among = partial(company, self.job, spec, self.model, prompts, prompt, work, saes)
            by_kind.setdefault(spec.kind, []).append(Drawn(spec, prompt, work, among))
        setting = self._setting(engine)
        return [record for its in by_kind.values() for record in running(its[0].spec).verify(setting, its)]

    def _measure(self, unit: Unit) -> Done:
        started = time.perf_counter()
        self._loaded().gave_up.clear()  # what is left of a unit that failed
        spec = next(spec for spec in self.job.experiments if spec.name == unit.experiment)
        prompt_ids = [prompt_id for prompt_id, _ in unit.items]
        check_tokens(self.model.id, self._prompts, prompt_ids, unit.tokens)
        for prompt_id in prompt_ids:
            self._check_ids(self._prompts[prompt_id], answers=spec.asks_for_answers)
        from raymi.experiments.setting import running

        rows = running(spec).measure(self._setting(self._loaded()), spec, unit)
        rows = rows.append_column(schemas.TESTBED, [[self._testbed["testbed"]] * rows.num_rows])
        tables = {
            spec.table: rows,
            "vocabulary": self._vocabulary(rows),
            "events": self._gave_up(f"unit {unit.unit_id}"),
        }
        return Done(unit.unit_id, tables, time.perf_counter() - started)

    def _check_ids(self, prompt: TokenizedPrompt, *, answers: bool = True) -> None:
        """Raises UserError when the loaded model, whatever its config says, has no row for a token of a prompt."""
        check_loaded(self.model.id, prompt, self._loaded().model, answers=answers)

    def _knows(self, prompt: TokenizedPrompt) -> bool:
        try:
            self._check_ids(prompt)
        except UserError:
            return False
        return True

    def _gave_up(self, what: str) -> "pa.Table":
        """Rows of table `events`: why anything took the slow way since this was last asked."""
        reasons = self._loaded().gave_up
        events = [
            {
                "model_id": self.model.id,
                "revision": self.model.revision,
                "kind": "full",
                "message": scrub(f"{what}: {why}" + (f" ({times} times)" if times > 1 else "")),
                "happened_at": datetime.now(UTC),
            }
            for why, times in Counter(reasons).items()
        ]
        reasons.clear()
        return schemas.rows("events", events)

    def _setting(self, engine: "Engine") -> "Setting":
        from raymi.experiments.setting import Setting

        special = special_ids(self._get_tokenizer())
        return Setting(engine, self._prompts, self._sae, special, **self._about(), top_k=self.job.top_k)

    def _sae(self, ref: SaeRef) -> "SAE":
        """An autoencoder on the model's device, opened when it is first needed."""
        if ref not in self._opened:
            from raymi.sae import load

            check_unchanged(ref)
            self._opened[ref] = load(
                ref.where,
                cache_dir=self.cache_dir,
                device=str(self._loaded().model.device),
                dtype="float32",
                site=ref.site,
                site_out=ref.site_out,
                input_scale=ref.input_scale,
                centred=ref.centred,
            )
        return self._opened[ref]

    def _loaded(self) -> "Engine":
        assert self._engine is not None, "measures before it has loaded"
        return self._engine

    def _about(self) -> dict[str, str]:
        """What every row says of the model."""
        return {"model_id": self.model.id, "revision": self.model.revision, "dtype": self.job.dtype}

    def _vocabulary(self, rows: "pa.Table") -> "pa.Table":
        """The text of the tokens that these rows name."""
        named: set[Any] = set()
        if "changed" in rows.column_names:
            named.update(rows["changed"].combine_chunks().flatten().field("token_id").to_pylist())
        for column in ("token_id", "answer_id", "wrong_id", "top1_clean", "top1_ablated"):
            if column in rows.column_names:
                named.update(rows[column].to_pylist())
        named.discard(None)
        self._texts |= token_texts(self._get_tokenizer(), named - self._texts.keys())
        about = {"model_id": self.model.id, "revision": self.model.revision}
        return schemas.rows(
            "vocabulary", ({**about, "token_id": token, "token": self._texts[token]} for token in sorted(named))
        )

    def _get_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        return self._tokenizer


def _refuse_mismatch(model_id: str, records: list[dict[str, Any]], before: Sequence[dict[str, Any]] = ()) -> None:
    """Raises Mismatch when one of them has not passed; `before` is recorded with them."""
    failed = [record for record in records if not record["passed"]]
    if failed:
        worst = max(failed, key=lambda record: record["max_logit_diff"])
        off, noise, where = worst["max_logit_diff"], worst["tolerance"], "in the logits"
        if off <= noise and worst.get("spread") is not None:  # only over all of them together it shows
            off, noise, where = worst["spread"], worst["spread_tolerance"], "over all logits"
        raise Mismatch(
            f"{model_id}: {len(failed)} of {len(records)} verified ablations differ from full forwards, by up to "
            f"{off:.1e} {where} where {noise:.1e} would be noise",
            [*before, *records],
        )


def _describe(model: CachedModel, dtype: str, loaded: "Loaded") -> Mapping[str, Any]:
    """The row of table `models`."""
    hooked = loaded.model
    return {
        "model_id": model.id,
        "revision": model.revision,
        "model_type": model.model_type,
        "architecture": type(hooked.model).__name__,
        "dtype": dtype,
        "device": str(hooked.device),
        "attention": "function" if hooked.dispatches else "mask",
        "n_layers": hooked.n_layers,
        "n_heads": hooked.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "hidden_size": hooked.hidden_size,
        "vocab_size": hooked.vocab_size,
        "parameters": sum(p.numel() for p in hooked.model.parameters()),
        "weight_bytes": hooked.weight_bytes,
        "load_seconds": loaded.seconds,
        "ram_before": loaded.before.ram,
        "ram_after": loaded.after.ram,
        "vram_before": loaded.before.vram,
        "vram_after": loaded.after.vram,
        "host": socket.gethostname(),
        "replica": str(os.getpid()),
        "loaded_at": datetime.now(UTC),
        "capability": json.dumps(asdict(loaded.capability)),
        "status": "loaded",
        "unused": loaded.unused,
    }


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from raymi.model.engine import OutOfMemory
    from raymi.model.memory import is_out_of_memory

    return isinstance(error, OutOfMemory) or is_out_of_memory(error)
