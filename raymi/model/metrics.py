"""What an ablation did to the next-token distribution, computed where the logits are.

Legend: A ablations, P clean prompts, V vocabulary, C tokens reported as changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raymi.model.sizes import METRIC_SLICE


class Effects(NamedTuple):
    """One entry an ablation, on the CPU. Probabilities and KL (nats) are float64, logits float32."""

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


def _slices(n_rows: int, vocabulary: int) -> list[slice]:
    step = max(1, METRIC_SLICE // vocabulary)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _log_normaliser(logits_AV: Tensor) -> Tensor:
    """[A] float64: logsumexp, float32 terms summed in float64."""
    peak_A = logits_AV.amax(-1)
    total_A = (logits_AV - peak_A[:, None]).exp().sum(-1, dtype=_wide(logits_AV))
    return peak_A.to(total_A.dtype) + total_A.log()


def _wide(tensor: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def effects(clean_PV: Tensor, ablated_AV: Tensor, prompt_A: Tensor, top_k: int) -> Effects:
    """Distances between clean and ablated next-token distributions.

    KL(clean || ablated) = sum p (expm1(d) - d) with d = log q - log p: termwise non-negative, and it keeps its digits
    near zero, where the usual sum p (log p - log q) comes out negative half of the time.

    Args:
        clean_PV: clean logits, float32.
        ablated_AV: ablated logits, float32.
        prompt_A: which clean row each ablation belongs to, int64.
        top_k: how many changed tokens to report.
    """
    parts = [
        _effects(clean_PV[prompt_A[rows]], ablated_AV[rows], top_k)
        for rows in _slices(len(ablated_AV), clean_PV.shape[1])
    ]
    return Effects(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _effects(clean_AV: Tensor, ablated_AV: Tensor, top_k: int) -> Effects:
    clean_AV, ablated_AV = clean_AV.float(), ablated_AV.float()
    log_clean_A, log_ablated_A = _log_normaliser(clean_AV), _log_normaliser(ablated_AV)
    p_AV = (clean_AV - log_clean_A[:, None].float()).exp()
    d_AV = (ablated_AV - clean_AV) - (log_ablated_A - log_clean_A)[:, None].float()
    growth_AV = torch.expm1(d_AV)
    divergence_AV = p_AV * (growth_AV - d_AV)
    change_AV = p_AV * growth_AV  # q - p, without cancellation
    far_AV = d_AV > 80  # where expm1 overflows, p is nothing: only q is left of either
    if bool(far_AV.any()):
        q_AV = (ablated_AV - log_ablated_A[:, None].float()).exp()
        divergence_AV, change_AV = torch.where(far_AV, q_AV, divergence_AV), torch.where(far_AV, q_AV, change_AV)
    kl_A = divergence_AV.sum(-1, dtype=_wide(p_AV))
    total_variation_A = change_AV.abs_().sum(-1, dtype=_wide(p_AV)) / 2
    changed_AC = _largest(change_AV, min(top_k, change_AV.shape[1]))
    return Effects(
        kl_A,
        total_variation_A,
        clean_AV.argmax(-1),
        ablated_AV.argmax(-1),
        changed_AC,
        (clean_AV.gather(1, changed_AC).to(log_clean_A.dtype) - log_clean_A[:, None]).exp(),
        (ablated_AV.gather(1, changed_AC).to(log_ablated_A.dtype) - log_ablated_A[:, None]).exp(),
    )


def _largest(values_AV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values a row, ties by the smaller id (which `topk` alone does not promise)."""
    top = values_AV.topk(k, dim=-1)
    ids_AC = top.indices
    tied_A = (values_AV >= top.values[:, -1:]).sum(-1) > k
    if bool(tied_A.any()):
        ids_AC = ids_AC.clone()
        ids_AC[tied_A] = values_AV[tied_A].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids_AC = ids_AC.sort(dim=-1).values
    order_AC = values_AV.gather(1, ids_AC).sort(dim=-1, descending=True, stable=True).indices
    return ids_AC.gather(1, order_AC)


def token_effects(clean_PV: Tensor, ablated_AV: Tensor, prompt_A: Tensor, token_A: Tensor) -> TokenEffects:
    """Logit, probability and rank of one token a row, before and after; arguments as in `effects`, token_A int64."""
    parts = [
        (*_token(clean_PV[prompt_A[rows]], token_A[rows]), *_token(ablated_AV[rows], token_A[rows]))
        for rows in _slices(len(ablated_AV), clean_PV.shape[1])
    ]
    logit, prob, rank, logit_ablated, prob_ablated, rank_ablated = (
        torch.cat(column).cpu() for column in zip(*parts, strict=True)
    )
    return TokenEffects(logit, logit_ablated, prob, prob_ablated, rank, rank_ablated)


def _token(logits_AV: Tensor, token_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_AV = logits_AV.float()
    logit_A1 = logits_AV.gather(1, token_A[:, None])
    log_normaliser_A = _log_normaliser(logits_AV)
    prob_A = (logit_A1[:, 0].to(log_normaliser_A.dtype) - log_normaliser_A).exp()
    return logit_A1[:, 0], prob_A, (logits_AV > logit_A1).sum(-1)
