import pytest
import torch
import yaml

import adaptive_merge as am
from adaptive_merge.engine.transformed import transformed
from adaptive_merge.files import shipped


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


def test_starts_by_norm_sum_to_one_and_do_not_see_a_common_scale(bank):
    norms = bank.vectors.double().norm(dim=1)
    for power in (-1, 0.5, 2):
        found = am.TaskWise(f"norm^{power}").bind(bank)().flatten().double()
        torch.testing.assert_close(found, norms**power / (norms**power).sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(am.TaskWise(f"norm^{power}").bind(bank * 5)().flatten().double(), found)
    assert torch.equal(am.Fixed("norm^2").bind(bank)(), am.Fixed("metagpt").bind(bank)())
    # Task-wise norms spread over all layers.
    assert (am.LayerWise("metagpt").bind(bank)() == am.Fixed("metagpt").bind(bank)()).all()


@pytest.mark.parametrize("kind", [am.LayerWise, am.BlockWise])
def test_layerwise_starts_are_the_formula_in_each_group(bank, kind):
    found = kind("layerwise_norm^-1").bind(bank)
    for group, row in enumerate(found().T.tolist()):
        names = [name for name, place in zip(bank.names, found.group_of) if place == group]
        sizes = [sum(float(bank.of(name)[task].double().square().sum()) for name in names) ** -0.5 for task in range(3)]
        assert row == pytest.approx([size / sum(sizes) for size in sizes])
    torch.testing.assert_close(kind("layerwise_metagpt").bind(bank)().sum(0), torch.ones(len(found.groups)))


def test_what_has_not_moved_counts_nothing_in_a_start_by_norm(bank):
    rows = bank.vectors.clone()
    rows[1] = 0
    rows[:, bank.layout.slices[0]] = 0
    still = bank.with_vectors(rows)
    for name in ("norm^-1", "metagpt"):
        found = am.LayerWise(f"layerwise_{name}").bind(still)()
        assert found[:, 0].tolist() == pytest.approx([1 / 3] * 3)  # no task has moved it
        assert not found[1, 1:].any()
        assert am.Fixed(name).bind(still)()[1] == 0
        assert not am.Fixed("norm^-300").bind(bank)().isnan().any()
        assert am.Fixed(name).bind(bank * 0.0)().flatten().tolist() == pytest.approx([1 / 3] * 3)


def test_names_of_starts_that_do_not_fit_are_refused_with_the_choices(bank):
    with pytest.raises(am.InputError, match="one for all; set init 'metagpt'"):
        am.Fixed("layerwise_metagpt").bind(bank)
    for name in ("metagtp", "norm^x", "layerwise_average", "norm^1e999", "norm"):
        with pytest.raises(am.MissingFileError, match=r"'average', 'published', 'metagpt' or 'norm\^P'"):
            am.LayerWise(name).bind(bank)


def test_a_static_method_says_where_its_coefficients_start(bank):
    def start(*transforms):
        return am.LayerWise("published").bind(transformed(bank, transforms))().unique().tolist()

    assert start() == pytest.approx([0.3]) and start(am.Ties()) == pytest.approx([0.3])
    assert (
        start(am.TSVM()) == start(am.CART()) == start(am.DARE(), am.TSVM()) == start(am.TSVM(), am.LayerDrop()) == [1]
    )
    assert start(am.IsoC()) == pytest.approx([0.7]) and start(am.STAR()) == pytest.approx([1 / 3])


def test_shipped_recipes_use_what_their_transform_publishes():
    for path in (shipped() / "embedded").glob("*.yaml"):
        model = yaml.safe_load(path.read_text())["model"]
        rule = model.get("coefficients", {})
        if model.get("transforms") and isinstance(rule, dict) and rule.get("class_path") == "Fixed":
            (entry,) = model["transforms"]
            name = entry if isinstance(entry, str) else entry["class_path"]
            expected = getattr(am, name).published or 0.3
            assert rule["init_args"]["init"] == expected, path
