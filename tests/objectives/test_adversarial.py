"""DAM's adversarial term against a straight port of the published loop, and what has to hold around it."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

import adaptive_merge as am
from adaptive_merge.engine.perturb import check_share
from adaptive_merge.runs.checkpoint_io import AtomicCheckpointIO

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

STEPS = 4


class Deltas(pl.Callback):
    def __init__(self):
        self.values, self.coefficients = [], []

    def on_train_batch_end(self, trainer, module, *_):
        state = module.stage.objective.state_dict()
        self.values.append({task: values["delta"].clone() for task, values in state.items()})
        self.coefficients.append(module.coefficients.values.detach().clone())


def module_of(toy, bank, heads, objective, **options):
    return am.AdaptiveMerge(bank, toy, heads, coefficients=am.LayerWise(init=0.3), objective=objective, **options)


def fit(module, images, steps=STEPS, **options):
    watch = Deltas()
    trainer = pl.Trainer(max_steps=steps, callbacks=[watch], **QUIET, accelerator="cpu")
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.fit(module, datamodule=am.TaskStream(images, images_per_task=6), **options)
    return watch, trainer


def port(toy, bank, heads, images, weight, lr):
    """Stages 2 and 3 of the published loop with layer-wise coefficients, images clamped where pixels end."""
    stream = am.TaskStream(images, images_per_task=6)
    deltas = {task: torch.zeros(3, 4, 4, requires_grad=True) for task in bank.tasks}
    attack = torch.optim.Adam(deltas.values(), lr=lr)
    values = torch.full((len(bank.tasks), len(bank.names)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=1e-3)
    base = bank.layout.unflatten(bank.pretrained)
    history = []

    def inside(x):
        return x - (x - 2).relu() + (-2 - x).relu()

    def logits(weights, task, x):
        return F.normalize(torch.func.functional_call(toy, weights, (x,)), dim=1) @ heads[task].T

    for step in range(STEPS):
        merged = {
            name: base[name] + sum(values[t, g] * bank.of(name)[t] for t in range(len(bank.tasks)))
            for g, name in enumerate(bank.names)
        }
        frozen = {name: value.detach() for name, value in merged.items()}
        taken = {task: images[task].take(stream.draws[step][task]) for task in deltas}
        batches = {task: (x.float() / 255 - 0.5) / 0.25 for task, x in taken.items()}
        attack.zero_grad()
        for task, x in batches.items():
            with torch.no_grad():
                own = logits(frozen, task, x).argmax(1)
            (-F.cross_entropy(logits(frozen, task, inside(x + deltas[task])), own)).backward()
        attack.step()
        loss = 0.0
        for task, x in batches.items():
            for share, shown in ((1.0, x), (weight, inside(x + deltas[task].detach()))):
                p = logits(merged, task, shown).softmax(1)
                loss = loss + share * -(p * p.log()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(({task: delta.detach().clone() for task, delta in deltas.items()}, values.detach().clone()))
    return history


@pytest.mark.parametrize("accumulate", ["auto", "per_task"])
def test_the_first_updates_are_those_of_the_published_loop(toy, bank, heads, images, accumulate):
    objective = am.Adversarial(weight=0.5, lr=0.03)
    watch, _ = fit(module_of(toy, bank, heads, objective, accumulate=accumulate), images)
    for (deltas, values), ours, coefficients in zip(
        port(toy, bank, heads, images, 0.5, 0.03), watch.values, watch.coefficients
    ):
        for task, delta in deltas.items():
            assert torch.allclose(ours[task], delta, atol=1e-5)
        assert torch.allclose(coefficients, values, atol=1e-5)
    assert all(delta.abs().max() > 0.05 for delta in watch.values[-1].values())


def test_without_weight_it_is_the_plain_objective_bit_for_bit(toy, bank, heads, images):
    plain, _ = fit(module_of(toy, bank, heads, am.Entropy(reliable=0.9)), images)
    none, _ = fit(module_of(toy, bank, heads, am.Adversarial(am.Entropy(reliable=0.9), weight=0.0)), images)
    assert all(torch.equal(*pair) for pair in zip(plain.coefficients, none.coefficients))
    assert none.values == [{}] * STEPS


def test_a_step_of_the_perturbation_turns_a_frozen_model(toy, bank, heads, images):
    module = module_of(toy, bank, heads, am.Adversarial(weight=1.0, lr=0.05), lr=0.0)
    fit(module, images, steps=20)
    objective = module.stage.objective
    for task in module.tasks:
        clean = module.model.backbone.normalise(images[task].take(torch.arange(len(images[task]))))
        moved = (clean + objective.perturbation(task, clean)).clamp(-2, 2)
        with torch.no_grad():
            before, after = (module.model(task, x).logits for x in (clean, moved))
        assert F.cross_entropy(after, before.argmax(1)) > F.cross_entropy(before, before.argmax(1)) + 0.05


def test_a_resumed_run_goes_on_with_its_perturbations(toy, bank, heads, images, tmp_path):
    whole, _ = fit(module_of(toy, bank, heads, am.Adversarial(lr=0.03)), images)
    _, trainer = fit(module_of(toy, bank, heads, am.Adversarial(lr=0.03)), images, steps=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    rest, _ = fit(module_of(toy, bank, heads, am.Adversarial(lr=0.03)), images, ckpt_path=tmp_path / "cut.ckpt")
    assert len(rest.values) == 2
    for one, other in zip(whole.values[2:], rest.values):
        assert one.keys() == other.keys() and all(torch.equal(one[task], other[task]) for task in one)
    assert torch.equal(whole.coefficients[-1], rest.coefficients[-1])


def test_it_wraps_objectives_that_filter_and_that_look_at_experts(toy, bank, heads, images):
    objective = am.Adversarial(am.PseudoLabel(confident=True), weight=0.1)
    assert objective.needs_expert and objective.filters
    watch, _ = fit(module_of(toy, bank, heads, objective, adapters=[am.FeatureSurgery(rank=2)]), images)
    assert len(watch.values[-1]) == 3


def test_owners_of_tasks_are_refused():
    stages = [am.Stage(1, "all", am.Adversarial())]
    check_share(stages, False)
    with pytest.raises(am.InputError, match=r"set data\.share to samples"):
        check_share(stages, True)
    check_share([am.Stage(1, "all", am.Adversarial(weight=0.0))], True)


@pytest.mark.parametrize("settings", [{"weight": -0.1}, {"lr": 0.0}, {"weight": float("inf")}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(am.InputError, match="Adversarial needs"):
        am.Adversarial(**settings)


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
def test_a_concrete_mask_takes_its_turns_under_perturbations(toy, bank, heads, images, accumulate):
    """DAM as published: one draw of the mask a step, however often the merge is asked about the images."""

    def learned(weight, objective=None):
        rule = am.ConcreteMask("layer", mask_steps=2)
        module = am.AdaptiveMerge(
            bank,
            toy,
            heads,
            coefficients=rule,
            objective=objective or am.Adversarial(weight=weight, lr=0.03),
            lr=1e-3,
            accumulate=accumulate,
        )
        torch.manual_seed(0)
        trainer = pl.Trainer(max_steps=6, accelerator="cpu", num_sanity_val_steps=0, **QUIET)
        trainer.fit(module, datamodule=am.TaskStream(images, 8))
        return module.coefficients

    plain, none, perturbed = learned(0.0, am.Entropy()), learned(0.0), learned(0.5)
    assert int(plain.steps) == int(none.steps) == int(perturbed.steps) == 6
    assert torch.equal(plain.logits, none.logits) and torch.equal(plain.linear.values, none.linear.values)
    assert not torch.equal(plain.logits, perturbed.logits)
