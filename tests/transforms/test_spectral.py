"""What is known of the spectral transforms besides their sums."""

import numpy as np
import pytest
import torch

import adaptive_merge as am
from adaptive_merge.merge.layout import Layout
from adaptive_merge.transforms import (
    CART,
    SVC,
    TSVM,
    WUDI,
    IsoC,
    IsoCTS,
    cart,
    iso_c,
    iso_cts,
    matrices,
    star,
    svc,
    tsvm,
    wudi,
)
from transforms import oracles
from transforms.conftest import build


def stack(tasks=3, m=10, n=16, seed=0):
    return torch.randn(tasks, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed):
    return torch.linalg.qr(stack(1, n, n, seed)[0])[0]


def rank(matrix):
    return int(torch.linalg.matrix_rank(matrix))


def test_tsvm_of_one_task_is_its_task_vector():
    bank = build(tasks=("a",))
    torch.testing.assert_close(TSVM()(bank).vectors, bank.vectors)


def test_tsvm_keeps_a_share_of_the_rank_for_each_task():
    found = tsvm.tsvm(stack())
    assert [rank(part) for part in found] == [3, 3, 3]
    assert rank(found.sum(0)) == 9


def test_tsvm_of_equal_experts_is_their_truncation():
    (matrix,) = stack(1)
    found = tsvm.tsvm(matrix.expand(4, -1, -1)).sum(0)
    torch.testing.assert_close(found, torch.from_numpy(oracles.low_rank(matrix.numpy(), 2)))


def test_tsvm_averages_what_has_fewer_values_than_tasks():
    values = stack(5, 3, 7)
    torch.testing.assert_close(tsvm.tsvm(values).sum(0), values.mean(0))


def test_a_task_that_has_moved_nothing_does_not_disturb_tsvm():
    values = stack()
    values[2] = 0
    kept = tsvm.tsvm(values)
    assert not kept[2].any()
    wanted = matrices.polar(torch.cat([torch.linalg.svd(value)[0][:, :3] for value in values[:2]], 1))
    assert torch.linalg.matrix_norm(kept.sum(0) - wanted @ wanted.T @ kept.sum(0)) < 1e-10


@pytest.mark.parametrize("transform", [iso_c.iso_c, iso_cts.iso_cts])
def test_iso_is_flat(transform):
    values = torch.linalg.svdvals(transform(stack()).sum(0))
    torch.testing.assert_close(values, values[0].expand(10))


def test_iso_c_keeps_the_nuclear_norm_and_turns_with_the_matrices():
    values, q, p = stack(), orthogonal(10, 1), orthogonal(16, 2)
    found = iso_c.iso_c(values)
    wanted = torch.linalg.matrix_norm(values.sum(0), "nuc")
    torch.testing.assert_close(torch.linalg.matrix_norm(found.sum(0), "nuc"), wanted)
    torch.testing.assert_close(iso_c.iso_c(q @ values @ p), q @ found @ p)
    torch.testing.assert_close(iso_c.iso_c(values.mT), found.mT)


def test_the_floor_shortens_the_parts_of_iso_c():
    values = stack(3, 10, 10)
    u, s, vt = torch.linalg.svd(values.sum(0))
    found, floored = iso_c.iso_c(values), iso_c.iso_c(values, floor=0.5)
    assert floored.norm() < found.norm()
    wanted = s.mean() * (u * (s / s.clamp_min(0.5 * s.mean()))) @ vt
    torch.testing.assert_close(floored.sum(0), wanted)


def test_iso_c_leaves_out_what_the_sum_does_not_have():
    values = stack()
    values[:] = values[:, :, :2] @ values[:, :2, :]
    values[2] = -values[1]
    spectrum = torch.linalg.svdvals(iso_c.iso_c(values).sum(0))
    torch.testing.assert_close(spectrum[:2], spectrum[0].expand(2))
    assert spectrum[2:].max() < 1e-9


def test_iso_cts_with_everything_common_is_iso_c():
    values = stack()
    torch.testing.assert_close(iso_cts.iso_cts(values, common=1.0).sum(0), iso_c.iso_c(values).sum(0))


@pytest.mark.parametrize(
    "rank, tasks, wanted",
    [
        (768, 8, (616, 19)),
        (768, 14, (614, 11)),
        (768, 20, (608, 8)),
        (512, 8, (408, 13)),
        (512, 20, (412, 5)),
        (50, 20, (50, 0)),
    ],
)
def test_iso_cts_divides_the_rank_as_published(rank, tasks, wanted):
    assert iso_cts.ranks(rank, tasks, 0.8) == wanted


def test_iso_cts_gives_all_directions_the_mean_of_the_values_that_it_keeps():
    values = stack(3, 12, 16)
    k, specific = iso_cts.ranks(12, 3, 0.5)
    u, s, _ = torch.linalg.svd(values.sum(0))
    own = [torch.linalg.svdvals(value - u[:, :k] @ u[:, :k].T @ value)[:specific] for value in values]
    mean = torch.cat([s[:k], *own]).mean()
    assert (k, specific) == (6, 2)
    torch.testing.assert_close(torch.linalg.svdvals(iso_cts.iso_cts(values, 0.5).sum(0)), mean.expand(12))


@pytest.mark.parametrize("shape", [(16, 10), (10, 16), (10, 10)])
def test_leading_directions_are_those_of_the_decomposition(shape):
    (matrix,) = stack(1, *shape)
    u, s, v = matrices.leading(matrix, 4)
    wanted = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, wanted.S[:4])
    torch.testing.assert_close((u * s) @ v.T, torch.from_numpy(oracles.low_rank(matrix.numpy(), 4)))
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))


def test_cart_cuts_the_centred_matrices_to_a_share_of_their_rank():
    values = stack(3, 10, 16)
    found = cart.cart(values, 0.35, 2.0) - values.mean(0) / 3
    assert [rank(part) for part in found] == [3, 3, 3]


def test_cart_at_full_rank_and_scale_one_is_the_mean_plus_what_sums_to_zero():
    bank = build()
    torch.testing.assert_close(CART(1.0, 1.0)(bank).vectors.sum(0), bank.vectors.mean(0))
    torch.testing.assert_close(CART(0.0, 1.0)(bank).vectors.sum(0), bank.vectors.mean(0))


def test_star_keeps_the_nuclear_norm():
    values = stack()
    found = star.star(values, 40)
    torch.testing.assert_close(torch.linalg.matrix_norm(found, "nuc"), torch.linalg.matrix_norm(values, "nuc"))
    for part, value in zip(found, values):
        sums = np.cumsum(np.linalg.svd(value.numpy())[1])
        assert rank(part) == np.searchsorted(sums, 0.4 * sums[-1]) + 1 < 10
    torch.testing.assert_close(star.star(values, 100), values)


def test_svc_of_one_task_gives_it_back():
    bank = build(tasks=("a",))
    found = bank.layout.unflatten(SVC(scale=0.5, a=0.1)(bank).vectors[0])
    torch.testing.assert_close(found["proj"], bank.layout.unflatten(bank.vectors[0])["proj"])


def test_svc_counts_a_direction_that_all_experts_share_once():
    (matrix,) = stack(1)
    experts = matrix.expand(3, -1, -1)
    torch.testing.assert_close(svc.svc(experts, experts, 0.1).sum(0), matrix)


def test_svc_leaves_a_merge_alone_that_answers_each_expert_as_it_should():
    # Experts without a common direction: the sum answers each with 1 in its own.
    experts = torch.stack(
        [torch.diag(torch.tensor(row, dtype=torch.float64)) for row in ([3.0, 2, 0, 0], [0, 0, 4.0, 1])]
    )
    torch.testing.assert_close(svc.svc(experts, experts, 1.0), experts)


def test_wudi_lowers_the_interference():
    values = stack()
    arrays = list(values.numpy())
    losses = [oracles.wudi_loss(wudi.wudi(values, steps, 1e-2).sum(0).numpy(), arrays) for steps in (0, 100, 300)]
    assert losses[2] < losses[1] < losses[0] / 2


def test_wudi_of_one_task_is_its_task_vector():
    bank = build(tasks=("a",))
    torch.testing.assert_close(WUDI(lr=1e-3)(bank).vectors, bank.vectors)


def test_split_and_fused_differ_only_in_attention():
    layout = Layout(("text_projection", "attn.in_proj_weight", "proj"), ((4, 4), (9, 3), (3, 4)))
    fused, split = list(matrices.pieces(layout)), list(matrices.pieces(layout, "split"))
    assert [piece.matrix for piece in fused] == [False, True, True]
    assert [piece.shape for piece in split] == [(4, 4), (3, 3), (3, 3), (3, 3), (3, 4)]
    assert [piece.part.start for piece in split] == [0, 16, 25, 34, 43]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TSVM(qkv="thirds"),
        lambda: IsoC(floor=-1),
        lambda: IsoCTS(common=1.5),
        lambda: CART(rank=2),
        lambda: SVC(a=0),
        lambda: SVC(other="none"),
        lambda: WUDI(steps=-1),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(am.InputError, match="got"):
        make()
