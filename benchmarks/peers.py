"""How others measure an ablation: one full forward each. Every peer here is used the way that costs it least.

Legend: T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymi.model.interventions import Mask

Peer = Callable[[Tensor, Sequence[Mask]], Tensor]
"""Token ids [1, T] and what to cut (nothing: a clean run) -> logits of the last position, [V]."""


def _forbid(mask: Tensor, cut: Mask, n_heads: int) -> Tensor:
    """An additive attention mask [1, 1, T, T] with edges cut, [1, H, T, T]."""
    edited = mask.expand(-1, n_heads, -1, -1).clone()
    queries, keys = map(list, zip(*cut.edges, strict=True))
    for head in range(n_heads) if cut.heads is None else cut.heads:
        edited[0, head, queries, keys] = torch.finfo(mask.dtype).min
    return edited


class PlainLoop:
    """Nothing but transformers: its eager attention is handed an edited mask; only the last position is unembedded."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.n_heads = model, model.config.num_attention_heads
        self.attention: list[nn.Module] = [layer.self_attn for layer in model.model.layers]

    def __call__(self, ids_1T: Tensor, cuts: Sequence[Mask]) -> Tensor:
        handles = [
            self.attention[cut.layer].register_forward_pre_hook(self._hook(cut), with_kwargs=True) for cut in cuts
        ]
        try:
            return self.model(ids_1T, use_cache=False, logits_to_keep=1).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, cut: Mask) -> Callable[..., Any]:
        def edit(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": _forbid(kwargs["attention_mask"], cut, self.n_heads)}

        return edit


class Bridge:
    """TransformerLens: `run_with_hooks` with -inf written at `hook_attn_scores`."""

    def __init__(self, model: PreTrainedModel) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import PreTrainedTokenizerFast

        # It insists on a tokenizer, and looks for another one on the hub when that has a BOS token.
        words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
        model.config.architectures = [type(model).__name__]
        self.lens = TransformerBridge.boot_transformers(
            "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
        )

    def __call__(self, ids_1T: Tensor, cuts: Sequence[Mask]) -> Tensor:
        hooks = [(f"blocks.{cut.layer}.attn.hook_attn_scores", self._hook(cut)) for cut in cuts]
        return self.lens.run_with_hooks(ids_1T, return_type="logits", fwd_hooks=hooks)[0, -1]

    def _hook(self, cut: Mask) -> Callable[..., Tensor]:
        queries, keys = map(list, zip(*cut.edges, strict=True))

        def edit(scores: Tensor, hook: Any) -> Tensor:
            for head in range(scores.shape[1]) if cut.heads is None else cut.heads:
                scores[0, head, queries, keys] = -torch.inf
            return scores

        return edit


class Nnsight:
    """nnsight: one trace an ablation, in which the mask of the attention module is edited."""

    def __init__(self, model: PreTrainedModel) -> None:
        from nnsight import NNsight

        self.net, self.n_heads = NNsight(model), model.config.num_attention_heads

    def __call__(self, ids_1T: Tensor, cuts: Sequence[Mask]) -> Tensor:
        n_heads = self.n_heads
        with self.net.trace(ids_1T, use_cache=False, logits_to_keep=1):
            for cut in cuts:
                module = self.net.model.layers[cut.layer].self_attn
                args, kwargs = module.inputs
                module.inputs = (args, {**kwargs, "attention_mask": _forbid(kwargs["attention_mask"], cut, n_heads)})
            logits = self.net.lm_head.output.save()
        return logits[0, -1]


PEERS: dict[str, Callable[[PreTrainedModel], Peer]] = {
    "plain loop": PlainLoop,
    "TransformerLens": Bridge,  # before nnsight, which adds a method to every object: anyio minds, if it comes later
    "nnsight": Nnsight,
}
