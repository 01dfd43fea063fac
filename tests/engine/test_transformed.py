"""Which transforms may follow which, and what an order that makes no sense is answered with."""

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.engine.transformed import check_order, transformed


@pytest.mark.parametrize(
    "transforms",
    [
        [am.DARE(0.5), am.TSVM()],
        [am.LayerDrop(), am.Ties(), am.CART()],
        [am.STAR(), am.IsoC()],
        [am.TSVM(), am.LayerDrop()],
        [am.WUDI(), am.Ties(), am.DARE(0.5)],
        [am.SVC(am.TSVM()), am.Breadcrumbs()],
        [am.Consensus(), am.TSVM()],
        [am.Ties(), am.LiNeS(b=0.5, a=0.2)],
        [am.TSVM(), am.LiNeS(b=0.5, a=1.0)],
        [lambda bank: bank, am.Ties()],
    ],
)
def test_orders_that_make_sense(transforms):
    check_order(transforms)


@pytest.mark.parametrize("last", [am.SVC(), am.Consensus(), am.LiNeS(), am.SVC(am.TSVM())])
@pytest.mark.parametrize("before", [am.Ties(), am.TSVM()])
def test_what_compares_a_merge_with_the_experts_comes_first(before, last):
    name, other = type(last).__name__, type(before).__name__
    with pytest.raises(
        am.InputError, match=rf"{name} compares a merge .* put {other} inside, `{name}\(transform={other}"
    ):
        check_order([before, last])


JOINT = [am.TSVM(), am.IsoC(), am.IsoCTS(), am.CART(), am.WUDI(), am.DOGE()]


@pytest.mark.parametrize("last", JOINT, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("joint", [*JOINT, am.SVC(), am.Consensus(am.CART())], ids=lambda value: type(value).__name__)
def test_what_works_on_each_tasks_own_change_does_not_follow_a_joint_merge(joint, last):
    for between in ([], [am.Ties()]):
        with pytest.raises(am.InputError, match=f"after {type(joint).__name__} the rows are shares of one merge"):
            check_order([joint, *between, last])


def test_nothing_is_computed_before_the_order_is_checked(toy, bank, heads):
    asked = []

    def slow(bank):
        asked.append(bank)
        return bank

    with pytest.raises(am.InputError, match="SVC compares"):
        am.AdaptiveMerge(bank, toy, heads, transforms=[slow, am.SVC()])
    assert not asked


def test_two_are_one_after_the_other(bank):
    found = transformed(bank, [am.DARE(0.5, seed=3), am.TSVM()])
    assert torch.equal(found.vectors, am.TSVM()(am.DARE(0.5, seed=3)(bank)).vectors)
