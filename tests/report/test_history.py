import json
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open

import adaptive_merge as am
from adaptive_merge.adapters.heads import frozen_heads
from adaptive_merge.callbacks import Diagnostics, History, watchers
from adaptive_merge.callbacks.record.rate import Rate
from adaptive_merge.callbacks.show.progress import Progress
from adaptive_merge.engine.scoring import TaskScore
from adaptive_merge.engine.views import gain, percent
from adaptive_merge.files import save_tensors
from adaptive_merge.report.feature_figures import calibration_error
from adaptive_merge.runs.reading import read_tensors
from adaptive_merge.runs.results import evaluate

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
    # A quarter of the kept images, spread over them.
    own = [arrays[f"correct.individual.{place}"][arrays[f"sample.{place}"]][[0, 9]].mean() for place in range(3)]
    assert np.allclose(arrays["cross"].diagonal(), own) and arrays["crossed"].tolist() == [2, 2, 2]


def test_the_sample_is_drawn_from_all_images_by_the_seed(parts, tmp_path):
    """A data set in the order of its classes: the first images would be one class."""
    samples = []
    for number, seed in enumerate((0, 0, 1)):
        module, stream = parts()
        stream.seed = seed
        for images in stream.images.values():
            images.labels = images.labels.sort().values
        keeper = Diagnostics(str(tmp_path / str(number)), images=8, cross=True)
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[keeper], **QUIET)
        stream.eval_batch_size = 5
        am.score(trainer, module, stream)
        arrays, _ = read_tensors(tmp_path / str(number) / "diagnostics.safetensors")
        for place, task in enumerate(module.tasks):
            rows, labels = arrays[f"sample.{place}"], arrays[f"label.adapted.{place}"]
            assert len(rows) == 8 and sorted(set(rows.tolist())) == rows.tolist() and rows.max() < len(labels)
            pixels = stream.images[task].take(torch.from_numpy(rows))
            weights = module.views.weights("adapted", task)
            features = module.model(task, pixels, weights).features.detach().half().numpy()
            assert np.allclose(features, arrays[f"features.adapted.{place}"], atol=2e-2)
            if len(set(labels.tolist())) > 2:
                assert len(set(labels[rows].tolist())) > 1
        samples.append([arrays[f"sample.{place}"].tolist() for place in range(3)])
    assert samples[0] == samples[1] != samples[2]
    assert samples[0] != [list(range(8))] * 3


@pytest.mark.parametrize(
    "share, shown",
    [(0.7315, 73.2), (float(np.float32(0.7315)), 73.2), (0.73149, 73.1), (0.885, 88.5), (1.0, 100.0), (0.0, 0.0),
     (0.00049, 0.0), (0.0005, 0.1), (np.float32(0.0005), 0.1), (0.99949, 99.9), (0.9995, 100.0), (2 / 3, 66.7)],
)  # fmt: skip
def test_a_share_is_shown_as_one_number(share, shown):
    assert percent(share) == shown


@pytest.mark.parametrize(
    "after, before, shown", [(0.905, 0.885, 2.0), (0.90499, 0.8851, 2.0), (0.5, 0.5, 0.0), (0.4, 0.5, -10.0)]
)
def test_a_gain_is_the_difference_of_what_is_shown(after, before, shown):
    assert gain(after, before) == shown == round(percent(after) - percent(before), 1)


def test_there_is_one_calibration_error(parts, tmp_path):
    module, stream = parts()
    keeper = Diagnostics(str(tmp_path), images=10)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[keeper], **QUIET)
    found = evaluate(trainer, module, stream)
    arrays, _ = read_tensors(tmp_path / "diagnostics.safetensors")
    for view in ("individual", "initial", "adapted"):
        for place, task in enumerate(module.tasks):
            drawn = calibration_error(arrays[f"confidence.{view}.{place}"], arrays[f"correct.{view}.{place}"])
            assert drawn == pytest.approx(found[view][task]["ece"], abs=1e-5)


@pytest.mark.parametrize("edge", [1 / 15, 2 / 15, 0.4, 0.6, 1.0])
def test_a_confidence_on_the_edge_of_a_bin_falls_into_the_same(edge):
    score = TaskScore(frozen_heads({"a": torch.eye(2)}, ["a"], 2)["a"])
    edge = max(edge, 0.5)
    logits = torch.tensor([[float(np.log(edge / max(1 - edge, 1e-30))), 0.0]] * 3 + [[0.2, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])
    score.update(am.Prediction(logits, logits), labels)
    confidence = logits.softmax(-1).amax(-1)
    correct = (logits.argmax(-1) == labels).float()
    assert calibration_error(confidence.numpy(), correct.numpy()) == pytest.approx(
        float(score.compute()["ece"]), abs=1e-6
    )


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
