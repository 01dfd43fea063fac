import pytest
import torch
from fitting import fit

import adaptive_merge as am


def staged(toy, bank, heads):
    torch.manual_seed(0)
    stages = [am.Stage(5, "coefficients", am.Entropy()), am.Stage(1, "adapters", am.FeatureDistance())]
    return am.AdaptiveMerge(
        bank, toy, heads, coefficients=am.LayerWise(), adapters=[am.FeatureSurgery(2)], stages=stages
    )


def test_each_stage_learns_its_own(toy, bank, heads, images):
    module = staged(toy, bank, heads)
    trajectory = fit(module, images, steps=12)
    assert not torch.equal(trajectory[3], trajectory[4])
    assert all(torch.equal(trajectory[4], later) for later in trajectory[5:])
    assert module.model.adapters[0].up[0].count_nonzero()
    alone = fit(am.AdaMerging(bank, toy, heads), images, steps=5)
    assert torch.equal(trajectory[4], alone[-1])


def test_stages_and_an_objective_exclude_each_other(toy, bank, heads):
    with pytest.raises(am.InputError, match="not both"):
        am.AdaptiveMerge(bank, toy, heads, objective=am.Entropy(), stages=[am.Stage(1, "all", am.Entropy())])
    with pytest.raises(am.InputError, match="at least 1 step"):
        am.Stage(0, "all", am.Entropy())


def test_coefficients_come_from_files_by_name(toy, bank, heads, images, tmp_path):
    from adaptive_merge.coefficients.files import save_coefficients

    module = am.AdaMerging(bank, toy, heads)
    fit(module, images)
    table = module.coefficients.table()
    save_coefficients(tmp_path / "coefficients.json", table)
    for source in (tmp_path, tmp_path / "coefficients.json"):
        loaded = am.LayerWise(init=str(source), trainable=False).bind(bank)
        assert torch.equal(loaded(), module.coefficients().detach())
    for change, message in (
        (
            lambda t: {task: {k: v for k, v in row.items() if k != "proj"} for task, row in t.items()},
            "no coefficient for group 'proj'",
        ),
        (lambda t: {task: row | {"surplus": 0.0} for task, row in t.items()}, "has no group 'surplus'"),
        (lambda t: {"red": t["red"]}, "no coefficient for task 'green'"),
    ):
        save_coefficients(tmp_path / "other.json", change(table))
        with pytest.raises(am.InputError, match=message):
            am.LayerWise(init=str(tmp_path / "other.json")).bind(bank)
