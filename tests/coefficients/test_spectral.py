"""Spectral masks against a straight port of AdaRank's loop: dense, in ordinary graphs, tensor by tensor."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize

import adaptive_merge as am
from adaptive_merge.errors import InputError
from adaptive_merge.merge import placement

LR = 1e-2
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Seen(pl.Callback):
    def __init__(self):
        self.batches, self.learned = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append({task: part["image"].clone() for task, part in batch.items()})
        rule = module.coefficients
        self.learned.append([rule.values.detach().clone(), rule.logits.detach().clone()])


def learn(toy, bank, heads, images, rule, steps=20, kind="resident", **parts):
    module = am.AdaptiveMerge(bank, toy, heads, coefficients=rule, objective=am.Entropy(), lr=LR, bank=kind, **parts)
    seen = Seen()
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[seen], num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, datamodule=am.TaskStream(images, 8))
    return module, seen


class Port:
    """W = origin + Σ λ U diag(mask S) Vᵀ for matrices in blocks, else origin + Σ λ τ; the mask straight through."""

    def __init__(self, toy, bank, heads, init, keep, origin, margin=0.1):
        self.toy, self.bank, self.heads = toy, bank, heads
        tau = {name: bank.of(name) for name in bank.names}
        self.base = dict(bank.layout.unflatten(bank.pretrained))
        if origin == "mean":
            self.base = {name: value + tau[name].mean(0) for name, value in self.base.items()}
            tau = {name: value - value.mean(0) for name, value in tau.items()}
        self.tau = tau
        self.matrices = [name for name in bank.names if name.startswith("blocks") and tau[name].dim() == 3]
        self.svd = {
            name: [torch.linalg.svd(one.double(), full_matrices=False) for one in tau[name]] for name in self.matrices
        }
        self.values = nn.Parameter(torch.full((len(bank.tasks), len(bank.names)), init))
        self.logits = {}
        for name in self.matrices:
            rank = min(tau[name].shape[1:])
            start = torch.full((len(bank.tasks), rank), -margin)
            start[:, : int(keep * rank)] = margin
            self.logits[name] = nn.Parameter(start)

    def weights(self):
        merged = {}
        for column, name in enumerate(self.bank.names):
            total = self.base[name]
            for task in range(len(self.bank.tasks)):
                share = self.tau[name][task]
                if name in self.matrices:
                    left, singular, right = (value.float() for value in self.svd[name][task])
                    soft = torch.sigmoid(self.logits[name][task] / 10)
                    mask = (self.logits[name][task] > 0).float() - soft.detach() + soft
                    share = left @ torch.diag(mask * singular) @ right
                total = total + self.values[task, column] * share
            merged[name] = total
        return merged

    def loss(self, batch):
        weights, total = self.weights(), 0.0
        for task, images in batch.items():
            features = functional_call(self.toy, weights, ((images.float() / 255 - 0.5) / 0.25,))
            logits = normalize(features, dim=-1) @ self.heads[task].T
            total = total - (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return total


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
@pytest.mark.parametrize(("origin", "keep"), [("pretrained", 1.0), ("pretrained", 0.5), ("mean", 0.25)])
def test_the_first_updates_are_the_published_loop(toy, bank, heads, images, accumulate, origin, keep):
    rule = am.Spectral(0.3, keep, margin=0.05, origin=origin)
    module, seen = learn(toy, bank, heads, images, rule, accumulate=accumulate)
    port = Port(toy, bank, heads, 0.3, keep, origin, margin=0.05)
    adam = torch.optim.Adam([port.values, *port.logits.values()], lr=LR)
    for batch, (values, logits) in zip(seen.batches, seen.learned):
        adam.zero_grad()
        port.loss(batch).backward()
        adam.step()
        assert (values - port.values).abs().max() <= 1e-5
        assert (logits - torch.cat(list(port.logits.values()), 1)).abs().max() <= 1e-5
    merged = module.merged_state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-5) for name, value in port.weights().items())
    flipped = (seen.learned[-1][1] > 0) != (seen.learned[0][1] > 0)
    assert flipped.any()


def test_all_directions_are_the_linear_merge(toy, bank):
    for rows, linear in (
        (am.Spectral(0.4), am.LayerWise(0.4, "free")),
        (am.Spectral(0.0, origin="mean"), am.Fixed("average")),
    ):
        ours, expected = (am.MergedBackbone(toy, bank, rule).merge() for rule in (rows, linear))
        assert all(torch.allclose(ours[name], expected[name], atol=1e-6) for name in expected)


def test_weights_of_directions_start_as_the_mask_and_learn(toy, bank, heads, images):
    masked = am.MergedBackbone(toy, bank, am.Spectral(0.3, keep=0.5)).merge()
    weighed = am.MergedBackbone(toy, bank, am.Spectral(0.3, keep=0.5, weigh=True)).merge()
    assert all(torch.allclose(masked[name], weighed[name], atol=1e-6) for name in masked)
    _, seen = learn(toy, bank, heads, images, am.Spectral(0.3, weigh=True), steps=3)
    moved = seen.learned[-1][1]
    assert (moved != 1).all() and (moved - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["streamed", "sharded"])
@pytest.mark.parametrize("origin", ["pretrained", "mean"])
def test_other_placements_learn_the_same(toy, bank, heads, images, kind, origin, monkeypatch):
    monkeypatch.setattr(placement, "PIECE", 37)  # cuts through rows of matrices
    _, expected = learn(toy, bank, heads, images, am.Spectral(keep=0.5, margin=0.02, origin=origin), steps=6)
    rule = am.Spectral(keep=0.5, margin=0.02, origin=origin)
    _, seen = learn(toy, bank, heads, images, rule, steps=6, kind=kind)
    for ours, theirs in zip(seen.learned[-1], expected.learned[-1]):
        assert (ours - theirs).abs().max() <= 1e-6


def test_fewer_directions_are_held_where_asked(toy, bank):
    rule = am.Spectral(keep=0.25, rank=0.5).bind(bank)
    assert rule.logits.shape == (len(TASKS), 8) and int((rule.logits > 0).sum()) == 2 * 2 * len(TASKS)
    assert rule.kept()["red"] == {"blocks.0.1.weight": 0.5, "blocks.1.1.weight": 0.5}
    part = am.MergedBackbone(toy, bank, am.Spectral(1.0, rank=0.5)).merge()["blocks.0.1.weight"]
    total = bank.layout.unflatten(bank.pretrained)["blocks.0.1.weight"].double()
    for tau in bank.of("blocks.0.1.weight").double():
        left, singular, right = torch.linalg.svd(tau)
        total = total + left[:, :4] @ torch.diag(singular[:4]) @ right[:4]
    assert torch.allclose(part.double(), total, atol=1e-6)


@pytest.mark.parametrize("rank", [1.0, 0.5])
def test_what_it_will_hold_is_known_before(toy, bank, rank):
    backbone = am.MergedBackbone(toy, bank, am.Spectral(rank=rank))
    known = backbone.coefficients.held_bytes
    backbone.merge()
    made = backbone.coefficients._held._made.values()
    assert known == sum(part.nbytes for one in made for part in (one.left, one.singular, one.right)) > 0


def test_results_say_what_the_masks_keep(toy, bank, heads, images, tmp_path):
    module = am.AdaptiveMerge(bank, toy, heads, coefficients=am.Spectral(keep=0.5), lr=1e-4)
    stream = am.TaskStream(images, 4)
    results = am.fit(module, stream, tmp_path / "run", max_steps=1, report=False, enable_progress_bar=False)
    assert results["kept"] == {task: {"blocks.0.1.weight": 0.5, "blocks.1.1.weight": 0.5} for task in TASKS}
    plain = am.fit(
        am.AdaMerging(bank, toy, heads),
        stream,
        tmp_path / "plain",
        max_steps=1,
        report=False,
        enable_progress_bar=False,
    )
    assert "kept" not in plain


def test_it_goes_on_from_a_start_at_zero(toy, bank):
    merged = am.MergedBackbone(toy, bank, am.Spectral(0.3))
    around = bank.around(bank.pretrained + 0.1, {})
    merged.rebase(around)
    weights = merged.merge()
    assert all(
        torch.allclose(weights[name], value + 0.1) for name, value in bank.layout.unflatten(bank.pretrained).items()
    )
    with pytest.raises(InputError, match="around the mean cannot go on from a start"):
        am.Spectral(origin="mean").bind(bank).rebase(around)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.0}, "`keep` is a share"),
        ({"keep": 1.5}, "`keep` is a share"),
        ({"rank": 0}, "`rank` is a share"),
        ({"margin": -1}, "`margin` has to be"),
        ({"temperature": 0}, "`temperature` has to be"),
        ({"origin": "zero"}, "unknown origin 'zero'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        am.Spectral(**settings)
