"""Concrete masks against straight ports of the published loops, with the noise of the rule.

Left out of the ports, as slips of the published code: λ of the inner step is the reset one, not that of the meta-step
before, and a merge does not add to θ₀ in place.
"""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS
from torch.func import functional_call
from torch.nn.functional import normalize

import adaptive_merge as am
from adaptive_merge.errors import InputError
from adaptive_merge.merge import placement

LR = 1e-3
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Batches(pl.Callback):
    """What each step saw, and what the rule was after it."""

    def __init__(self):
        self.batches, self.learned = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append({task: part["image"].clone() for task, part in batch.items()})
        rule = module.coefficients
        self.learned.append([rule.logits.detach().clone(), rule.linear.values.detach().clone()])


def learn(toy, bank, heads, images, rule, steps=20, kind="resident", accumulate="joint"):
    module = am.AdaptiveMerge(
        bank, toy, heads, coefficients=rule, objective=am.Entropy(), lr=LR, bank=kind, accumulate=accumulate
    )
    seen = Batches()
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[seen], num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, datamodule=am.TaskStream(images, 8))
    return module, seen


class Port:
    """The published loops, tensor by tensor, in ordinary graphs."""

    def __init__(self, toy, bank, heads, rule):
        self.toy, self.bank, self.heads, self.rule = toy, bank, heads, rule
        self.logits = torch.zeros(bank.layout.numel, requires_grad=True)

    def mask(self, number):
        return torch.sigmoid((self.logits + self.rule._noise(number)) / 0.5)

    def loss(self, batch, lambdas, mask):
        weights = {}
        for column, (name, shape, part) in enumerate(
            zip(self.bank.names, self.bank.layout.shapes, self.bank.layout.slices)
        ):
            m = mask[part] / mask[part].mean()
            tau = sum(value * vector for value, vector in zip(lambdas[:, column], self.bank.vectors[:, part] * m))
            weights[name] = (self.bank.pretrained[part] + tau).view(shape)
        total = 0.0
        for task, images in batch.items():
            pixels = (images.float() / 255 - 0.5) / 0.25
            features = functional_call(self.toy, weights, (pixels,))
            logits = normalize(features, dim=-1) @ self.heads[task].T
            total = total + -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return total


def step(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def close(ours, expected):
    assert (ours - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
def test_task_arithmetic_is_the_published_loop(toy, bank, heads, images, accumulate):
    rule = am.ConcreteMask()
    _, seen = learn(toy, bank, heads, images, rule, accumulate=accumulate)
    port = Port(toy, bank, heads, rule)
    adam = torch.optim.Adam([port.logits], lr=LR)
    lambdas = torch.full((len(TASKS), len(bank.names)), 0.3)
    for number, (batch, (logits, _)) in enumerate(zip(seen.batches, seen.learned), start=1):
        step(adam, port.loss(batch, lambdas, port.mask(number)))
        close(logits, port.logits)
    assert port.logits.abs().max() > 0.005


def test_adamerging_is_the_published_loop(toy, bank, heads, images):
    rule = am.ConcreteMask("layer", bounds="free", mask_steps=6, mask="draw")
    _, seen = learn(toy, bank, heads, images, rule)
    port, shape = Port(toy, bank, heads, rule), (len(TASKS), len(bank.names))
    inner = torch.full(shape, 0.3, requires_grad=True)
    outer_adam, inner_adam = torch.optim.Adam([port.logits], lr=LR), torch.optim.Adam([inner], lr=1.0)
    for number in range(0, 12, 2):
        inner.data.fill_(0.3)
        step(inner_adam, port.loss(seen.batches[number], inner, port.mask(number + 1)))
        step(outer_adam, port.loss(seen.batches[number + 1], inner.detach(), port.mask(number + 2)))
        close(seen.learned[number + 1][0], port.logits)
    assert torch.equal(seen.learned[11][1], torch.full(shape, 0.3))
    lambdas = torch.full(shape, 0.3, requires_grad=True)
    adam = torch.optim.Adam([lambdas], lr=LR)
    mask = port.mask(-1).detach()
    for batch, (logits, values) in zip(seen.batches[12:], seen.learned[12:]):
        step(adam, port.loss(batch, lambdas, mask))
        close(values, lambdas)
        close(logits, port.logits)
    assert (lambdas - 0.3).abs().max() > 0.005


@pytest.mark.parametrize("kind", ["streamed", "sharded"])
def test_placements_learn_the_same(toy, bank, heads, images, kind, monkeypatch):
    monkeypatch.setattr(placement, "PIECE", 50)
    learned = []
    for where in ("resident", kind):
        rule = am.ConcreteMask("task", mask_steps=3)
        learn(toy, bank, heads, images, rule, steps=9, kind=where)
        learned.append([value.detach().clone() for value in rule.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*learned)) <= 1e-6


def test_what_is_evaluated_folds_into_plain_weights(toy, bank, heads, images):
    module, _ = learn(toy, bank, heads, images, am.ConcreteMask(masks=3), steps=4)
    rule = module.eval().coefficients
    masks = [torch.sigmoid((rule.logits + rule._noise(-1 - n)) / 0.5) for n in range(3)]
    merged = module.merged_state_dict()
    assert rule.held_bytes == rule._last[1].nbytes
    for name, shape, part in zip(bank.names, bank.layout.shapes, bank.layout.slices):
        mean = torch.stack([mask[part] / mask[part].mean() for mask in masks]).mean(0)
        expected = bank.pretrained[part] + 0.3 * bank.vectors[:, part].sum(0) * mean
        torch.testing.assert_close(merged[name], expected.view(shape).detach(), atol=1e-6, rtol=0)


def test_noise_is_of_seed_and_step(bank):
    first, second, other = (am.ConcreteMask(seed=seed).bind(bank) for seed in (1, 1, 2))
    assert torch.equal(first._noise(3), second._noise(3))
    assert not torch.equal(first._noise(3), first._noise(4)) and not torch.equal(first._noise(3), other._noise(3))


def test_a_start_is_refused(toy, bank, heads):
    with pytest.raises(InputError, match="cannot go on from a start"):
        am.ConcreteMask("layer").bind(bank).rebase(bank)
    with pytest.raises(InputError, match="granularity"):
        am.ConcreteMask("layers")


def test_a_resumed_run_has_the_same_bits(toy, bank, heads, images, tmp_path):
    def run(steps, resume=None):
        rule = am.ConcreteMask("layer", mask_steps=3)
        module = am.AdaptiveMerge(bank, toy, heads, coefficients=rule, objective=am.Entropy(), lr=LR)
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", num_sanity_val_steps=0, **QUIET)
        trainer.fit(module, datamodule=am.TaskStream(images, 8), ckpt_path=resume, weights_only=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.coefficients.state_dict()

    whole = run(9)
    run(3)  # between the two steps of a pair
    parts = run(9, tmp_path / "last.ckpt")
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_what_a_mask_keeps_is_told_by_parameter(bank):
    rule = am.ConcreteMask()
    rule.bind(bank)
    with torch.no_grad():
        rule.logits[bank.layout.slices[0]] = 1.0
    first, *others = bank.layout.names
    kept = rule.kept()
    assert list(kept) == list(bank.tasks) and list(kept["red"]) == list(bank.layout.names)
    assert kept["red"][first] == pytest.approx(float(torch.sigmoid(torch.tensor(2.0))))  # temperature 0.5
    assert {kept["red"][name] for name in others} == {0.5}
