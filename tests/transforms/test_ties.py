import pytest
import reference
import torch

import adaptive_merge as am
from adaptive_merge.transforms.ties import Ties, ties


def random_vectors(tasks=4, size=1000):
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(5))


def test_equals_the_published_masking():
    vectors = random_vectors()
    assert torch.equal(ties(vectors), reference.ties(vectors))


def test_density_counted_over_dead_entries_equals_padding_with_zeros():
    vectors = random_vectors()
    padded = torch.cat([vectors, torch.zeros(4, 291)], dim=1)
    assert torch.equal(ties(vectors, counted_over=1291), reference.ties(padded)[:, :1000])
    survivors = ties(vectors[:1], counted_over=1291).count_nonzero() / 1000
    assert survivors == pytest.approx(0.258, abs=0.002)
    with pytest.raises(am.InputError, match="counts its density over 5"):
        ties(vectors, counted_over=5)


def test_equal_magnitudes_at_the_threshold_are_all_kept():
    assert ties(torch.ones(1, 10)).count_nonzero() == 10


def test_a_tie_of_signs_takes_the_majority():
    vectors = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
    assert ties(vectors, density=1.0).tolist() == [[1, 1, 1], [0, 1, 1]]


def test_mean_divides_by_those_who_keep_the_entry():
    vectors = random_vectors()
    kept = reference.ties(vectors)
    mean = kept.sum(0) / kept.count_nonzero(0).clamp_min(1)
    torch.testing.assert_close(ties(vectors, reduce="mean").sum(0), mean)


def test_adamerging_pp_starts_at_ties(toy, bank, heads):
    adaptive = am.AdaMergingPP(bank, toy, heads).merged_state_dict()
    static = am.TiesMerging(bank, toy, heads).merged_state_dict()
    assert all(torch.equal(adaptive[name], static[name]) for name in static)


def test_the_given_bank_is_not_changed(bank):
    before = bank.vectors.clone()
    Ties()(bank)
    assert torch.equal(before, bank.vectors)


@pytest.mark.parametrize("density", [0, 1.5])
def test_impossible_density(density):
    with pytest.raises(am.InputError, match="density"):
        Ties(density)
