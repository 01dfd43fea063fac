"""Task vectors kept as factors are read as the dense ones are, by every placement, and a file keeps them."""

from __future__ import annotations

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.merge.factors import FactoredVectors, Product
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.placement import PIECE, place
from adaptive_merge.weights.open_clip_names import expected_shapes

SHAPES = {"conv": (6, 3, 2, 2), "norm": (6,), "attn.weight": (18, 6), "attn.bias": (18,), "proj": (6, 4)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pretrained():
    return {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}


CHANGES = {
    "low": {
        "conv": (Product(0, random(6, 2), random(2, 12)),),
        "attn.weight": (Product(0, random(6, 1), random(1, 6)), Product(12, random(6, 3), random(3, 6))),
        "attn.bias": random(18, seed=9),
    },
    "overlapping": {"attn.weight": (Product(0, random(18, 2), random(2, 6)), Product(5, random(4, 1), random(1, 6)))},
    "full": {name: random(*shape, seed=20) for name, shape in SHAPES.items()},
    "none": {},
}


def dense_of(change, shape):
    """Independent of the code: matrices multiplied whole and put in their rows."""
    if isinstance(change, torch.Tensor):
        return change
    total = torch.zeros(shape).flatten(1)
    for product in change:
        total[product.row : product.row + len(product.high)] += product.high @ product.low
    return total.view(shape)


@pytest.fixture
def banks(pretrained):
    """The same experts, as factors and dense."""
    experts = {
        task: {
            name: value + (dense_of(change[name], SHAPES[name]) if name in change else 0)
            for name, value in pretrained.items()
        }
        for task, change in CHANGES.items()
    }
    return am.TaskVectors.from_changes(pretrained, CHANGES), am.TaskVectors.from_state_dicts(pretrained, experts)


def test_any_columns_and_rows_are_those_of_the_dense_bank(banks):
    factored, dense = banks
    assert torch.allclose(factored.vectors[:, :], dense.vectors, atol=1e-5)
    width = dense.layout.numel
    for start in range(0, width, 7):
        for stop in (start, start + 1, start + 13, width):
            expected = dense.vectors[:, start:stop]
            assert torch.allclose(factored.vectors[:, start:stop], expected, atol=1e-5)
            window = factored.vectors.narrow(1, start, max(0, min(stop, width) - start))
            assert torch.allclose(window[:, :], expected, atol=1e-5)
            assert torch.allclose(window[:, 2:5], expected[:, 2:5], atol=1e-5)
    for row, vector in enumerate(factored.vectors):
        assert torch.allclose(vector, dense.vectors[row], atol=1e-5)
    assert torch.allclose(torch.cat([*factored.vectors.split(11, dim=1)], 1), dense.vectors, atol=1e-5)
    for name in SHAPES:
        assert torch.allclose(factored.of(name), dense.of(name), atol=1e-5)


@pytest.mark.parametrize("kind", ["resident", "streamed", "sharded"])
def test_every_placement_merges_and_projects_as_from_the_dense_bank(banks, kind, monkeypatch):
    monkeypatch.setattr("adaptive_merge.merge.placement.PIECE", 17)
    monkeypatch.setattr("adaptive_merge.merge.passes._WIDEN", {"cpu": 30})
    results = []
    for bank in banks:
        rule = am.LayerWise(0.3).bind(bank)
        placement = place(bank, kind)
        if kind == "sharded":
            placement.open(0, 1)
        state = rule.state()
        gradients = [random(*shape, seed=30) for shape in SHAPES.values()]
        results.append((placement.combine(rule, state), *placement.project(rule, gradients, state)))
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, atol=1e-4)
    assert PIECE > 17


def test_a_file_keeps_the_factors(banks, tmp_path):
    factored, _ = banks
    factored.save(tmp_path / "bank.safetensors")
    again = am.TaskVectors.load(tmp_path / "bank.safetensors")
    assert again.factors is not None and again.fingerprints == factored.fingerprints
    assert torch.equal(again.vectors[:, :], factored.vectors[:, :])
    assert again.select(["full", "low"]).fingerprints["low"] == factored.fingerprints["low"]
    damaged = bytearray((tmp_path / "bank.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "bank.safetensors").write_bytes(damaged)
    with pytest.raises(am.InputError, match="does not match its own sha256"):
        am.TaskVectors.load(tmp_path / "bank.safetensors")


def test_arithmetic_transforms_and_other_bases_give_dense_banks(banks):
    factored, dense = banks
    assert torch.allclose((2 * factored).vectors, 2 * dense.vectors, atol=1e-5)
    assert torch.allclose((factored - factored).vectors, torch.zeros_like(dense.vectors))
    shifted = factored.pretrained + 0.1
    assert torch.allclose(factored.around(shifted, {}).vectors, dense.around(shifted, {}).vectors, atol=1e-5)
    expert, expected = factored.expert("low"), dense.expert("low")
    assert all(torch.allclose(expert[name], expected[name], atol=1e-5) for name in expected)


def test_twenty_adapters_of_vit_l_14_take_less_than_two_gigabytes():
    shapes = expected_shapes(width=1024, layers=24, patch=14, image_size=224, mlp_width=4096, embed_dim=768)
    layout = Layout(tuple(shapes), tuple(shapes.values()))
    number = torch.zeros(1)  # spread out, it takes no memory here
    change = {
        name: (Product(0, number.expand(shape[0], 16), number.expand(16, shape[1])),)
        for name, shape in shapes.items()
        if len(shape) == 2 and ("attn" in name or "mlp" in name)
    }
    vectors = FactoredVectors(layout, [change] * 20)
    held = vectors.numel() * vectors.element_size() + 4 * layout.numel
    assert len(change) == 4 * 24 and held <= 2e9


def test_a_change_of_a_parameter_that_is_not_there_is_refused(pretrained):
    with pytest.raises(am.InputError, match="expert 'red': there is no parameter 'attn.wieght'; did you mean"):
        am.TaskVectors.from_changes(pretrained, {"red": {"attn.wieght": random(18, 6)}})
    with pytest.raises(am.InputError, match="no expert to merge"):
        am.TaskVectors.from_changes(pretrained, {})
