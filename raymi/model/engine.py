"""Measuring ablations by the fastest way that is exact on a model, as many at a time as fit into memory."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model import memory
from raymi.model.attention import UnsupportedAttention
from raymi.model.cone import Cone, NotClean
from raymi.model.full import Batch, Full, Way
from raymi.model.hooked import Cell, HookedModel, NotFinite, NotFired
from raymi.model.interventions import Mask, scale
from raymi.model.kinds import layer_kinds
from raymi.model.proof import CAP, Precision, Truth, first_wrong, is_half, precision, truths
from raymi.model.routing import routing
from raymi.model.sites import NoSuchPlace, hidden_input
from raymi.model.sizes import KEPT_BYTES, kept_bytes, pays_together, prompts_kept, rows_per_batch
from raymi.model.truth import NoTruth, in_float32


class OutOfMemory(RuntimeError):
    """Not even one ablation at a time fits."""


class WrongNumbers(RuntimeError):
    """raymi's own attention and the family's eager attention do not agree on this model."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What was measured on a model at load, in logits."""

    way: Way
    """The fastest way that is exact."""
    together: bool
    """Whether rows of several prompts may share a sweep."""
    why: str
    """Why the way is not `cone`; empty when it is."""
    noise: float
    """Largest difference that rounding alone makes: another shape of the batch, another last digit at every layer."""
    tolerance: float
    """Differences up to this are noise. In half precision that proves little: effects are held to `precision` there."""
    disagreement: float
    """Largest difference of raymi's full forwards from the family's own attention."""
    cone_error: float
    """Largest difference of the way from full forwards; in half precision, of its effects from float32's."""
    n_tokens: int
    """Length of the prompt that it was measured on."""
    precision: Precision | None = None
    """In half precision: what it makes of the family's own forward."""
    jumped: int = 0
    """Ablations of the trial that were right only when experts were chosen as in float32."""

    @property
    def clean_tolerance(self) -> float:
        """What `Cone` takes as such."""
        return self.tolerance if self.precision is None else self.precision.tolerance

    @property
    def routes(self) -> bool:
        """Whether experts are chosen in half precision, and near-ties among them may jump."""
        return self.precision is not None and self.precision.routes


@dataclass(slots=True)
class Engine:
    """A model and the way its ablations are measured."""

    model: HookedModel
    capability: Capability
    way: Way
    limits: dict[tuple[Way, int, int], int] = field(default_factory=dict[tuple[Way, int, int], int])
    """(way, positions computed, positions attended to) -> rows at a time; halved when memory runs out."""
    cones: list[Cone] = field(default_factory=list[Cone])
    """The last ones, the newest at the end: a clean run serves all units of its prompts, of all experiments. To be
    cleared when a weight has been changed."""
    gave_up: list[str] = field(default_factory=list[str])
    """Why sweeps were given up, and their ablations measured by full forwards. Whoever reads it may clear it."""
    baselines: dict[tuple[str, int | None], Tensor] = field(default_factory=dict[tuple[str, int | None], Tensor])
    """(site, head or all of them) -> what is unembedded when the site is zero everywhere, [1, D]: where nothing of the
    text is left then, it is measured once."""

    def ablations(self, ids_PT: Tensor, cells: Sequence[Cell]) -> Iterator[Batch]:
        """Measure ablations.

        Args:
            ids_PT: token ids of prompts of one length.
            cells: what to do to which of them.

        Yields:
            Batches in the engine's own order; `Batch.cells` says which ablations they hold.

        Raises:
            OutOfMemory: when a single ablation does not fit.
            NotFinite: when a full forward gives that, too.
            NotFired: rather than a wrong number.
        """
        most = self._prompts_at_once(ids_PT, len(cells))
        found = self._method(ids_PT, cells) if len(ids_PT) <= most else None
        if found is None:
            yield from self._in_parts(ids_PT, cells, min(most, (len(ids_PT) + 1) // 2))
            return
        method, cells = found
        for group in method.groups(cells):
            yield from self._group(method, cells, group)

    def _group(self, method: Cone | Full, cells: Sequence[Cell], group: list[int]) -> Iterator[Batch]:
        """Cells that may share a batch, as many at a time as fit; by full forwards where the cone turns out not to be
        exact, or the family's code not to bear it.
        """
        while group:
            key = self._key(method, cells[group[0]])
            chosen, done = _as_many_as_fit(method, cells, group, self._limit(key)), 0
            try:
                for batch in method.measure(cells, chosen):
                    done += len(batch.cells)
                    yield batch
            except Exception as error:
                if memory.is_out_of_memory(error):
                    self._halve(key, len(chosen), error)
                elif isinstance(method, Full) or _is_a_mistake(error):
                    raise
                else:  # every sweep is tried: one that fails costs little beside the full forwards that follow
                    self.gave_up.append(f"{type(error).__name__}: {error}")
                    method = Full(self.model, method.ids_PT)
            group = group[done:]

    def _prompts_at_once(self, ids_PT: Tensor, n_cells: int) -> int:
        (n_prompts, n_tokens), together = ids_PT.shape, self.capability.together
        if self.way == "full" or n_prompts == 1:
            return n_prompts
        if not together or not pays_together(self.model.shape, n_prompts, n_cells, n_tokens):
            return 1
        free = memory.available(self.model.device)
        return min(self._limit((self.way, n_tokens, n_tokens)), prompts_kept(self.model.shape, n_tokens, free))

    def _in_parts(self, ids_PT: Tensor, cells: Sequence[Cell], most: int) -> Iterator[Batch]:
        for begin in range(0, len(ids_PT), most):
            indices = [i for i, cell in enumerate(cells) if begin <= cell.prompt < begin + most]
            part = [Cell(cells[i].prompt - begin, cells[i].interventions) for i in indices]
            for batch in self.ablations(ids_PT[begin : begin + most], part) if part else ():
                yield batch._replace(cells=[indices[i] for i in batch.cells])

    def _method(self, ids_PT: Tensor, cells: Sequence[Cell]) -> tuple[Cone | Full, Sequence[Cell]] | None:
        """How to measure, and the cells as they are called there: a clean run may be of more prompts than these.

        None when the prompts' clean run does not fit into memory, and there is more than one of them.
        """
        if self.way == "full":
            return Full(self.model, ids_PT), cells
        first = min(cell.first_query for cell in cells)
        for cone in reversed(self.cones):
            place = cone.places(ids_PT, first, prefix=self.way == "cone")
            if place is not None:
                self.cones.remove(cone)
                self.cones.append(cone)
                return cone, [Cell(place[cell.prompt], cell.interventions) for cell in cells]
        made = self._clean_run(ids_PT, first)
        return None if made is None else (made, cells)

    def _clean_run(self, ids_PT: Tensor, first: int) -> Cone | None:
        """A new clean run; None when it does not fit and there is more than one prompt."""
        (n_prompts, n_tokens), shape = ids_PT.shape, self.model.shape
        if kept_bytes(shape, n_prompts, n_tokens) <= KEPT_BYTES // 4:
            first = 0  # then it will serve every query to come
        while sum(cone.bytes for cone in self.cones) > KEPT_BYTES:
            del self.cones[0]
        while True:
            try:
                made = Cone(
                    self.model,
                    ids_PT,
                    first,
                    prefix=self.way == "cone",
                    tolerance=self.capability.clean_tolerance,
                    routes=self.capability.routes,
                )
                self.cones.append(made)
                return made
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                if not self.cones:
                    key = self.way, n_tokens, n_tokens
                    self._limit(key)
                    self._halve(key, n_prompts, error)
                    return None
            # The others' memory goes first; not within the except clause, for the error holds what the failed run made.
            self.cones.clear()
            memory.empty_cache(self.model.device)

    def held(self, ids_1T: Tensor, cell: Cell, truth: Truth, way: Way) -> Tensor:
        """The effect of one ablation of one prompt, [V], measured by itself with the truth's choices of experts."""
        return _held(self.model, ids_1T, cell, truth, way, self.capability.clean_tolerance)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _key(self, method: Cone | Full, cell: Cell) -> tuple[Way, int, int]:
        n_tokens = method.ids_PT.shape[1]
        return method.way, n_tokens - (cell.first_query if method.way == "cone" else 0), n_tokens

    def _limit(self, key: tuple[Way, int, int]) -> int:
        if key not in self.limits:
            way, computed, attended = key
            free, device = memory.available(self.model.device), self.model.device.type
            # A clean row always comes along.
            rows = rows_per_batch(self.model.shape, computed, attended, device, free, sliced=way != "full")
            self.limits[key] = max(2, rows)
        return self.limits[key]

    def _halve(self, key: tuple[Way, int, int], n_cells: int, error: Exception) -> None:
        if n_cells == 1:
            raise OutOfMemory(
                f"{self.model.name}: one ablation of a prompt of {key[2]} tokens does not fit into memory ({error})"
            ) from error
        self.limits[key] = max(2, min(self.limits[key], n_cells + 1) // 2)
        del self.cones[:-1]  # the last one is in use
        memory.empty_cache(self.model.device)


def _is_a_mistake(error: Exception) -> bool:
    """Whether an exception is raymi's fault or the caller's, and not that of a family's code run in an unusual way."""
    if isinstance(error, (NotFired, NoSuchPlace)):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    return ours and isinstance(error, (AssertionError, AttributeError, LookupError, NameError, TypeError))


def _as_many_as_fit(method: Cone | Full, cells: Sequence[Cell], indices: Sequence[int], limit: int) -> list[int]:
    """The longest beginning whose batch has at most `limit` rows; at least one."""
    n = min(len(indices), limit)
    while n > 1 and method.rows([cells[i] for i in indices[:n]]) > limit:
        n -= max(1, (method.rows([cells[i] for i in indices[:n]]) - limit) // 2)
    return list(indices[: max(1, n)])


# -- capability ------------------------------------------------------------------------------------------------------


def measure_capability(model: HookedModel, n_tokens: int) -> Capability:
    """Find the fastest way that is exact, by trying; never by a model's name.

    Args:
        model: the model.
        n_tokens: prompt length to try on: longer than every window and chunk that a prompt of the job can exceed.

    Raises:
        WrongNumbers: raymi's attention differs from the family's own, or rows change each other: no way is right.
        UnsupportedAttention: the family's code cannot have its attention cut.
    """
    ids_PT = model.probe_ids(n_tokens, 2)
    cells = _trial(model, n_tokens)
    free = memory.available(model.device)
    rows = max(2, rows_per_batch(model.shape, n_tokens, n_tokens, model.device.type, free, sliced=False))
    with _its_own_code(model):
        full_AV, clean_AV = _measured(Full(model, ids_PT), cells, rows)
        company, rounding = _company(model, ids_PT, min(4, rows)), _rounding(model, ids_PT, min(3, rows))
        own_AV = torch.cat(
            # One row at a time: the family's own attention takes an edited mask, as large as its scores, for every row.
            [_by_own_attention(model, ids_PT, [cell]) for cell in cells]
        )
    largest, half = float(own_AV.abs().max()), is_half(model)
    noise = max(company, rounding)
    tolerance = min(CAP * largest, max(20 * company, 5 * rounding, largest * (4e-2 if half else 2e-5)))
    judge, no_proof = _judge(model, ids_PT, cells, rows) if half else (None, "")
    mixed, most = (judge.company, 1e-3) if judge else (company, 0.3 if half else 1e-3)
    if not mixed <= largest * most:
        raise WrongNumbers(f"{model.name}: the rows of a batch change each other's logits, by {mixed:.2e}")
    judge = judge or _Near(full_AV, tolerance)
    disagreement = float((full_AV - own_AV).abs().max())
    _, jumped, wrong = judge((own_AV if isinstance(judge, _Near) else full_AV, clean_AV), "full", len(cells))
    if wrong:
        raise WrongNumbers(
            f"{model.name}: raymi's attention differs from {type(model.model).__name__}'s own by {disagreement:.2e} "
            f"in the logits: {wrong}"
        )
    reasons: list[str] = []
    for way in ("cone", "layers"):
        if no_proof or (way == "cone" and not model.dispatches):
            reasons.append(f"{way}: {no_proof or 'the family computes its attention itself'}")
            continue
        off, jumps, why = _try(model, ids_PT[:1], [cell for cell in cells if cell.prompt == 0], judge, way)
        if why:
            reasons.append(f"{way}: {why}")
            continue
        together = not _try(model, ids_PT, cells, judge, way)[2]
        break
    else:
        way, together, off, jumps = "full", True, 0.0, 0
    return Capability(
        way=way,
        together=together,
        why="; ".join(reasons),
        noise=noise,
        tolerance=tolerance,
        disagreement=disagreement,
        cone_error=off,
        n_tokens=n_tokens,
        precision=judge.typical,
        jumped=jumped + jumps,
    )


def _judge(model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell], rows: int) -> tuple["_Beside | None", str]:
    """What ways are judged by in half precision, or why there is nothing."""
    try:
        # Few rows at a time: edited masks are as large as scores, and these are in float32.
        found = truths(model, ids_PT, cells, rows=max(1, rows // 8))
        with in_float32(model):  # where rounding cannot hide what rows do to each other
            return _Beside(model, ids_PT, cells, found, _company(model, ids_PT, 2)), ""
    except NoTruth as error:
        why = str(error)
    except Exception as error:  # a family's own code, run in a way that it was not written for, may fail in any way
        out_of_memory = memory.is_out_of_memory(error)
        why = "a layer in float32 does not fit into memory" if out_of_memory else f"{type(error).__name__}: {error}"
    memory.empty_cache(model.device)  # not within the except clause, for the error holds what the failed forward made
    return None, f"no proof in half precision: {why}"


@contextmanager
def _its_own_code(model: HookedModel) -> Iterator[None]:
    """Names the model when its own code cannot be run in the way that cutting edges asks for."""
    try:
        yield
    except (NotFinite, NoSuchPlace, UnsupportedAttention):
        raise
    except NotFired as error:
        family = type(model.model).__name__
        raise UnsupportedAttention(
            f"{model.name}: {family} does not call its attention once a layer, so edges of it cannot be cut ({error})"
        ) from error
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise
        family = type(model.model).__name__
        raise UnsupportedAttention(f"{model.name}: {family} fails when its attention is cut: {error}") from error


def _trial(model: HookedModel, n_tokens: int) -> list[Cell]:
    """Cuts in the lowest and the highest layer with attention, at the end and in the middle, on two prompts; and in one
    layer of every other kind, so that heads and windows which were taken for others are found.

    Where the residual stream can be changed, it is, below all layers (those without attention may keep a state), below
    the highest, and below one of every other kind without attention.
    """
    last, middle = n_tokens - 1, n_tokens // 2
    lowest, highest = model.attention_layers[0], model.attention_layers[-1]
    masks = [
        (Mask(lowest, (model.heads(lowest) - 1,), ((last, last - 1), (last, 0))),),
        (Mask(highest, None, ((last, last),)),),
        (Mask(lowest, (0,), ((middle, middle),)), Mask(highest, (0,), ((last, middle),))),
    ]
    others = _one_of_each_kind(model, {lowest, highest})
    masks += [
        (Mask(layer, (model.heads(layer) - 1,), ((last, last - 1), (middle, 0))), Mask(layer, None, ((last, last),)))
        for layer in others
        if model.blocks[layer].attention is not None
    ]
    without = [layer for layer in others if model.blocks[layer].attention is None]
    changed = [layer for layer in dict.fromkeys((0, highest, *without)) if model.blocks[layer].resid is not None]
    changes = [(scale(layer, "hook_resid_pre", (middle,), 0.5),) for layer in changed]
    return [Cell(prompt, of_row) for prompt in (0, 1) for of_row in (*masks, *changes)]


def _one_of_each_kind(model: HookedModel, tried: set[int]) -> list[int]:
    """The first layer of every kind that these are not of."""
    kinds = layer_kinds(model)
    known = {kinds[layer] for layer in tried}
    return [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind not in known]


def _company(model: HookedModel, ids_PT: Tensor, rows: int) -> float:
    """How much the logits of a prompt differ between a forward alone and one within a batch.

    In half precision with the same choices of experts in both.
    """
    with routing(model) if is_half(model) else nullcontext() as watched:
        alone = model.forward(ids_PT[:1]).logits_BV[0]
    with routing(model, [None, watched.of_row(0)]) if watched else nullcontext():
        within = model.forward(ids_PT[[1, 0, 1, 1][:rows]]).logits_BV[1]
    return float((alone - within).abs().max())


def _rounding(model: HookedModel, ids_PT: Tensor, rows: int) -> float:
    """How much the logits of a prompt differ when the last digit of every layer's input does.

    Any other order of the same arithmetic rounds otherwise. In half precision that is by far the most of the noise, and
    no other shape of the batch need show it.
    """
    generator, last_digit = torch.Generator().manual_seed(0), torch.finfo(model.dtype).eps

    def shake(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = hidden_input(args, kwargs)
        factor = 1 + last_digit * (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5)
        shaken = (x.double() * factor.to(x.device)).to(x.dtype)
        return ((shaken, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": shaken})

    same_BT = ids_PT[:1].expand(rows, -1)
    still = model.forward(same_BT).logits_BV
    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.module.register_forward_pre_hook(shake, with_kwargs=True).remove)
        return float((model.forward(same_BT).logits_BV - still).abs().max())


def _by_own_attention(model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell]) -> Tensor:
    interventions = [cell.interventions for cell in cells]
    return model.forward(ids_PT[[cell.prompt for cell in cells]], interventions, own_attention=True).logits_BV


_Measured = tuple[Tensor, Tensor]
"""Ablated logits in the order of the cells, [A, V], and the clean ones of their batches, [A, V]."""


class _Near:
    """What is right is near full forwards, within a tolerance."""

    typical, routes = None, False

    def __init__(self, full_AV: Tensor, tolerance: float) -> None:
        self.full_AV, self.tolerance = full_AV, tolerance

    def __call__(self, measured: _Measured | None, way: Way, n_cells: int) -> tuple[float, int, str]:
        assert measured is not None, "whose experts may jump has its truth"
        ablated_AV, _ = measured
        off = float((ablated_AV - self.full_AV[:n_cells]).abs().max())
        why = f"off by {off:.1e} in the logits, where {self.tolerance:.1e} would be noise"
        return off, 0, "" if off <= self.tolerance else why


class _Beside:
    """In half precision: what is right has effects that are not much farther from float32's than the family's own."""

    def __init__(
        self, model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell], found: list[Truth], company: float
    ) -> None:
        self.model, self.ids_PT, self.cells, self.found, self.company = model, ids_PT, cells, found, company
        self.typical = precision(found)
        self.tolerance, self.routes = self.typical.tolerance, self.typical.routes

    def __call__(self, measured: _Measured | None, way: Way, n_cells: int) -> tuple[float, int, str]:
        def held(i: int) -> Tensor:
            cell = self.cells[i]
            return _held(self.model, self.ids_PT[cell.prompt][None], cell, self.found[i], way, self.tolerance)

        effects = [None] * n_cells if measured is None else list(measured[0] - measured[1])
        return first_wrong(self.found[: len(effects)], effects, held, self.typical, capped=way != "full")


def _held(model: HookedModel, ids_1T: Tensor, cell: Cell, truth: Truth, way: Way, tolerance: float) -> Tensor:
    with routing(model, truth.choices):
        cone = None if way == "full" else Cone(model, ids_1T, 0, prefix=way == "cone", tolerance=tolerance)
        # The rows of either are a clean one and this.
        [batch] = (cone or Full(model, ids_1T)).measure([Cell(0, cell.interventions)], [0])
    return batch.ablated_AV[0] - batch.clean_PV[0]


def _try(
    model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell], judge: _Near | _Beside, way: Way
) -> tuple[float, int, str]:
    """How far a way is off, how often experts had to be held for that, and what speaks against it."""
    first, tolerance = min(c.first_query for c in cells), judge.tolerance
    try:
        try:
            cone = Cone(model, ids_PT, first, prefix=way == "cone", tolerance=tolerance, routes=judge.routes)
            measured = _measured(cone, cells, len(cells) + 1)
        except NotClean:
            if not judge.routes:
                raise
            measured = None  # experts may have jumped: each is measured again with the same ones
        return judge(measured, way, len(cells))
    except (NotFinite, NotFired, NotClean, NoSuchPlace) as error:
        return 0.0, 0, str(error)
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise
        # A family's own code, run in a way that it was not written for, may fail in any way.
        return 0.0, 0, f"{type(error).__name__}: {error}"


def _measured(method: Cone | Full, cells: Sequence[Cell], rows: int) -> _Measured:
    """Measure cells, so many rows at a time."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in method.groups(cells):
        while group:
            chosen = _as_many_as_fit(method, cells, group, rows)
            group = group[len(chosen) :]
            for batch in method.measure(cells, chosen):
                pairs = zip(batch.ablated_AV, batch.clean_PV[batch.prompt_A], strict=True)
                found.update(zip(batch.cells, pairs, strict=True))
    ablated, clean = zip(*(found[i] for i in range(len(cells))), strict=True)
    return torch.stack(ablated), torch.stack(clean)
