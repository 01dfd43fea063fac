"""Each transform sums to the published merge: an independent dense implementation, on full-rank random towers."""

import numpy as np
import pytest
import torch

from adaptive_merge.transforms.breadcrumbs import Breadcrumbs
from adaptive_merge.transforms.cart import CART
from adaptive_merge.transforms.consensus import Consensus
from adaptive_merge.transforms.doge import DOGE
from adaptive_merge.transforms.iso_c import IsoC
from adaptive_merge.transforms.iso_cts import IsoCTS
from adaptive_merge.transforms.lines import LiNeS
from adaptive_merge.transforms.star import STAR
from adaptive_merge.transforms.svc import SVC
from adaptive_merge.transforms.ties import Ties
from adaptive_merge.transforms.tsvm import TSVM
from adaptive_merge.transforms.wudi import WUDI
from transforms import oracles


def merged(bank, transform, coefficient=1.0):
    summed = coefficient * transform(bank).vectors.double().sum(0)
    return {name: value.numpy() for name, value in bank.layout.unflatten(summed).items()}


def assert_same(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = np.linalg.norm(found[name] - value)
        assert error <= tolerance * np.linalg.norm(value), (name, error / np.linalg.norm(value))


@pytest.mark.parametrize(
    "transform, rule",
    [
        (TSVM, oracles.tsvm),
        (IsoC, oracles.iso_c),
        (IsoCTS, oracles.iso_cts),
        (lambda: WUDI(steps=30, lr=1e-3), lambda values: oracles.wudi(values, 30, 1e-3)),
    ],
)
def test_joint_merges(tower, transform, rule):
    assert_same(merged(tower, transform()), oracles.per_tensor(oracles.arrays(tower), rule))


@pytest.mark.parametrize("transform, rule", [(TSVM, oracles.tsvm), (IsoC, oracles.iso_c), (IsoCTS, oracles.iso_cts)])
def test_where_a_decomposition_does_not_converge(tower, transform, rule, monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    wanted = oracles.per_tensor(oracles.arrays(tower), rule)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert_same(merged(tower, transform()), wanted)


@pytest.mark.parametrize("transform, rule", [(TSVM, oracles.tsvm), (IsoC, oracles.iso_c), (IsoCTS, oracles.iso_cts)])
def test_split_queries_keys_and_values(tower, transform, rule):
    found = merged(tower, transform(qkv="split"))
    vectors = oracles.arrays(tower)
    for name, value in oracles.per_tensor(vectors, rule).items():
        if name.endswith("in_proj_weight"):
            thirds = oracles.split(rule)([vector[name] for vector in vectors.values()])
            assert_same({name: found[name]}, {name: thirds})
            assert np.linalg.norm(thirds - value) > 0.1 * np.linalg.norm(value)
        else:
            assert_same({name: found[name]}, {name: value})


def test_cart(tower):
    assert_same(merged(tower, CART(0.3, 1.5)), oracles.cart(oracles.arrays(tower), 0.3, 1.5))


def test_svc_on_task_arithmetic(tower):
    vectors = oracles.arrays(tower)
    arithmetic = oracles.per_tensor(vectors, lambda values: 0.3 * sum(values), lambda values: 0.3 * sum(values))
    assert_same(merged(tower, SVC()), oracles.svc(arithmetic, vectors, 0.1))
    with_mean = oracles.per_tensor(vectors, lambda values: 0.3 * sum(values))
    assert_same(merged(tower, SVC(other="mean")), oracles.svc(with_mean, vectors, 0.1))


def test_svc_on_tsvm(tower):
    vectors = oracles.arrays(tower)
    made = {name: 0.7 * value for name, value in oracles.per_tensor(vectors, oracles.tsvm).items()}
    assert_same(merged(tower, SVC(TSVM(), scale=0.7, a=1.0)), oracles.svc(made, vectors, 1.0))


def test_svc_on_a_flat_merge_takes_the_directions_of_the_summed_experts(tower):
    vectors = oracles.arrays(tower)
    made = oracles.per_tensor(vectors, oracles.iso_c)
    summed = oracles.per_tensor(vectors, sum)
    assert_same(merged(tower, SVC(IsoC(), scale=1.0, a=0.2)), oracles.svc(made, vectors, 0.2, summed))


def test_star(tower):
    found = STAR()(tower)
    for task, vector in oracles.arrays(tower).items():
        wanted = {n: oracles.star(v, 40) if oracles.is_matrix(n, v) else v for n, v in vector.items()}
        assert_same(oracles.arrays(found)[task], wanted)


def test_breadcrumbs(tower):
    found = oracles.arrays(Breadcrumbs(0.3, 0.1)(tower))
    for task, vector in oracles.arrays(tower).items():
        assert_same(found[task], {name: oracles.breadcrumbs(value, 0.3, 0.1) for name, value in vector.items()})


@pytest.mark.parametrize("inner", [None, Ties()])
def test_consensus(tower, inner):
    made = inner(tower).vectors if inner else tower.vectors
    joint = made.sum(0)
    votes = sum((tau.abs() > 0.4 * (joint - tau).abs()).int() for tau in tower.vectors)
    torch.testing.assert_close(Consensus(inner)(tower).vectors.sum(0), joint * (votes >= 2))


def test_doge(tower):
    found, wanted = merged(tower, DOGE(steps=40)), oracles.doge(oracles.arrays(tower), steps=40)
    assert_same(found, wanted)
    assert np.count_nonzero(wanted["proj"]) == 0


def test_lines_gives_ties_the_length_of_the_mean(tower):
    vectors = Ties()(tower).vectors
    a = (tower.vectors.sum(0).abs().sum() / vectors.sum(0).abs().sum() / 3).item()
    found = LiNeS(b=0.5, transform=Ties())(tower).layout.unflatten(LiNeS(b=0.5, transform=Ties())(tower).vectors[0])
    wanted = tower.layout.unflatten(vectors[0])
    torch.testing.assert_close(found["proj"], a * wanted["proj"])
    last = "transformer.resblocks.1.attn.out_proj.weight"
    torch.testing.assert_close(found[last], (a + 0.5) * wanted[last])
