"""What ablations did to the next-token distribution, computed where the logits are.

Legend: A ablations, P clean prompts, V vocabulary, C tokens reported as changed, R rows of a slice.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from raymi.model.memory import empty_cache, is_out_of_memory
from raymi.model.sizes import METRIC_SLICE


class Effects(NamedTuple):
    """One entry an ablation, on the CPU. Probabilities and KL (nats) are float64."""

    kl_A: Tensor
    total_variation_A: Tensor
    top1_clean_A: Tensor
    top1_ablated_A: Tensor
    changed_AC: Tensor
    """Token ids, by |change of probability| descending, then by id."""
    changed_clean_AC: Tensor
    changed_ablated_AC: Tensor


class TokenEffects(NamedTuple):
    """What happened to one chosen token a row."""

    logit_clean_A: Tensor
    logit_ablated_A: Tensor
    prob_clean_A: Tensor
    prob_ablated_A: Tensor


class Comparison:
    """Ablated logits beside the clean ones that they belong to; what several metrics need is computed once."""

    def __init__(self, clean_PV: Tensor, ablated_AV: Tensor, prompt_A: Tensor) -> None:
        """Compares.

        Args:
            clean_PV: clean logits.
            ablated_AV: ablated logits.
            prompt_A: which clean row each ablation belongs to, int64.
        """
        self.clean_PV, self.ablated_AV, self.prompt_A = clean_PV.float(), ablated_AV.float(), prompt_A
        self.normaliser_P = _normaliser(self.clean_PV)
        self._normaliser_A: Tensor | None = None

    @property
    def normaliser_A(self) -> Tensor:
        """Logsumexp of the ablated logits, float64; `effects` finds it on its way."""
        if self._normaliser_A is None:
            self._normaliser_A = _normaliser(self.ablated_AV)
        return self._normaliser_A

    def effects(self, top_k: int) -> Effects:
        """Distances between clean and ablated next-token distributions.

        KL(clean || ablated) = log(1 + sum p (expm1(g) - g)), where g is how much a logit grew beyond the mean growth,
        sum p (ablated - clean). It is the textbook's sum p (log p - log q), but termwise non-negative, and it keeps its
        digits near zero, where the textbook's comes out negative half of the time.

        Args:
            top_k: how many changed tokens to report.
        """
        p_PV = (self.clean_PV - self.normaliser_P[:, None].float()).exp_()
        parts = _in_slices(self.ablated_AV, lambda rows: self._effects(rows, p_PV, top_k))
        kl_A, total_variation_A, grown_A, changed_AC = (torch.cat(column) for column in zip(*parts, strict=True))
        self._normaliser_A = self.normaliser_P[self.prompt_A] + grown_A
        clean_AC = self.clean_PV[self.prompt_A[:, None], changed_AC]
        found = Effects(
            kl_A,
            total_variation_A,
            _first(self.clean_PV)[self.prompt_A],
            _first(self.ablated_AV),
            changed_AC,
            _probability(clean_AC, self.normaliser_P[self.prompt_A, None]),
            _probability(self.ablated_AV.gather(1, changed_AC), self.normaliser_A[:, None]),
        )
        return Effects(*(column.cpu() for column in found))

    def token(self, token_A: Tensor) -> TokenEffects:
        """Logit and probability of one token a row (`token_A`, int64), before and after."""
        before_A, after_A = self.clean_PV[self.prompt_A, token_A], self.ablated_AV.gather(1, token_A[:, None])[:, 0]
        found = TokenEffects(
            before_A,
            after_A,
            _probability(before_A, self.normaliser_P[self.prompt_A]),
            _probability(after_A, self.normaliser_A),
        )
        return TokenEffects(*(column.cpu() for column in found))

    def ranks(self, token_A: Tensor) -> tuple[Tensor, Tensor]:
        """Of one token a row, before and after: how many tokens have a larger logit, int64 [A] on the CPU."""
        vocabulary = self.clean_PV.shape[1]
        # Of the clean prompts each once, however many ablations ask for it.
        asked, which_A = (self.prompt_A * vocabulary + token_A).unique(return_inverse=True)
        before = [
            (self.clean_PV[each // vocabulary] > self.clean_PV[each // vocabulary, each % vocabulary]).sum()
            for each in asked.tolist()
        ]
        logit_A1 = self.ablated_AV.gather(1, token_A[:, None])
        after = _in_slices(self.ablated_AV, lambda rows: (self.ablated_AV[rows] > logit_A1[rows]).sum(-1))
        return torch.stack(before)[which_A].cpu(), torch.cat(after).cpu()

    def _effects(self, rows: slice, p_PV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KL, total variation, growth of the normaliser, and the most changed tokens of a slice."""
        one = len(p_PV) == 1  # views, where all rows share one prompt
        p_RV, clean_RV = (each if one else each[self.prompt_A[rows]] for each in (p_PV, self.clean_PV))
        growth_RV = self.ablated_AV[rows] - clean_RV
        mean_R, mean_R1 = _mean(growth_RV, p_RV)
        growth_RV.sub_(mean_R1)
        if bool(growth_RV.amax() > 60):  # beyond, expm1 overflows, and a p of almost nothing counts
            return self._far_effects(rows, clean_RV, top_k)
        excess_RV = torch.expm1(growth_RV)
        divergence_R = _sum(growth_RV.neg_().add_(excess_RV).mul_(p_RV))
        left_R = mean_R - mean_R1[:, 0].to(mean_R.dtype)  # what rounding of the mean has left out
        total_R = divergence_R + left_R  # q = p (1 + excess) / (1 + total)
        change_RV = excess_RV.sub_(total_R[:, None].float()).mul_(p_RV).abs_()
        total_variation_R = _sum(change_RV) / (1 + total_R) / 2
        kl_R = (total_R.log1p() - left_R).clamp_(min=0)
        changed_RC = _largest(change_RV, min(top_k, change_RV.shape[1]))
        return kl_R, total_variation_R, kl_R + mean_R, changed_RC

    def _far_effects(self, rows: slice, clean_RV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same by the textbook, for distributions that have nothing in common."""
        wide = _wide(clean_RV)
        log_p_RV, log_q_RV = clean_RV.to(wide).log_softmax(-1), self.ablated_AV[rows].to(wide).log_softmax(-1)
        change_RV = (log_q_RV.exp() - log_p_RV.exp()).abs_()
        kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
        grown_R = _normaliser(self.ablated_AV[rows]) - self.normaliser_P[self.prompt_A[rows]]
        changed_RC = _largest(change_RV.float(), min(top_k, change_RV.shape[1]))
        return kl_R, change_RV.sum(-1) / 2, grown_R, changed_RC


Found = TypeVar("Found")


def _in_slices(logits_AV: Tensor, measure: Callable[[slice], Found]) -> list[Found]:
    """What is measured of some rows at a time; of half as many whenever memory runs out."""
    n_rows, vocabulary = logits_AV.shape
    most = METRIC_SLICE["cpu" if logits_AV.device.type == "cpu" else "gpu"] // vocabulary
    step = max(1, min(most, n_rows))
    while True:
        try:
            return [measure(slice(start, min(start + step, n_rows))) for start in range(0, n_rows, step)]
        except Exception as error:
            if step == 1 or not is_out_of_memory(error):
                raise
        step //= 2
        empty_cache(logits_AV.device)


def _normaliser(logits_AV: Tensor) -> Tensor:
    """Logsumexp in float64, [A]."""
    return torch.cat(_in_slices(logits_AV, lambda rows: _normaliser_slice(logits_AV[rows])))


def _normaliser_slice(logits_RV: Tensor) -> Tensor:
    peak_R1 = logits_RV.amax(-1, keepdim=True)
    total_R = _sum((logits_RV - peak_R1).exp_())
    return peak_R1[:, 0].to(total_R.dtype) + total_R.log()


def _first(logits_AV: Tensor) -> Tensor:
    """The place of the largest logit, [A]."""
    return torch.cat(_in_slices(logits_AV, lambda rows: _top(logits_AV[rows], 1)[1][:, 0]))


def _mean(values_RV: Tensor, weights_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means: in float64, [R], and rounded to the values' dtype, [R, 1]."""
    mean_R = _sum(values_RV * weights_RV)
    return mean_R, mean_R[:, None].to(values_RV.dtype)


def _wide(values: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if values.device.type == "mps" else torch.float64


def _sum(values_RV: Tensor, block: int = 64) -> Tensor:
    """Sum of float32 values in float64: short float32 sums first, since widening every value is slow."""
    wide = _wide(values_RV)
    whole = values_RV.shape[1] // block * block
    blocks_RN = values_RV[:, :whole].unflatten(1, (whole // block, block)).sum(-1)
    return blocks_RN.sum(-1, dtype=wide) + values_RV[:, whole:].sum(-1, dtype=wide)


def _probability(logits: Tensor, normaliser: Tensor) -> Tensor:
    return (logits.to(normaliser.dtype) - normaliser).exp()


def _largest(values_RV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values a row, ties by the smaller id (which `topk` alone does not promise)."""
    top_RC, ids_RC = _top(values_RV, min(k + 1, values_RV.shape[1]))
    ids_RC = ids_RC[:, :k]
    if 0 < k < top_RC.shape[1]:
        tied_R = top_RC[:, k] == top_RC[:, k - 1]
        if bool(tied_R.any()):
            ids_RC = ids_RC.clone()
            ids_RC[tied_R] = values_RV[tied_R].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids_RC = ids_RC.sort(dim=-1).values
    order_RC = values_RV.gather(1, ids_RC).sort(dim=-1, descending=True, stable=True).indices
    return ids_RC.gather(1, order_RC)


def _top(values_RV: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """The k largest values a row and their ids, descending; which of equal ones is not said.

    The k largest stand in the k blocks with the largest maxima, and only those are searched.
    """
    n_blocks = values_RV.shape[1] // block
    if n_blocks < 4 * k:
        top = values_RV.topk(k, dim=-1)
        return top.values, top.indices
    whole = n_blocks * block
    blocks_RNB = values_RV[:, :whole].unflatten(1, (n_blocks, block))
    best_RK = blocks_RNB.amax(-1).topk(k, dim=-1).indices
    ids_RKB = best_RK[..., None] * block + torch.arange(block, device=values_RV.device)
    rest_E = torch.arange(whole, values_RV.shape[1], device=values_RV.device)
    ids_RC = torch.cat([ids_RKB.flatten(1), rest_E.expand(len(values_RV), -1)], 1)
    top = values_RV.gather(1, ids_RC).topk(k, dim=-1)
    return top.values, ids_RC.gather(1, top.indices)
