"""What ablations did to the next-token distribution, computed where the logits are.

Legend: A ablations, P clean prompts, V vocabulary, C tokens reported as changed, R rows of a slice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
    """What happened to one chosen token a row. Ranks count from 0: the number of tokens with a larger logit."""

    logit_clean_A: Tensor
    logit_ablated_A: Tensor
    prob_clean_A: Tensor
    prob_ablated_A: Tensor
    rank_clean_A: Tensor
    rank_ablated_A: Tensor


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
        self.top1_P, self.normaliser_P = _normalise(self.clean_PV)
        self.top1_A, self.normaliser_A = _normalise(self.ablated_AV)

    def effects(self, top_k: int) -> Effects:
        """Distances between clean and ablated next-token distributions.

        KL(clean || ablated) = sum p (expm1(d) - d) with d = log q - log p: termwise non-negative, and it keeps its
        digits near zero, where the usual sum p (log p - log q) comes out negative half of the time.

        Args:
            top_k: how many changed tokens to report.
        """
        p_PV = (self.clean_PV - self.normaliser_P[:, None].float()).exp_()
        parts = [self._effects(rows, p_PV, top_k) for rows in _slices(self.ablated_AV)]
        kl_A, total_variation_A, changed_AC = (torch.cat(column) for column in zip(*parts, strict=True))
        clean_AC = self.clean_PV[self.prompt_A[:, None], changed_AC]
        found = Effects(
            kl_A,
            total_variation_A,
            self.top1_P[self.prompt_A],
            self.top1_A,
            changed_AC,
            _probability(clean_AC, self.normaliser_P[self.prompt_A, None]),
            _probability(self.ablated_AV.gather(1, changed_AC), self.normaliser_A[:, None]),
        )
        return Effects(*(column.cpu() for column in found))

    def token(self, token_A: Tensor) -> TokenEffects:
        """Logit, probability and rank of one token a row (`token_A`, int64), before and after."""
        before_A, after_A = self.clean_PV[self.prompt_A, token_A], self.ablated_AV.gather(1, token_A[:, None])[:, 0]
        ranks = [(self.ablated_AV[rows] > after_A[rows, None]).sum(-1) for rows in _slices(self.ablated_AV)]
        found = TokenEffects(
            before_A,
            after_A,
            _probability(before_A, self.normaliser_P[self.prompt_A]),
            _probability(after_A, self.normaliser_A),
            self._clean_rank(token_A),
            torch.cat(ranks),
        )
        return TokenEffects(*(column.cpu() for column in found))

    def _clean_rank(self, token_A: Tensor) -> Tensor:
        """Ranks of tokens in the clean prompts: each once, however many ablations ask for it."""
        vocabulary = self.clean_PV.shape[1]
        asked, which_A = (self.prompt_A * vocabulary + token_A).unique(return_inverse=True)
        ranks = [
            (self.clean_PV[each // vocabulary] > self.clean_PV[each // vocabulary, each % vocabulary]).sum()
            for each in asked.tolist()
        ]
        return torch.stack(ranks)[which_A]

    def _clean(self, rows: slice) -> Tensor:
        """The clean logits of a slice: a view where all rows share one prompt."""
        return self.clean_PV if len(self.clean_PV) == 1 else self.clean_PV[self.prompt_A[rows]]

    def _effects(self, rows: slice, p_PV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """KL, total variation and the most changed tokens of a slice."""
        p_RV = p_PV if len(p_PV) == 1 else p_PV[self.prompt_A[rows]]
        ablated_RV, normaliser_R = self.ablated_AV[rows], self.normaliser_A[rows]
        shift_R = normaliser_R - self.normaliser_P[self.prompt_A[rows]]
        d_RV = (ablated_RV - self._clean(rows)).sub_(shift_R[:, None].float())
        growth_RV = torch.expm1(d_RV)
        change_RV = p_RV * growth_RV  # q - p, without cancellation
        divergence_RV = growth_RV.sub_(d_RV).mul_(p_RV)
        if bool(d_RV.amax() > 80):  # where expm1 overflows, p is nothing: only q is left of either
            far_RV = d_RV > 80
            q_RV = (ablated_RV - normaliser_R[:, None].float()).exp_()
            divergence_RV, change_RV = (torch.where(far_RV, q_RV, each) for each in (divergence_RV, change_RV))
        change_RV = change_RV.abs_()
        return _sum(divergence_RV), _sum(change_RV) / 2, _largest(change_RV, min(top_k, change_RV.shape[1]))


def _slices(logits_AV: Tensor) -> list[slice]:
    n_rows, vocabulary = logits_AV.shape
    step = max(1, METRIC_SLICE["cpu" if logits_AV.device.type == "cpu" else "gpu"] // vocabulary)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _normalise(logits_AV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit's place, and logsumexp in float64, [A] each."""
    parts = [_normalise_slice(logits_AV[rows]) for rows in _slices(logits_AV)]
    top1_A, normaliser_A = (torch.cat(column) for column in zip(*parts, strict=True))
    return top1_A, normaliser_A


def _normalise_slice(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    peak_R1, top1_R1 = _top(logits_RV, 1)
    top1_R = top1_R1[:, 0]
    total_R = _sum((logits_RV - peak_R1).exp_())
    return top1_R, peak_R1[:, 0].to(total_R.dtype) + total_R.log()


def _sum(values_RV: Tensor, block: int = 64) -> Tensor:
    """Sum of non-negative float32 values in float64: short float32 sums first, since widening every value is slow."""
    # Apple's GPUs have no float64.
    wide = torch.float32 if values_RV.device.type == "mps" else torch.float64
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
