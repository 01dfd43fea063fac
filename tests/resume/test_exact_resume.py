"""Interrupted anywhere and resumed equals uninterrupted: bit for bit on one process."""

import os
import random
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from processes import guarded, launch, parts, texts
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger

import adaptive_merge as am
from adaptive_merge.callbacks.safe.preemption import Preempted
from adaptive_merge.callbacks.safe.rng import RngState

STEPS = 25
SIZES = {"red": 31, "green": 57, "blue": 20}
LOGGED = {"val_check_interval": 4, "check_val_every_n_epoch": None, "log_every_n_steps": 1}


class Noisy(am.PseudoLabel):
    """A loss that draws from every generator, as dropout and augmentations would."""

    def losses(self, prediction, expert):
        losses = super().losses(prediction, expert)
        return losses * (random.random() + np.random.rand() + np.random.randn() + torch.rand(len(losses)))


class Memory(Logger):
    """What was logged: step → key → value."""

    name, version = "memory", "0"

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(
            {key: value for key, value in metrics.items() if key.startswith(("train/", "epoch"))}
        )


def module():
    bank, toy, heads, _ = parts()
    return am.AdaptiveMerge(
        bank,
        toy,
        heads,
        coefficients=am.LayerWise(0.3),
        adapters=[am.Tint("head"), am.FeatureSurgery(2)],
        objective=Noisy(confident=True),
        lr=0.01,
    )


def stream():
    return am.TaskStream(parts(SIZES)[3], 8, sampling="epoch")


def run(folder, steps, source=None, world=1, callbacks=(), **settings):
    """Fit to `steps`, from `source` on; what it ends with."""
    learner, log = module(), Memory()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    trainer = guarded(folder, world, callbacks, max_steps=steps, **LOGGED | settings | {"logger": log})
    trainer.fit(learner, datamodule=stream(), ckpt_path=source, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt", weights_only=False)
    found = {"state": learner.state_dict(), "optimiser": trainer.optimizers[0].state_dict(), "rows": log.rows}
    if trainer.is_global_zero:
        found["random"] = (random.random(), np.random.rand(), torch.rand(1).item())
    return found


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and its checkpoint after each step."""
    folder = tmp_path_factory.mktemp("whole")
    every = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    return folder, run(folder, STEPS, callbacks=[every], enable_checkpointing=True)


def test_interrupted_after_any_step_and_resumed_is_bit_equal(whole, tmp_path):
    folder, expected = whole
    for step in range(1, STEPS):
        found = run(tmp_path, STEPS, folder / f"step={step}.ckpt")
        assert min(found["rows"]) == step and max(found["rows"]) == STEPS - 1
        expected_rows = {at: row for at, row in expected["rows"].items() if at >= step}
        assert same(found, expected | {"rows": expected_rows}), f"resumed at {step}"


class Stop(pl.Callback):
    """Tell the run to stop while it takes its step number `at`."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder, at, source):
    log = Memory()
    trainer = guarded(folder, callbacks=[Stop(at)], max_steps=STEPS, **LOGGED | {"logger": log})
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with pytest.raises(Preempted):
        trainer.fit(module(), datamodule=stream(), ckpt_path=source, weights_only=True)
    return log.rows


def test_three_times_stopped_and_resumed_is_bit_equal(whole, tmp_path):
    source, rows, last = None, {}, tmp_path / "checkpoints" / "last.ckpt"
    for at in (6, 11, 20):
        found = stopped(tmp_path, at, source)
        assert max(found) == at - 1
        source, rows = last, rows | found
    found = run(tmp_path, STEPS, source)
    assert same(found | {"rows": rows | found["rows"]}, whole[1])


def test_without_the_generators_it_would_not_be(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(RngState, "on_load_checkpoint", lambda *_: None)
    assert not same(run(tmp_path, STEPS, whole[0] / "step=9.ckpt")["state"], whole[1]["state"])


def member(rank, folder, source, steps):
    run(folder, steps, source, world=2)


def test_from_one_process_to_two_and_back_changes_nothing_but_rounding(tmp_path, monkeypatch, record_property):
    # The noise is drawn per process; what must agree is everything else.
    monkeypatch.setattr(Noisy, "losses", am.PseudoLabel.losses)
    expected = run(tmp_path / "whole", STEPS)
    run(tmp_path, 8)
    assert launch(2, member, tmp_path, tmp_path / "8.ckpt", 16, folder=tmp_path / "log") == [0, 0], texts(tmp_path)
    found = run(tmp_path, STEPS, tmp_path / "16.ckpt")
    for key, value in expected["state"].items():
        # Relative above 1: heads hold values near 16, where float32 has no finer steps than 1e-6.
        apart = ((found["state"][key] - value).abs() / value.abs().clamp_min(1)).max().item()
        record_property(key, apart)
        assert apart <= 1e-6


def test_a_checkpoint_holds_kilobytes_of_plain_values_only(whole):
    path = whole[0] / "step=9.ckpt"
    content = torch.load(path, weights_only=True)
    assert path.stat().st_size < 60_000
    assert set(content["state_dict"]) == set(module().state_dict())
    assert content["adaptive_merge"]["method"]["tasks"] == ["red", "green", "blue"]
    assert content["rng"].dtype == torch.uint8 and content["rng"].shape[0] == 1
