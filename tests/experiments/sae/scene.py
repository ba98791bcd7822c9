"""A tiny model, autoencoders at many of its sites, texts, and the same model without anything of raymi."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.run import run
from raymi.experiments.sae.spec import SaeSpec, work
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.sae import SAE
from tests.families import PROMPT, build, prompt
from tests.sae.making import sae

WIDTH, HEADS, D_SAE = 32, 4, 60
IDS = prompt(rows=5).tolist()
SPECIAL = frozenset({IDS[0][0], IDS[1][4], IDS[2][PROMPT - 1]})
GIVEN = {"model_id": "org/tiny", "revision": "r" * 40, "dtype": "float32"}


def text(name: str, ids: Sequence[int]) -> TokenizedPrompt:
    return TokenizedPrompt(Prompt(name, name), tuple(ids), tuple(map(str, ids)), False, 5, 11, {})


TEXTS = {name: text(name, ids) for name, ids in zip("abcde", IDS, strict=True)}

SAES: dict[str, SAE] = {
    # Each kind of activation, each way of bringing inputs to another scale, and each kind of site.
    "resid": sae("jumprelu", site="blocks.1.hook_resid_post", d_in=WIDTH, d_sae=D_SAE, seed=1),
    "normed": sae(
        "relu", site="blocks.0.hook_resid_pre", d_in=WIDTH, d_sae=D_SAE, seed=2, normalisation="layer_norm"
    ),
    "middle": sae(
        "gated", site="blocks.2.hook_resid_mid", d_in=WIDTH, d_sae=D_SAE, seed=3,
        normalisation="constant_norm_rescale", apply_b_dec_to_input=True,
    ),
    "attention": sae(
        "topk", site="blocks.1.hook_attn_out", d_in=WIDTH, d_sae=D_SAE, seed=4, rescale_by_decoder_norm=True
    ),
    "mlp": sae(
        "jumprelu", site="blocks.2.hook_mlp_out", d_in=WIDTH, d_sae=D_SAE, seed=5,
        normalisation="expected_average_only_in", input_scale=0.7, output_scale=0.7,
    ),
    "heads": sae("topk", site="blocks.2.attn.hook_z", d_in=WIDTH, d_sae=D_SAE, seed=6, heads_joined=True),
    "head": sae("relu", site="blocks.0.attn.hook_z", d_in=WIDTH // HEADS, d_sae=D_SAE, seed=7, head=2),
    "transcoder": sae(
        "topk", site="blocks.0.mlp.hook_in", site_out="blocks.0.hook_mlp_out", d_in=WIDTH, d_sae=D_SAE, seed=8
    ),
    "folded": sae(
        "relu", site="blocks.1.ln2.hook_normalized", site_out="blocks.1.hook_mlp_out", d_in=WIDTH, d_sae=D_SAE, seed=9
    ),
}  # fmt: skip
REFS = {
    name: SaeRef(name, f"/{name}", "v" * 40, str(made.about.site), made.about.site_out, D_SAE)
    for name, made in SAES.items()
}


def unit(spec: SaeSpec, refs: Sequence[SaeRef], names: str = "abcde") -> Unit:
    return Unit("u" * 16, spec.name, tuple((name, work(spec, TEXTS[name], refs)) for name in names), 1)


def measured(engine: Engine, spec: SaeSpec, of: Unit, **given: Any) -> list[dict[str, Any]]:
    table = run(engine, spec, of, TEXTS, lambda ref: SAES[ref.name], **{**GIVEN, "special": SPECIAL, **given})
    return table.to_pylist()


def counts(ids: Sequence[int], first: int = 0, special: frozenset[int] = SPECIAL) -> list[int]:
    """Positions that count."""
    return [at for at, token in enumerate(ids) if token not in special and at >= first]


# -- the same model, plainly -------------------------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]
"""Of what is at a site of one text, [T, D] (z with its heads joined)."""


class Plain:
    """transformers' own Llama and torch's own hooks."""

    def __init__(self) -> None:
        self.model = build("llama", norms=True)
        self.layers = self.model.model.layers

    @torch.no_grad()
    def logits(self, ids: Sequence[int], changes: Mapping[str, Change]) -> Tensor:
        """[T, V] with the activations at some sites changed."""
        handles = [self._hook(site, change) for site, change in changes.items()]
        try:
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def at(self, ids: Sequence[int], site: str) -> Tensor:
        """What is at a site, [T, D]."""
        seen: list[Tensor] = []

        def look(x_TD: Tensor) -> Tensor:
            seen.append(x_TD.clone())
            return x_TD

        self.logits(ids, {site: look})
        return seen[0]

    def _hook(self, site: str, change: Change) -> Any:
        _, layer, name = site.split(".", 2)
        block = self.layers[int(layer)]
        inputs = {
            "hook_resid_pre": block,
            "attn.hook_z": block.self_attn.o_proj,
            "mlp.hook_in": block.mlp,
        }
        outputs = {"hook_resid_post": block, "hook_attn_out": block.self_attn, "hook_mlp_out": block.mlp}
        if name in inputs:
            return self._on_input(inputs[name], change)
        if name == "ln2.hook_normalized":  # only looked at
            norm = block.post_attention_layernorm
            return norm.register_forward_hook(lambda *given: (change(given[2][0] / norm.weight), None)[1])
        if name == "hook_resid_mid":
            return self._on_middle(block, change)

        def gave(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0][0])[None], *output[1:])
            return change(output[0])[None]

        return outputs[name].register_forward_hook(gave)

    def _on_input(self, module: nn.Module, change: Change) -> Any:
        def given(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0][0])[None], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"][0])[None]}

        return module.register_forward_pre_hook(given, with_kwargs=True)

    def _on_middle(self, block: nn.Module, change: Change) -> Any:
        """The residual stream after the attention: what is added to it there goes into the attention's output."""
        entered: list[Tensor] = []

        def remember(_: nn.Module, args: Any, kwargs: Any) -> None:
            entered.append(args[0][0] if args else kwargs["hidden_states"][0])

        def gave(_: nn.Module, __: Any, output: Any) -> Any:
            before = entered[-1]
            return ((change(before + output[0][0]) - before)[None], *output[1:])

        first = block.register_forward_pre_hook(remember, with_kwargs=True)
        second = block.self_attn.register_forward_hook(gave)
        return _Both(first, second)


class _Both:
    def __init__(self, *handles: Any) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def part(made: SAE) -> slice:
    """What an autoencoder sees of a site's width."""
    head, width = made.about.head, WIDTH // HEADS
    return slice(None) if head is None else slice(head * width, (head + 1) * width)
