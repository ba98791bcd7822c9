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

from raymi.model.hooked import HookedModel, NotFinite, NotFired
from raymi.model.interventions import EDITABLE, Intervention, replace
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
        of_clean = self.sites if self._returned is None else {"the end": self.hidden_BTD}
        for name, value in of_clean.items():
            if n_bad := _not_finite(value):
                model.forward(self.ids_BT)  # says in which layer it begins
                raise NotFinite(f"{model.name}: NaN or infinity at {name}, in {n_bad} of {len(value)} texts")

    def _inputs_of(self, wanted: Sequence[Site]) -> list[Site]:
        """The layer inputs that other forwards will need."""
        mid = {site.layer for site in wanted if site.name == "hook_resid_mid"}
        skipping = {site.layer for site in wanted if site.name in EDITABLE and site.name != "hook_resid_post"}
        return [Site(layer, "hook_resid_pre") for layer in (mid | skipping if self.layers else mid)]

    def _note(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._beside.append(returned_beside(output))

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
            site: one of those that were kept, `mlp.hook_in` and `ln2.hook_normalized` excepted.
            value: what stands there, in the shape of `sites[site]`, in any dtype. `hook_resid_mid` is written by way of
                the attention's output, and so up to rounding.
            counts_BT: bool, where it stands there; elsewhere the activation stays as it is. None: everywhere.

        Returns:
            What the model unembeds then, [B, T, D].

        Raises:
            NoSuchPlace: where the site cannot be written, or the value does not fit.
            NotFinite: when a number is NaN or infinite.
            NotFired: when it was not written wherever it should have been.
        """
        self._whole()  # else no inputs were kept
        clean = self.sites[site]
        counts_BT = torch.ones(self.ids_BT.shape, dtype=torch.bool) if counts_BT is None else counts_BT
        for what, given, taken in ((site, value, clean), ("the texts", counts_BT, self.ids_BT)):
            if given.shape != taken.shape:
                raise NoSuchPlace(f"{list(given.shape)} does not fit {what}, of shape {list(taken.shape)}")
        at = parse(site, self.model.n_layers)
        if at.layer is not None and at.name not in (*EDITABLE, "hook_resid_mid"):
            raise NoSuchPlace(f"{self.model.name}: {site} can be read, but not written")
        with ExitStack() as stack:
            if at.layer is None:
                hidden_BTD = self._from_embedding(value, counts_BT, stack)
            else:
                hidden_BTD = self._from_layer(at, value.to(clean.device), counts_BT, stack)
        if n_bad := _not_finite(hidden_BTD):
            where = f"at the end, with other activations at {site}"
            raise NotFinite(f"{self.model.name}: NaN or infinity {where}, in {n_bad} of {len(value)} texts")
        return hidden_BTD

    def _from_embedding(self, value_BTD: Tensor, counts_BT: Tensor, stack: ExitStack) -> Tensor:
        # No block's site, so no intervention: written and counted here. All layers compute.
        write = _Embedding(value_BTD, counts_BT)
        stack.callback(self.model.model.get_input_embeddings().register_forward_hook(write).remove)
        hidden_BTD: Tensor = self._forward([()] * len(self.ids_BT)).last_hidden_state
        if write.times != 1:
            raise NotFired(f"{self.model.name}: hook_embed should have been written once, and was {write.times} times")
        return hidden_BTD

    def _from_layer(self, site: Site, value: Tensor, counts_BT: Tensor, stack: ExitStack) -> Tensor:
        assert site.layer is not None
        if self.layers:
            self._leave_out(site.layer, self.sites[str(site)] if site.name == "hook_resid_post" else None, stack)
        name = site.name
        if name == "hook_resid_mid":
            name, value = "hook_attn_out", value - self._inputs[site.layer]
        return self._forward(_replacing(site.layer, name, value, counts_BT)).last_hidden_state

    def unembed(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states, [N, V] float32, by whatever the model does behind its last layer."""
        return unembed(self.model, hidden_ND, self.ids_BT[:1, -1:], self._whole())

    def _leave_out(self, layer: int, gave_BTD: Tensor | None, stack: ExitStack) -> None:
        """Until the stack is left, no layer below this one computes, nor does it where `gave_BTD` says what it gave."""
        blocks = self.model.blocks
        for block, beside in zip(blocks[: layer + (gave_BTD is not None)], self._beside, strict=False):
            stack.enter_context(standing_in(block.module, passing_on(beside)))
        enter = _entering(self._inputs[layer] if gave_BTD is None else gave_BTD)
        stack.callback(blocks[layer].module.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def _forward(self, interventions: Sequence[Sequence[Intervention]]) -> Any:
        """What the backbone returns; None where a hook has ended the forward before."""
        returned: list[Any] = []

        def keep(_: nn.Module, __: object, output: Any) -> None:
            returned.append(output)
            raise EnoughError  # only what is asked for is unembedded

        with ExitStack() as stack:
            stack.callback(self.model.backbone.register_forward_hook(keep).remove)
            check = stack.enter_context(self.model.armed(interventions, self.ids_BT.shape[1]))
            with suppress(EnoughError), quick_products(self.model.linears):
                self.model.run(self.ids_BT)
            check()
        return returned[0] if returned else None


def _not_finite(x: Tensor) -> int:
    """In how many texts a number is NaN or infinite."""
    return int((~x.isfinite().flatten(1).all(1)).sum())


def _outside_the_attention(site: Site) -> Site:
    if site.name.removeprefix("attn.hook_") in IN_ATTENTION:
        raise NoSuchPlace(f"{site}: no forward goes on from inside the attention")
    return site


def _entering(x_BTD: Tensor) -> Callable[..., Any]:
    """In place of whatever a layer is given, this."""
    return lambda _, args, kwargs: with_hidden(x_BTD, args, kwargs)


def _replacing(layer: int, site: str, value: Tensor, counts_BT: Tensor) -> list[tuple[Intervention, ...]]:
    """For each text, what writes its part of a value."""
    positions_B = [tuple(counts_T.nonzero()[:, 0].tolist()) for counts_T in counts_BT.cpu()]
    return [
        (replace(layer, site, positions, value[row, positions]),) if positions else ()
        for row, positions in enumerate(positions_B)
    ]


class _Embedding:
    """Writes into what the embedding gives."""

    def __init__(self, value_BTD: Tensor, counts_BT: Tensor) -> None:
        self.value_BTD, self.counts_BT, self.times = value_BTD, counts_BT, 0

    def __call__(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        self.times += 1
        return torch.where(self.counts_BT[..., None].to(output.device), self.value_BTD.to(output), output)
