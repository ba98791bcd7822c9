"""KL, total variation, ranks and top changes against the textbook in numpy."""

import pytest
import torch
from torch import Tensor

from raymi.model import metrics
from raymi.model.metrics import Comparison
from tests import oracles

ALONE = torch.tensor([0])


def pair(size: float, vocabulary: int = 5_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[1, V] clean logits, and ablated ones that differ by about `size`."""
    generator = torch.Generator().manual_seed(seed)
    clean = 4 * torch.randn(1, vocabulary, generator=generator) + 10
    return clean, clean + size * torch.randn(1, vocabulary, generator=generator)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("size", "digits"), [(5, 2e-6), (1, 2e-6), (1e-2, 1e-5), (1e-3, 1e-4), (1e-4, 1e-3), (1e-5, 1e-2)]
)
@pytest.mark.parametrize("vocabulary", [40, 5_000, 50_000])
def test_distances(size: float, digits: float, vocabulary: int):
    clean, ablated = pair(size, vocabulary)
    found = Comparison(clean, ablated, ALONE).effects(10)
    assert float(found.kl_A) == pytest.approx(oracles.kl(clean[0], ablated[0]), rel=digits)
    assert float(found.total_variation_A) == pytest.approx(oracles.total_variation(clean[0], ablated[0]), rel=digits)
    assert found.kl_A.dtype == torch.float64


@pytest.mark.oracle
@pytest.mark.parametrize("peak", [0.0, 500.0, -500.0])
def test_logits_of_any_height(peak: float):
    clean, ablated = pair(1.0)
    found = Comparison(clean + peak, ablated + peak, ALONE).effects(10)
    assert float(found.kl_A) == pytest.approx(oracles.kl(clean[0] + peak, ablated[0] + peak), rel=1e-4)


@pytest.mark.parametrize("apart", [30.0, 79.0, 81.0, 120.0, 1e4])
def test_certainty_that_moves_is_finite(apart: float):
    """All mass on one token, then on another: the KL is as large as the logits are apart."""
    clean, ablated = torch.zeros(1, 100), torch.zeros(1, 100)
    clean[0, 3], ablated[0, 7] = apart, apart
    found = Comparison(clean, ablated, ALONE).effects(2)
    assert float(found.kl_A) == pytest.approx(apart)
    assert float(found.total_variation_A) == pytest.approx(1.0)
    assert found.changed_AC.tolist() == [[3, 7]]


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-6, 1e-5])
def test_kl_is_never_negative(size: float):
    pairs = [pair(size, seed=seed) for seed in range(50)]
    clean, ablated = (torch.cat(side) for side in zip(*pairs, strict=True))
    found = Comparison(clean, ablated, torch.arange(50)).effects(1)
    assert float(found.kl_A.min()) >= 0
    if size == 0:
        assert float(found.kl_A.max()) == 0
        assert float(found.total_variation_A.max()) == 0


@pytest.mark.oracle
def test_top_changes_and_their_probabilities():
    clean, ablated = pair(0.5)
    found = Comparison(clean, ablated, ALONE).effects(10)
    expected = oracles.top_changes(clean[0], ablated[0], 10)
    assert found.changed_AC[0].tolist() == [token for token, _, _ in expected]
    assert found.changed_clean_AC[0].tolist() == pytest.approx([p for _, p, _ in expected], rel=1e-7)
    assert found.changed_ablated_AC[0].tolist() == pytest.approx([q for _, _, q in expected], rel=1e-7)
    assert int(found.top1_clean_A) == int(clean.argmax())
    assert int(found.top1_ablated_A) == int(ablated.argmax())


@pytest.mark.parametrize("k", [1, 3, 4, 5, 8])
def test_equal_changes_come_by_id(k: int):
    """Tokens 2 and 9 rise alike, 4 and 5 rise alike and less; what is left to all others falls alike, and more."""
    clean, ablated = torch.zeros(1, 12), torch.zeros(1, 12)
    ablated[0, [2, 9]], ablated[0, [4, 5]] = 3.0, 1.0
    found = Comparison(clean, ablated, ALONE).effects(k)
    assert found.changed_AC.tolist() == [[2, 9, 0, 1, 3, 6, 7, 8][:k]]


def test_more_changes_than_tokens_are_all_of_them():
    clean, ablated = pair(1.0, vocabulary=6)
    assert sorted(Comparison(clean, ablated, ALONE).effects(50).changed_AC[0].tolist()) == list(range(6))


@pytest.mark.oracle
def test_one_token_before_and_after():
    clean, ablated = pair(2.0)
    token = int(clean[0].argsort()[-5])
    compared = Comparison(clean, ablated, ALONE)
    found, ranks = compared.token(torch.tensor([token])), compared.ranks(torch.tensor([token]))
    assert float(found.logit_clean_A) == float(clean[0, token])
    assert float(found.logit_ablated_A) == float(ablated[0, token])
    assert float(found.prob_clean_A) == pytest.approx(oracles.probabilities(clean[0])[token], rel=1e-7)
    assert float(found.prob_ablated_A) == pytest.approx(oracles.probabilities(ablated[0])[token], rel=1e-7)
    assert int(ranks[0]) == 4 == oracles.rank(clean[0], token)
    assert int(ranks[1]) == oracles.rank(ablated[0], token)


@pytest.mark.oracle
@pytest.mark.parametrize("size", [1e-3, 0.1, 2.0])
def test_a_tokens_probability_does_not_depend_on_what_else_was_asked(size: float):
    clean, ablated = pair(size)
    alone, after = Comparison(clean, ablated, ALONE), Comparison(clean, ablated, ALONE)
    after.effects(10)
    for compared in (alone, after):
        found = compared.token(torch.tensor([7]))
        assert float(found.prob_ablated_A) == pytest.approx(oracles.probabilities(ablated[0])[7], rel=1e-7)


def test_equal_logits_share_a_rank():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    clean_A, _ = Comparison(logits.expand(4, -1), logits.expand(4, -1), torch.arange(4)).ranks(torch.arange(4))
    assert clean_A.tolist() == [2, 0, 0, 3]


def test_fewer_rows_at_a_time_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    random = torch.Generator().manual_seed(0)
    clean_PV, ablated_AV = (torch.randn(n, 300, generator=random) for n in (1, 16))

    def all_of_it() -> list[torch.Tensor]:
        compared = Comparison(clean_PV, ablated_AV, torch.zeros(16, dtype=torch.int64))
        found = compared.effects(5)
        return [*found, *compared.ranks(torch.full((16,), 7)), compared.normaliser_A]

    plenty, sizes = all_of_it(), list[int]()
    mean = metrics._mean

    def scarce(values_RV: torch.Tensor, weights_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(values_RV))
        if len(values_RV) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(values_RV, weights_RV)

    monkeypatch.setattr(metrics, "_mean", scarce)
    for ours, wanted in zip(all_of_it(), plenty, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert sizes == [16, 8, 4, *[2] * 8]
    monkeypatch.setattr(metrics, "_mean", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        all_of_it()


def test_rows_meet_their_own_prompt_and_slices_change_nothing(monkeypatch: pytest.MonkeyPatch):
    clean = torch.cat([pair(0.0, 300, seed)[0] for seed in range(3)])
    ablated = torch.cat([pair(0.5, 300, seed)[1] for seed in range(7)])
    prompt_A, token_A = torch.tensor([2, 0, 1, 1, 0, 2, 2]), torch.arange(7)

    def everything() -> list[Tensor]:
        compared = Comparison(clean, ablated, prompt_A)
        return [*compared.effects(4), *compared.token(token_A), *compared.ranks(token_A)]

    whole = everything()
    monkeypatch.setattr(metrics, "METRIC_SLICE", {"cpu": 2 * 300})
    for one, other in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for row, prompt in enumerate(prompt_A.tolist()):
        assert float(whole[0][row]) == pytest.approx(oracles.kl(clean[prompt], ablated[row]), rel=1e-5)


@pytest.mark.parametrize("vocabulary", [3000, 64 * 50, 64 * 50 + 63])
def test_changes_are_found_in_large_vocabularies_ties_and_all(vocabulary: int) -> None:
    """A vocabulary of which only the best blocks are searched; rounding makes most changes ties of others."""
    generator = torch.Generator().manual_seed(vocabulary)
    clean = (torch.randn(4, vocabulary, generator=generator) * 2).round()
    ablated = clean + (torch.randn(4, vocabulary, generator=generator) * 2).round()
    compared = Comparison(clean, ablated, torch.arange(4))
    found = compared.effects(10)
    changes = (ablated.double().softmax(-1) - clean.double().softmax(-1)).abs()
    for row in range(4):
        by_size = sorted(range(vocabulary), key=lambda i: (-round(float(changes[row, i]), 9), i))
        assert found.changed_AC[row].tolist() == by_size[:10]
    assert clean.gather(1, found.top1_clean_A[:, None])[:, 0].equal(clean.amax(-1))
    ranks, _ = compared.ranks(torch.tensor([0, 7, 7, vocabulary - 1]))
    assert ranks.tolist() == [int((clean[p] > clean[p, t]).sum()) for p, t in enumerate((0, 7, 7, vocabulary - 1))]
