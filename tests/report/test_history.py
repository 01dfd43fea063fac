import json
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open

import adaptive_merge as am
from adaptive_merge.callbacks import Diagnostics, History, watchers
from adaptive_merge.callbacks.record.rate import Rate
from adaptive_merge.callbacks.show.progress import Progress
from adaptive_merge.files import save_tensors
from adaptive_merge.runs.reading import read_tensors

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
}


@pytest.fixture
def parts(bank, toy, heads, images):
    """A fresh module and its stream."""
    return lambda: (am.AdaMerging(bank, toy, heads), am.TaskStream(images, images_per_task=4))


def fit(parts, folder, steps, history, resume=None, **options):
    module, stream = parts()
    saver = ModelCheckpoint(folder, "last", every_n_train_steps=5, enable_version_counter=False)
    trainer = pl.Trainer(max_steps=steps, logger=False, callbacks=[history, saver], default_root_dir=folder, **QUIET)
    trainer.fit(module, stream, ckpt_path=resume, weights_only=True, **options)
    return module


def read(folder):
    return read_tensors(folder / "history.safetensors")


def test_history_holds_the_coefficients_at_each_step(parts, tmp_path):
    history = History(str(tmp_path), every=2)
    module = fit(parts, tmp_path, 7, history)
    arrays, names = read(tmp_path)
    assert arrays["steps"].tolist() == [0, 2, 4, 6, 7]
    assert names["tasks"] == list(module.tasks) and names["groups"] == list(module.coefficients.groups)
    assert np.array_equal(arrays["coefficients"][-1], module.coefficients().detach().numpy())
    assert np.allclose(arrays["coefficients"][0], 0.3)
    assert (
        np.isnan(arrays["throughput"][0]) and (arrays["throughput"][1:] > 0).all() and (arrays["memory"] > 2**20).all()
    )


def test_a_resumed_run_goes_on_with_its_history(parts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(parts, whole, 12, History(str(whole), every=2))
    # Samples after the checkpoint that is resumed from are dropped and taken again.
    fit(parts, cut, 9, History(str(cut), every=2))
    checkpoint = torch.load(cut / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5 and read(cut)[0]["steps"].tolist() == [0, 2, 4, 6, 8, 9]
    fit(parts, cut, 12, History(str(cut), every=2), resume=cut / "last.ckpt")
    first, second = read(whole)[0], read(cut)[0]
    assert first["steps"].tolist() == second["steps"].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert np.array_equal(first["coefficients"], second["coefficients"])


def test_a_history_of_other_tasks_is_not_mixed_in(parts, tmp_path, caplog):
    fit(parts, tmp_path, 6, History(str(tmp_path), every=2))
    arrays, names = read(tmp_path)
    metadata = {key: json.dumps(value) for key, value in (names | {"tasks": ["x", "y", "z"]}).items()}
    save_tensors(tmp_path / "history.safetensors", {k: torch.from_numpy(v) for k, v in arrays.items()}, metadata)
    with caplog.at_level(logging.WARNING):
        fit(parts, tmp_path, 8, History(str(tmp_path), every=2), resume=tmp_path / "last.ckpt")
    assert "other tasks" in caplog.text and read(tmp_path)[0]["steps"].tolist() == [5, 6, 8]


def test_the_number_of_samples_is_bounded(parts, tmp_path):
    history = History(str(tmp_path), every=1, limit=8)
    fit(parts, tmp_path, 40, history)
    steps = read(tmp_path)[0]["steps"].tolist()
    assert len(steps) <= 9 and steps[0] == 0 and steps[-1] == 40 and steps == sorted(set(steps))
    fit(parts, tmp_path, 40, History(str(tmp_path), limit=10))
    assert read(tmp_path)[0]["steps"].tolist() == list(range(0, 41, 5))
    with pytest.raises(am.InputError):
        History(every=0)


def test_watching_does_not_change_what_is_learned(parts, tmp_path):
    module, stream = parts()
    pl.Trainer(max_steps=6, logger=False, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET).fit(
        module, stream
    )
    watched, stream = parts()
    trainer = pl.Trainer(
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        callbacks=watchers(progress=False),
        default_root_dir=tmp_path,
        **QUIET,
    )
    trainer.fit(watched, stream)
    assert torch.equal(module.coefficients(), watched.coefficients())


def test_diagnostics_come_from_the_scoring_passes(parts, tmp_path):
    module, stream = parts()
    keeper = Diagnostics(str(tmp_path), images=10, cross=True)
    trainer = pl.Trainer(max_steps=2, logger=False, enable_checkpointing=False, callbacks=[keeper], **QUIET)
    trainer.fit(module, stream)
    scores = am.score(trainer, module, stream)
    arrays, names = read_tensors(tmp_path / "diagnostics.safetensors")
    assert names["tasks"] == list(module.tasks)
    for place, task in enumerate(module.tasks):
        for view in ("individual", "initial", "adapted"):
            assert arrays[f"correct.{view}.{place}"].mean() == pytest.approx(scores[view][task], abs=1e-6)
            assert arrays[f"features.{view}.{place}"].shape == (10, 6)
    assert np.allclose(arrays["cosine"].diagonal(), 1) and np.allclose(arrays["cosine"], arrays["cosine"].T)
    assert arrays["distance.initial"].shape == (3,) and (arrays["distance.initial"] > 0).all()
    own = [arrays[f"correct.individual.{place}"][:2].mean() for place in range(3)]
    assert np.allclose(arrays["cross"].diagonal(), own)


def test_diagnostics_leave_other_modules_alone(tmp_path):
    keeper = Diagnostics(str(tmp_path))
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, **QUIET)
    trainer.state.fn = "validate"
    keeper.on_validation_batch_end(trainer, pl.LightningModule(), None, {}, 0)
    assert not keeper._kept


def test_throughput_leaves_validation_out():
    times = iter([0.0, 10.0, 14.0, 20.0])
    rate = Rate(lambda: next(times))
    rate.add(160)
    rate.pause()
    rate.resume()
    assert rate.read() == 160 / 16


def test_watchers_respect_what_the_user_gave():
    mine = History(every=7)
    kinds = [type(one).__name__ for one in watchers([mine])]
    assert kinds == ["History", "Dashboard", "Diagnostics", "Progress"] and watchers([mine])[0] is mine
    assert not any(isinstance(one, Progress) for one in watchers(progress=False))
    assert sum(isinstance(one, Progress) for one in watchers([Progress()])) == 1


def test_no_temporary_file_is_left(parts, tmp_path):
    fit(parts, tmp_path, 3, History(str(tmp_path)))
    assert [path.name for path in tmp_path.glob(".*")] == []
    with safe_open(tmp_path / "history.safetensors", framework="pt") as file:
        assert file.get_tensor("coefficients").dtype == torch.float32
