"""A start is solved where its anchor is, and is the same there."""

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.starts.fisher import Fisher


@pytest.mark.cuda
@pytest.mark.parametrize("start", [am.RegMean(), am.LOT(), am.CompensatedRegression(), Fisher()], ids=repr)
def test_a_start_on_the_device_is_that_of_a_processor(make_problem, start):
    problem = make_problem()
    here = start.solve(problem).weights
    there = start.solve(make_problem(anchor=problem.anchor.to("cuda"))).weights
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
