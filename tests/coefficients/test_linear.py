import pytest
import torch

import adaptive_merge as am


def test_clamped_gradient_dies_outside_and_lives_on_the_bounds(bank):
    coefficients = am.TaskWise(init=[0.3, 0.0, 1.0]).bind(bank)
    coefficients().sum().backward()
    assert coefficients.values.grad.flatten().tolist() == [1, 1, 1]
    outside = am.TaskWise(init=[-0.01, 1.01, 0.5]).bind(bank)
    outside().sum().backward()
    assert outside.values.grad.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize(("bounds", "returns"), [("clamp", False), ("project", True)])
def test_only_projected_coefficients_return_from_outside(bank, bounds, returns):
    coefficients = am.TaskWise(init=0.0, bounds=bounds).bind(bank)
    optimizer = torch.optim.SGD(coefficients.parameters(), lr=0.1)
    for direction in (1.0, -1.0, -1.0):
        optimizer.zero_grad()
        (direction * coefficients()).sum().backward()
        optimizer.step()
        coefficients.bound_()
    assert bool((coefficients() > 0).all()) is returns


def test_start_values(bank):
    squares = bank.vectors.square().sum(1)
    assert am.Fixed("average").bind(bank)().flatten().tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(am.Fixed("metagpt").bind(bank)().flatten(), squares / squares.sum())
    assert am.Fixed([0.1, 0.2, 0.3]).bind(bank).table()["green"] == {"all": pytest.approx(0.2)}


def test_wrong_numbers_and_names_are_refused(bank):
    with pytest.raises(am.InputError, match="2 start coefficients for 3 experts"):
        am.Fixed([0.1, 0.2]).bind(bank)
    with pytest.raises(am.InputError, match="unknown bounds 'clip'"):
        am.LayerWise(bounds="clip")
    with pytest.raises(am.MissingFileError, match="cannot start at .mean."):
        am.LayerWise(init="mean").bind(bank)
