"""One type: what raymi makes of its tiny model, compared with what transformers and plain hooks make of it.

Everything is held to 1e-5 of its scale in float32; what changes nothing that can be seen counts as not compared.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymi import catalog
from raymi.errors import UserError
from raymi.model import interventions, sites
from raymi.model.attention import UnsupportedAttention
from raymi.model.engine import Engine, WrongNumbers
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Edit, Intervention, Mask
from raymi.model.loading import BadWeights, load
from raymi.model.sites import NoSuchPlace, UnknownSite
from tests.conformance import configs
from tests.conformance.places import places
from tests.conformance.renderings import Change, NoPlace, Rendered, Rewrite, Untouched
from tests.conformance.table import SEE, Line
from tests.oracles import Knockout

TOLERANCE = 1e-5
ROUNDING = 10
"""Where rounding alone comes near that: so many times what the untouched model's rows differ by, alone and together."""
VISIBLE = 1e-3
"""Of the scale: the least that the strongest change of a kind must do to the logits, and half of them a tenth of it."""
REFUSALS = (UserError, NoSuchPlace, UnsupportedAttention, WrongNumbers, BadWeights)


def check(model_type: str) -> Line:
    """The line of one type."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    id = f"tiny/{model_type.replace('/', '-')}"
    if model_type not in configs.TYPES | configs.VARIANTS:
        return Line(model_type, "not built", why="tests/conformance/configs.py has no small config of it")
    with tempfile.TemporaryDirectory() as cache:
        try:
            folder = configs.save(model_type, Path(cache), id)
            model = configs.load(folder)
            model(configs.prompt(), use_cache=False)
        except Exception as error:
            return Line(model_type, "not built", why=_said(error))
        try:
            found = catalog.find(id, Path(cache))
            if found.reason is not None:
                raise UserError(found.reason)
            engine = load(folder, name=model_type, device="cpu", longest=configs.PROMPT).engine
        except REFUSALS as error:
            return Line(model_type, "refused", why=_said(error))
        except Exception as error:
            return Line(model_type, "crash", why=_said(error))
    untouched = Untouched(model, places(model_type))
    clean = untouched.run(configs.prompt(rows=2))
    line = Line(model_type, engine.capability.way, why=engine.capability.why)
    if not engine.capability.together:
        line.unchecked["together"] = "rows of several prompts do not share a sweep"
    compared = _Compared(line, engine, untouched, clean)
    compared.attempt("knockouts", compared.knockouts)
    for site in interventions.EDITABLE:
        compared.attempt(site, lambda site=site: compared.edits(site))
    # What a norm gives before its weights is compared with TransformerLens, in tests/model.
    for name in ("hook_embed", *(name for name in sites.NAMES if name != "ln2.hook_normalized")):
        compared.attempt(f"{SEE}{name}", lambda name=name: compared.captures(name))
    return line


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


@dataclass
class _Compared:
    line: Line
    engine: Engine
    untouched: Untouched
    clean: Rendered

    @property
    def model(self) -> HookedModel:
        return self.engine.model

    def attempt(self, item: str, compare: Callable[[], None]) -> None:
        try:
            compare()
        except NoPlace:
            self.line.unchecked[item] = "no hand-written place"
        except Exception as error:
            self.line.wrong[item] = type(error).__name__

    def verdict(self, item: str, off: float, effect: float, allowed: float = TOLERANCE) -> None:
        """All as shares of the scale."""
        if not off <= allowed:
            self.line.wrong[item] = f"{off:.0e}"
        elif effect < VISIBLE:
            self.line.unchecked[item] = "no effect to be seen"
        else:
            self.line.exact.add(item)

    # -- knockouts ---------------------------------------------------------------------------------------------------

    def knockouts(self) -> None:
        last, every = configs.PROMPT - 1, tuple(self.untouched.heads)
        chosen: list[Knockout] = []
        for layer, n_heads in self.untouched.heads.items():
            chosen += [
                Knockout((layer,), (n_heads - 1,), ((last, last - 1), (last, last - 2))),
                Knockout((layer,), None, ((last, last - 1), (last, 0))),
                Knockout((layer,), (0, n_heads - 1), tuple((last, key) for key in range(last + 1))),
                Knockout((layer,), None, tuple((query, query - 1) for query in range(last - 3, last))),
            ]
        chosen.append(Knockout(every, None, ((last, last - 3), (last - 1, last - 1), (last, last))))
        of = [tuple(Mask(layer, one.heads, one.edges) for layer in one.layers) for one in chosen]
        # One prompt by itself goes another way through the cone than several.
        alone_AV = self.measured(of[::2], self.engine.capability.way, rows=1)[0]  # every other one is of the first
        changes = [(one,) for one in chosen]
        rendered = self.rendered(changes)
        off, effect = self.off(alone_AV, rendered, every=2), self.effect(rendered)
        for way in {self.engine.capability.way, "full"}:
            ablated, fired, empty = self.measured(of, way)
            off = max(off, self.off(ablated, rendered))
            if empty != rendered.empty_B:
                self.line.wrong["empty"] = "counts differ"
            if fired != rendered.cut_B:
                self.line.wrong["fired"] = "counts differ"
        self.line.exact |= {"fired", "empty"} - self.line.wrong.keys()
        self.verdict("knockouts", off, effect, self.allowed(off, changes, rendered))

    # -- edits -------------------------------------------------------------------------------------------------------

    def edits(self, site: str) -> None:
        offered = [layer for layer in range(self.model.n_layers) if self.offers(layer, site)]
        if not offered:
            return
        last, chosen = configs.PROMPT - 1, list[Rewrite]()
        generator = torch.Generator().manual_seed(0)
        for layer in offered:
            heads: tuple[int, ...] | None = None
            there = self.seen(layer, site)
            if site == "attn.hook_z":
                heads = (self.untouched.heads[layer] - 1,)
            value = torch.randn(there.shape[-1], generator=generator) * there.std()
            chosen.append(Rewrite(layer, site, (last - 2, last), heads, 0.5))
            chosen.append(Rewrite(layer, site, (last - 1, last), heads, 0.0, value))
        changes: list[tuple[Change, ...]] = [(one,) for one in chosen]
        of: list[tuple[Intervention, ...]] = [
            (Edit(one.layer, site, one.positions, one.heads, one.factor, one.shift),) for one in chosen
        ]
        # And one of them beside an edge that is cut.
        cut = Knockout((max(self.untouched.heads),), None, ((last, last - 1),))
        changes.append((chosen[0], cut))
        of.append((*of[0], Mask(cut.layers[0], None, cut.edges)))
        rendered = self.rendered(changes)
        off = max(self.off(self.measured(of, way)[0], rendered) for way in {self.engine.capability.way, "full"})
        self.verdict(self.called(site, offered), off, self.effect(rendered), self.allowed(off, changes, rendered))

    def offers(self, layer: int, site: str) -> bool:
        heads = (0,) if site == interventions.BY_HEAD else None
        try:
            self.model.refuse_missing([Edit(layer, site, (0,), heads, 0.5, None)], configs.PROMPT)
        except NoSuchPlace:
            return False
        return True

    def called(self, site: str, layers: Sequence[int]) -> str:
        """A site, and at how many layers it is, where that is not all that it could be at."""
        everywhere = site in ("hook_resid_pre", "hook_resid_post")
        of = range(len(self.untouched)) if everywhere else self.untouched.heads
        return site if set(layers) >= set(of) else f"{site}({len(layers)}/{len(of)})"

    # -- captures ----------------------------------------------------------------------------------------------------

    def captures(self, name: str) -> None:
        ids_PT, offered, off, largest = configs.prompt(rows=2), list[int](), 0.0, 0.0
        for layer in range(self.model.n_layers):
            full = name if name == "hook_embed" else f"blocks.{layer}.{name}"
            try:
                ours = self.model.forward(ids_PT, capture=[full]).cache[full]
            except (NoSuchPlace, UnknownSite):
                continue
            offered.append(layer)
            theirs = self.seen(layer, name)
            if ours.shape != theirs.shape:
                self.line.wrong[f"{SEE}{name}"] = f"{list(ours.shape)} for {list(theirs.shape)}"
                return
            finite = theirs.isfinite()
            if not torch.equal(finite, ours.isfinite()):
                self.line.wrong[f"{SEE}{name}"] = "infinite elsewhere"
                return
            size = float(theirs[finite].abs().max())
            here = float((ours - theirs)[finite].abs().max()) / size
            if not TOLERANCE < here <= self.rounded(layer, name) / size:
                off = max(off, here)
            largest = max(largest, size)
        if offered:
            self.verdict(f"{SEE}{self.called(name, offered)}" if name != "hook_embed" else f"{SEE}{name}", off, largest)

    def seen(self, layer: int, name: str) -> Tensor:
        if name == "hook_embed":
            return self.untouched.model.get_input_embeddings()(configs.prompt(rows=2)).detach()
        if name == "hook_resid_mid" and not self.untouched.places.by_side:
            return self.seen(layer, "hook_resid_pre") + self.seen(layer, "hook_attn_out")
        if (layer, name) not in self.clean.seen:
            raise NoPlace
        return self.clean.seen[layer, name]

    def rounded(self, layer: int, name: str) -> float:
        """`ROUNDING` times what a family's own captures differ by, of a prompt alone and beside another."""
        if (layer, name) not in self.clean.seen:
            return 0.0
        alone = [self.untouched.run(ids_T[None]).seen[layer, name] for ids_T in configs.prompt(rows=2)]
        difference = torch.cat(alone) - self.clean.seen[layer, name]
        return ROUNDING * float(difference[difference.isfinite()].abs().max())

    # -- both sides --------------------------------------------------------------------------------------------------

    def rendered(self, changes: Sequence[Sequence[Change]]) -> Rendered:
        """By the untouched model; the prompts take turns."""
        ids_PT = configs.prompt(rows=2)
        return self.untouched.run(ids_PT[[row % 2 for row in range(len(changes))]], changes)

    def measured(
        self, of: Sequence[tuple[Intervention, ...]], way: Any, rows: int = 2
    ) -> tuple[Tensor, list[int], list[int]]:
        """By raymi: logits, what fired, and empty lines; `rows` prompts together, which take turns."""
        engine, found = Engine(self.model, self.engine.capability, way), dict[int, tuple[Tensor, int, int]]()
        cells = [Cell(row % rows, one) for row, one in enumerate(of)]
        for batch in engine.ablations(configs.prompt(rows=2)[:rows], cells):
            measured = zip(batch.ablated_AV, batch.fired_A.tolist(), batch.empty_A.tolist(), strict=True)
            found.update(zip(batch.cells, measured, strict=True))
        if engine.gave_up:
            self.line.unchecked["sweeps"] = f"given up: {engine.gave_up[0]}"[:100]
        logits, fired, empty = zip(*(found[row] for row in range(len(of))), strict=True)
        return torch.stack(logits), list(fired), list(empty)

    def allowed(self, off: float, changes: Sequence[Sequence[Change]], together: Rendered) -> float:
        """1e-5; or what a family rounds by itself: `ROUNDING` times what its own rows differ by, alone and together."""
        if not TOLERANCE < off < 10 * TOLERANCE:
            return TOLERANCE
        alone = [self.untouched.run(configs.prompt(rows=2)[[row % 2]], [one]) for row, one in enumerate(changes)]
        own = self.off(torch.cat([one.logits_BV for one in alone]), together)
        return max(TOLERANCE, ROUNDING * own)

    @property
    def scale(self) -> float:
        return float(self.clean.logits_BV.abs().max())

    def off(self, ours_AV: Tensor, theirs: Rendered, every: int = 1) -> float:
        """The largest difference of a row, as a share of the scale: the clean logits', or the row's own if larger."""
        theirs_AV = theirs.logits_BV[::every]
        size_A = theirs_AV.abs().amax(-1).clamp(min=self.scale)
        return float(((ours_AV - theirs_AV).abs().amax(-1) / size_A).max())

    def effect(self, theirs: Rendered) -> float:
        """What the strongest change does; ten times what at least half of them do, where that is less."""
        of_row = self.clean.logits_BV[[row % 2 for row in range(len(theirs.logits_BV))]]
        effect_A = (theirs.logits_BV - of_row).abs().amax(-1) / self.scale
        return float(torch.minimum(effect_A.max(), 10 * effect_A.median()))
