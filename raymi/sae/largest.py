"""The largest numbers of every row, equal ones in an order that is always the same."""

from torch import Tensor


def top_k(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of every row and their indices, the largest first; of equals the lowest index wins.

    torch.topk, which the libraries call, takes any of equals, depending on device and width.

    Args:
        activations: [N, M], none negative. Zeros among the k largest may have any index.
        k: at most M.

    Returns:
        Values and indices, each [N, k].
    """
    values, indices = activations.topk(min(k + 1, activations.shape[1]), dim=1)
    last, next_ = values[:, k - 1], values[:, -1]
    values, indices = values[:, :k], indices[:, :k]
    unsure = ((last == next_) & (last > 0)).nonzero()[:, 0] if k < activations.shape[1] else []
    if len(unsure):
        ordered = activations[unsure].sort(dim=1, descending=True, stable=True)
        values[unsure], indices[unsure] = ordered.values[:, :k], ordered.indices[:, :k]
    indices, by_index = indices.sort(dim=1)
    values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, by_value)
