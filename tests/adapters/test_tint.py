import pytest
import reference
import torch
from fitting import STEPS, fit

import adaptive_merge as am
from adaptive_merge.data.sampler import draw, shuffled
from adaptive_merge.objectives.functional import confidence_filter
from adaptive_merge.objectives.taught import PseudoLabel


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
def test_updates_equal_the_published_loop(toy, bank, heads, images, experts, confident, accumulate):
    module = am.Tinting(bank, toy, heads, confident=confident, accumulate=accumulate)
    learned = fit(module, images, stream={"schedule": "shuffled"})[-1]

    def stream(update):
        turn, place = divmod(update, 3)
        task = shuffled(tuple(images), 0, turn)[place]
        return task, images[task].take(torch.from_numpy(draw(len(images[task]), 8, 0, task, turn)))

    vectors = [bank.layout.unflatten(vector) for vector in bank.vectors]
    coefficients, weights = reference.tinting(
        toy, bank.layout.unflatten(bank.pretrained), vectors, heads, experts, stream, confident, updates=STEPS
    )
    torch.testing.assert_close(learned, coefficients, rtol=1e-5, atol=1e-5)
    for row, task in enumerate(images):
        torch.testing.assert_close(module.model.adapters[0].weight[row], weights[task], rtol=1e-5, atol=1e-5)


def test_a_tint_starts_as_the_layer_is(toy, bank, heads, images):
    x = images["blue"].take(torch.arange(4))
    plain = am.TaskArithmetic(bank, toy, heads)("blue", x)
    for layer in ("head", "proj", "blocks.1.1.weight"):
        tinted = am.Tinting(bank, toy, heads, layer=layer)
        torch.testing.assert_close(tinted("blue", x), plain)


def test_a_tinted_backbone_layer_is_the_tasks_own(toy, bank, heads, images):
    module = am.Tinting(bank, toy, heads, layer="proj")
    fit(module, images, steps=5)
    red, green, shared = (module.merged_state_dict(task) for task in ("red", "green", None))
    assert not torch.equal(red["proj"], green["proj"])
    assert all(torch.equal(red[name], shared[name]) for name in shared if name != "proj")
    proj = module.coefficients.groups.index("proj")
    assert torch.equal(module.coefficients.values[:, proj], torch.full((3,), 0.3))


def test_the_confidence_filter_truth_table():
    sure, unsure = [4.0, 0.0], [1.0, 0.0]
    other_sure, other_unsure = [0.0, 4.0], [0.0, 1.0]
    merged = torch.tensor([sure, sure, unsure, unsure, sure])
    expert = torch.tensor([unsure, other_unsure, other_sure, other_unsure, other_sure])
    #         agree: keep   less sure: drop  surer: keep  equally sure: keep  equally sure: keep
    assert confidence_filter(merged, expert).tolist() == [True, False, True, True, True]


def test_a_batch_without_a_kept_image_takes_no_step_and_is_logged(toy, bank, heads, images, monkeypatch):
    monkeypatch.setattr(PseudoLabel, "keep", lambda self, p, e: torch.zeros(len(p.logits), dtype=torch.bool))
    module = am.TintingPP(bank, toy, heads)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    logged = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((name, float(value))))
    fit(module, images, steps=3)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert logged.count(("train/kept", 0.0)) == 3


def test_separate_learning_rates(toy, bank, heads, images):
    module = am.Tinting(bank, toy, heads, lr=0.0, adapter_lr=1e-2)
    learned = fit(module, images, steps=3)
    assert torch.equal(learned[-1], torch.full_like(learned[-1], 0.3))
    assert not torch.equal(module.model.adapters[0].weight[0], heads["red"])


def test_unknown_layers_are_answered_with_the_nearest(toy, bank, heads):
    with pytest.raises(am.InputError, match="no layer 'projj' to tint.*did you mean 'proj'"):
        am.Tinting(bank, toy, heads, layer="projj")
