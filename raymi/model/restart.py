"""Forwards that go on from an activation of a clean one, at all positions: what autoencoders are judged by.

An activation at layer l changes nothing below that layer. One clean forward keeps what is at some sites, and the input
of each of their layers; a forward with something else at one of them begins at its layer. `raymi.model.cone` does the
same for single positions, of which many then share a batch; here all positions of all texts change at once.

Legend: B texts, T positions, D hidden size, H heads, W head width, N rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model.hooked import HookedModel, NotFinite
from raymi.model.interventions import Intervention, replace
from raymi.model.linear import quick_products
from raymi.model.passing import EnoughError, passing_on, returned_beside, standing_in, unembed, with_hidden
from raymi.model.sites import IN_ATTENTION, NoSuchPlace, Site, parse


class Restart:
    """The clean forward of some texts of equal length, and forwards that leave it at a site."""

    sites: dict[str, Tensor]
    """Name -> clean activations, [B, T, D] ([B, T, H, W] at `attn.hook_z`), in the model's dtype. Not to be changed."""

    def __init__(
        self, model: HookedModel, ids_BT: Tensor, sites: Sequence[str], *, layers: bool = True, stop: bool = False
    ) -> None:
        """Runs the texts clean.

        Args:
            model: the model.
            ids_BT: token ids.
            sites: names of the sites to keep, those inside the attention but `attn.hook_z` excepted.
            layers: whether layers below a site may be left out; not where `Engine.way` is `full`.
            stop: end the forward behind the last of the sites: there are no hidden states then, and no other forwards.

        Raises:
            UnknownSite: for a name that is no hook point.
            NoSuchPlace: for a hook point that this model does not have.
            NotFinite: when a number is NaN or infinite.
        """
        self.model, self.ids_BT, self.layers = model, ids_BT.to(model.device), layers
        self._beside: list[int | None] = []
        wanted = [_outside_the_attention(parse(name, model.n_layers)) for name in dict.fromkeys(sites)]
        inputs = [] if stop else self._inputs_of(wanted)
        kept = list(dict.fromkeys([*wanted, *inputs]))
        with ExitStack() as stack:

            def then() -> None:
                if stop and len(cache) == len(kept):
                    raise EnoughError

            cache = model.watch(kept, self.ids_BT.shape, stack, then)
            for block in model.blocks:
                stack.callback(block.module.register_forward_hook(self._note).remove)
            self._returned = self._forward([()] * len(ids_BT))
        self.sites = {str(site): cache[str(site)] for site in wanted}
        self._inputs = {site.layer: cache[str(site)] for site in inputs}
        self._fed_the_embedding = "hook_embed" in self.sites and self._shares_the_embedding()
        for name, value in self.sites.items() if self._returned is None else [("the last layer", self.hidden_BTD)]:
            self._refuse_not_finite(value, f"at {name}")

    def _inputs_of(self, wanted: Sequence[Site]) -> list[Site]:
        """The layer inputs that other forwards will need."""
        layers: set[int] = set()
        for site in wanted:
            if site.layer is None:
                # To be compared with it, where there is such a place.
                layers |= {0} if self.model.blocks[0].resid is not None else set()
            elif site.name == "hook_resid_mid" or (self.layers and site.name != "hook_resid_post"):
                layers.add(site.layer)
        return [Site(layer, "hook_resid_pre") for layer in sorted(layers)]

    def _note(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._beside.append(returned_beside(output))

    def _shares_the_embedding(self) -> bool:
        """Whether the lowest layer is fed the embedding and nothing else; it is then not kept twice."""
        embedded, given = self.sites["hook_embed"], self._inputs.get(0)
        if given is None or not torch.equal(embedded, given):
            return False
        self._inputs[0] = embedded
        return True

    @property
    def hidden_BTD(self) -> Tensor:
        """What the clean model unembeds."""
        return self._whole().last_hidden_state

    def _whole(self) -> Any:
        if self._returned is None:
            raise RuntimeError("a forward that ended behind its last site has no hidden states, and no other forwards")
        return self._returned

    # -- other forwards ----------------------------------------------------------------------------------------------

    def again(self, site: str, value: Tensor, counts_BT: Tensor | None = None) -> Tensor:
        """A forward with something else at a site.

        Args:
            site: one of those that were kept, `ln2.hook_normalized` excepted.
            value: what stands there, in the shape of `sites[site]`, in any dtype.
            counts_BT: bool, where it stands there; elsewhere the activation stays as it is. None: everywhere.

        Returns:
            What the model unembeds then, [B, T, D].

        Raises:
            NoSuchPlace: where the site cannot be written, or the value does not fit.
            NotFinite: when a number is NaN or infinite.
            NotFired: when it was not written wherever it should have been.
        """
        self._whole()
        clean = self.sites[site]
        if value.shape != clean.shape:
            raise NoSuchPlace(
                f"a value of shape {list(value.shape)} does not fit {site}, which takes {list(clean.shape)}"
            )
        at, value = self._written(parse(site, self.model.n_layers), value.to(clean.device))
        with ExitStack() as stack:
            if self.layers:
                self._leave_out(at, clean, stack)
            hidden_BTD: Tensor = self._forward(_replacing(at, value, counts_BT)).last_hidden_state
        self._refuse_not_finite(hidden_BTD, f"behind the last layer, with other activations at {site}")
        return hidden_BTD

    def unembed(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states, [N, V] float32, by whatever the model does behind its last layer."""
        return unembed(self.model, hidden_ND, self.ids_BT[:1, -1:], self._whole())

    def _written(self, site: Site, value: Tensor) -> tuple[Site, Tensor]:
        """Where to write what, for a value to stand at a site."""
        if site.layer is None:
            if not self._fed_the_embedding:
                raise NoSuchPlace(
                    f"{self.model.name}: hook_embed cannot be changed; its lowest layer is fed more than the embedding"
                )
            return Site(0, "hook_resid_pre"), value
        if site.name == "hook_resid_mid":
            return Site(site.layer, "hook_attn_out"), value - self._inputs[site.layer]
        return site, value

    def _leave_out(self, at: Site, clean: Tensor, stack: ExitStack) -> None:
        """Until the stack is left, no layer below a site computes anything."""
        assert at.layer is not None
        behind = at.name == "hook_resid_post"
        blocks = self.model.blocks[: at.layer + behind]
        for block, beside in zip(blocks, self._beside, strict=False):
            stack.enter_context(standing_in(block.module, passing_on(beside)))
        enter = _entering(clean if behind else self._inputs[at.layer])
        module = self.model.blocks[at.layer].module
        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def _forward(self, interventions: Sequence[Sequence[Intervention]]) -> Any:
        """What the backbone returns; None where a hook has ended the forward before."""
        returned: list[Any] = []

        def keep(_: nn.Module, __: object, output: Any) -> None:
            returned.append(output)
            raise EnoughError  # only what is asked for is unembedded

        with ExitStack() as stack:
            stack.callback(self.model.backbone.register_forward_hook(keep).remove)
            check = stack.enter_context(self.model.armed(interventions, self.ids_BT.shape[1]))
            with suppress(EnoughError), quick_products():
                self.model.run(self.ids_BT)
            check()
        return returned[0] if returned else None

    def _refuse_not_finite(self, x: Tensor, where: str) -> None:
        bad = (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise NotFinite(f"{self.model.name}: NaN or infinity {where}, in {len(bad)} of {len(x)} texts")


def _outside_the_attention(site: Site) -> Site:
    if site.name.removeprefix("attn.hook_") in IN_ATTENTION:
        raise NoSuchPlace(f"{site}: no forward goes on from inside the attention")
    return site


def _entering(x_BTD: Tensor) -> Callable[..., Any]:
    """In place of whatever a layer is given, this."""
    return lambda _, args, kwargs: with_hidden(x_BTD, args, kwargs)


def _replacing(at: Site, value: Tensor, counts_BT: Tensor | None) -> list[tuple[Intervention, ...]]:
    """For each text, what writes its part of a value."""
    assert at.layer is not None
    if counts_BT is None:
        counts_BT = torch.ones(value.shape[:2], dtype=torch.bool)
    positions_B = [tuple(counts_T.nonzero()[:, 0].tolist()) for counts_T in counts_BT.cpu()]
    return [
        (replace(at.layer, at.name, positions, value[row, positions]),) if positions else ()
        for row, positions in enumerate(positions_B)
    ]
