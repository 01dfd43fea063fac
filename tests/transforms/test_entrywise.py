"""Consensus, Breadcrumbs, LiNeS, LayerDrop, DARE and DOGE: what is known of them entry by entry, layer by layer."""

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.merge.layout import Layout
from adaptive_merge.transforms import DARE, DOGE, STAR, Breadcrumbs, Consensus, LayerDrop, LiNeS, doge
from adaptive_merge.transforms.consensus import tall_masks
from adaptive_merge.transforms.layer_drop import salience
from adaptive_merge.transforms.lines import depth
from adaptive_merge.transforms.matrices import pieces
from transforms.conftest import build


def test_consensus_of_no_task_keeps_all_and_of_too_many_nothing(tower):
    assert torch.equal(Consensus(agree=0)(tower).vectors, tower.vectors)
    assert not Consensus(agree=4)(tower).vectors.any()


def test_consensus_keeps_fewer_entries_the_more_have_to_agree(tower):
    kept = [Consensus(agree=k)(tower).vectors.count_nonzero().item() for k in range(5)]
    assert kept == sorted(kept, reverse=True)


def test_tall_masks_rebuild_experts_that_share_no_entry():
    vectors = torch.eye(3).repeat_interleave(4, 1) * torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tall_masks(vectors, vectors.sum(0)) * vectors.sum(0), vectors)


def test_tall_masks_at_zero_keep_everything_and_at_one_the_nearer_of_nothing_and_all(tower):
    joint = tower.vectors.sum(0)
    assert tall_masks(tower.vectors, joint, 0.0).all()
    rebuilt = tall_masks(tower.vectors, joint, 1.0) * joint
    nearest = torch.minimum(tower.vectors.abs(), (joint - tower.vectors).abs())
    assert torch.equal((rebuilt - tower.vectors).abs(), nearest)


def test_tall_masks_take_a_threshold_of_each_task(tower):
    joint = tower.vectors.sum(0)
    found = tall_masks(tower.vectors, joint, [0.2, 0.4, 0.6])
    assert torch.equal(found[2], tall_masks(tower.vectors, joint, 0.6)[2])
    with pytest.raises(am.InputError, match="2 thresholds for 3 tasks"):
        Consensus(threshold=[0.2, 0.4])(tower)


def test_breadcrumbs_keep_a_share_of_each_row_below_its_outliers(tower):
    name = "transformer.resblocks.0.mlp.c_proj.weight"  # rows of 48
    before = tower.layout.unflatten(tower.vectors[0])[name].abs().sort(dim=1, descending=True).values
    found = tower.layout.unflatten(Breadcrumbs(0.15, 0.05)(tower).vectors[0])[name].abs()
    assert (found.count_nonzero(1) == 7).all()
    assert torch.equal(found.amax(1), before[:, 2])


def test_breadcrumbs_leave_a_number_alone(tower):
    assert torch.equal(Breadcrumbs()(tower).vectors[:, 0], tower.vectors[:, 0])


def test_lines_scales_the_first_block_by_a_and_the_last_by_a_plus_b():
    bank = build(blocks=12)
    ratio = LiNeS(b=0.6, a=0.1)(bank).vectors / bank.vectors
    found = bank.layout.unflatten(ratio[0])
    wanted = {"proj": 0.1, "conv1.weight": 0.1, "ln_post.weight": 0.1, "transformer.resblocks.0.ln_1.weight": 0.1}
    # Block 1 is not taken for block 10 or 11.
    wanted |= {f"transformer.resblocks.{i}.ln_1.weight": 0.1 + 0.6 * i / 11 for i in (1, 10, 11)}
    for name, scale in wanted.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], scale))


def test_lines_without_slope_is_the_mean(tower):
    torch.testing.assert_close(LiNeS(b=0.0)(tower).vectors.sum(0), tower.vectors.mean(0))


def test_lines_and_doge_refuse_a_backbone_without_blocks():
    vectors = am.TaskVectors(("a",), Layout(("weight",), ((2, 2),)), torch.ones(4), torch.ones(1, 4), {})
    with pytest.raises(am.InputError, match="no parameter name has a number"):
        depth(vectors.layout)
    with pytest.raises(am.InputError, match="no parameter name has a number"):
        DOGE()(vectors)


@pytest.mark.parametrize("by", ["norm", "difference"])
def test_layer_drop_takes_back_the_least_salient_tensors(tower, by):
    found = LayerDrop(0.25, by)(tower)
    ranks = salience(tower, by).argsort(dim=1)
    count = len(tower.names) // 4
    for row, old, order in zip(found.vectors, tower.vectors, ranks):
        dropped = {tower.names[index] for index in order[:count]}
        for name, value in tower.layout.unflatten(row).items():
            wanted = tower.layout.unflatten(old)[name] * (name not in dropped)
            assert torch.equal(value, wanted)


def test_a_dropped_layer_is_the_pretrained_one(tower):
    expert = LayerDrop(1.0)(tower).vectors
    assert not expert.any()


def test_layer_drop_ranks_a_task_that_goes_its_own_way_above_one_that_goes_with_the_others():
    layout = Layout(("b.0.w", "b.1.w"), ((2,), (2,)))
    rows = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1]])
    bank = am.TaskVectors(("a", "b", "c"), layout, torch.ones(4), rows, {})
    found = salience(bank, "difference")
    assert found[0, 1] > found[1, 1] > found[0, 0]


def test_dare_drops_and_rescales(tower):
    found = DARE(0.4)(tower).vectors
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.02)
    torch.testing.assert_close(found[kept], tower.vectors[kept] / 0.6)
    assert torch.equal(DARE(0.0)(tower).vectors, tower.vectors)


def test_dare_depends_on_its_seed_and_the_task_only(tower):
    assert not torch.equal(DARE(0.5, 1)(tower).vectors, DARE(0.5, 0)(tower).vectors)
    assert torch.equal(DARE(0.5)(tower.select(["c"])).vectors[0], DARE(0.5)(tower).vectors[2])
    state = torch.get_rng_state()
    DARE()(tower)
    assert torch.equal(torch.get_rng_state(), state)


def test_doge_keeps_a_share_of_the_entries_at_a_fixed_length_per_matrix(tower):
    kept = [piece for piece in pieces(tower.layout, blocks_only=True) if piece.matrix]
    found = torch.cat([DOGE(steps=5)(tower).vectors[:, piece.part] for piece in kept], 1)
    # The threshold itself is kept, as in the authors' code.
    assert found.count_nonzero(1).tolist() == [int(0.3 * found.shape[1]) + 1] * 3
    matrices = torch.randn(3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(
        doge.scales(matrices, 0.07) * matrices.flatten(1).norm(dim=1), torch.full((3,), 0.07).double()
    )


def test_doge_descends_and_leaves_the_shared_subspace_nearly_alone():
    matrices = 0.01 * torch.randn(3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = doge.scales(matrices, 0.3)

    def loss(delta):
        merged = torch.einsum("t,tmn->mn", weights, matrices + delta)
        return (matrices * (matrices - merged)).sum(-1).square().sum()

    delta = doge.descend(matrices, weights, subspace=6, steps=400, lr=1e-4)
    assert loss(delta) < loss(torch.zeros_like(delta)) / 2
    basis = doge.projection(matrices, 6)
    assert basis.shape == (24, 3)
    assert (basis.T @ delta).norm() < 0.5 * delta.norm()


def test_without_adams_rescaling_doge_leaves_the_shared_subspace_alone(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    matrices = torch.randn(3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = doge.descend(matrices, doge.scales(matrices, 0.3), subspace=6, steps=20, lr=1e-4)
    assert (doge.projection(matrices, 6).T @ delta).norm() < 1e-12 * delta.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Consensus(threshold=-1),
        lambda: Breadcrumbs(density=2),
        lambda: STAR(eta=0),
        lambda: DOGE(keep=0),
        lambda: LayerDrop(share=2),
        lambda: LayerDrop(by="size"),
        lambda: DARE(drop=1),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(am.InputError, match="got"):
        make()
