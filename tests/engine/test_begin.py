"""A start before the first step: solved from the stream, kept by the run, gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.results import evaluate

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def module_of(bank, toy, heads, **settings):
    settings = {"coefficients": am.LayerWise(0.3, bounds="free"), "objective": am.PseudoLabel(soft=True)} | settings
    return am.AdaptiveMerge(bank, toy, heads, start=am.CompensatedRegression(0.05), lr=0.01, **settings)


def fit(module, images, steps=4, **stream):
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=am.TaskStream(images, 8, **{"start_images": 12} | stream))
    return trainer


def test_learning_goes_on_from_the_solution(toy, bank, heads, images):
    module = module_of(bank, toy, heads)
    fit(module, images, steps=0)
    weights = bank.layout.unflatten(module.begun.weights)
    assert all(torch.equal(module.merged_state_dict()[name], value) for name, value in weights.items())
    anchor = am.TaskVectors(bank.tasks, bank.layout, module.begun.anchor, bank.vectors, {}).layout
    assert anchor == bank.layout and not torch.equal(module.begun.anchor, module.begun.weights)
    torch.testing.assert_close(module.begun.anchor, bank.pretrained + 0.3 * bank.vectors.sum(0), atol=1e-6, rtol=0)
    fit(module, images)
    # θ = θ* + Σ λ (θₜ − θ*), the experts as they were.
    coefficients = module.coefficients().detach()
    assert coefficients.abs().max() > 1e-3
    experts = bank.pretrained + bank.vectors
    for column, (name, part) in enumerate(zip(bank.names, bank.layout.slices)):
        start = module.begun.weights[part]
        merged = start + coefficients[:, column] @ (experts[:, part] - start)
        torch.testing.assert_close(module.merged_state_dict()[name].flatten(), merged, atol=1e-5, rtol=1e-5)


def test_all_views_are_scored(toy, bank, heads, images):
    module = module_of(bank, toy, heads)
    fit(module, images)
    scores = evaluate(pl.Trainer(accelerator="cpu", **QUIET), module, am.TaskStream(images))
    assert list(scores) == ["pretrained", "individual", "anchor", "initial", "adapted"]
    plain = am.AdaptiveMerge(bank, toy, heads, coefficients=am.LayerWise(0.3))
    before = evaluate(pl.Trainer(accelerator="cpu", **QUIET), plain, am.TaskStream(images))
    assert scores["anchor"] == before["initial"] and scores["pretrained"] == before["pretrained"]
    assert scores["individual"] == before["individual"]


@pytest.mark.parametrize("protocol", [am.Holdout(), am.Online(), am.Unseen(["blue"])])
def test_only_what_the_protocol_gives_is_looked_at(toy, bank, heads, images, protocol):
    """Every image that the protocol keeps for scoring, or that comes later, may be another: the start is the same."""
    stream = am.TaskStream(images, 8, protocol=protocol, start_images=6, seed=3)
    solutions = []
    for change in (False, True):
        pixels = {task: source.pixels.clone() for task, source in images.items()}
        for task in images if change else ():
            kept = torch.ones(len(images[task]), dtype=torch.bool)
            if task not in protocol.unseen:
                kept[stream.opening(task)] = False
            pixels[task][kept] = 255 - pixels[task][kept]
        changed = {task: am.Images(pixels[task], s.labels.flip(0), s.classes) for task, s in images.items()}
        module = module_of(bank, toy, heads, unseen=protocol.unseen)
        fit(module, changed, steps=0, protocol=protocol, start_images=6, seed=3)
        solutions.append(module.begun.weights)
    assert torch.equal(*solutions)


def test_what_cannot_go_on_from_a_start_is_refused_at_once(toy, bank, heads):
    with pytest.raises(am.InputError, match="bounds: free"):
        module_of(bank, toy, heads, coefficients=am.LayerWise(0.3))

    class Own(am.LayerWise):
        rebase = am.Rule.rebase

    with pytest.raises(am.InputError, match="Own cannot go on from a start"):
        module_of(bank, toy, heads, coefficients=Own(0.3, bounds="free"))


def test_a_start_needs_a_stream(toy, bank, heads, images):
    stream = am.TaskStream(images, 8)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", **QUIET)
    with pytest.raises(am.InputError, match="TaskStream as its datamodule"):
        trainer.fit(module_of(bank, toy, heads), stream.train_dataloader())


CONFIG = """
model:
  recipe: begun
  transforms: [TSVM]
  coefficients: {class_path: LayerWise, init_args: {init: 1.0, bounds: free}}
  start: {class_path: CompensatedRegression, init_args: {strength: 0.1}}
  objective: Entropy
  lr: 0.01
data: {images_per_task: 4, start_images: 10}
suite: {name: FOLDER}
run: {guard: 'off', report: false}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    Path("begun.yaml").write_text(CONFIG.replace("FOLDER", str(suite_folder)))
    return tmp_path


def state_of(name):
    return read_checkpoint(Path("runs") / name / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_run_keeps_its_start_and_goes_on_to_the_same_bits(work, capsys):
    assert main(["fit", "--config", "begun.yaml", "--run.name", "whole"]) == 0
    results = json.loads(Path("runs/whole/results.json").read_text())
    assert results["start"]["kind"] == "CompensatedRegression" and results["start"]["images"]["red"] == 10
    assert {"anchor", "initial", "adapted"} <= results["average"].keys()
    assert main(["fit", "--config", "begun.yaml", "--run.name", "parts", "--trainer.max_steps", "2"]) == 0
    kept = Path("runs/parts/start.safetensors").read_bytes()
    again = ["fit", "--config", "begun.yaml", "--run.name", "parts", "--run.if_exists", "resume"]
    assert main(again) == 0 and Path("runs/parts/start.safetensors").read_bytes() == kept
    whole, parts = state_of("whole"), state_of("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert main(["merge", "runs/parts", "--output", "merged.safetensors"]) == 0
    assert len(load_file("merged.safetensors")) == 61
    capsys.readouterr()
    assert main([*again, "--data.start_images", "9"]) == 2
    assert "start was solved with another choice of images" in capsys.readouterr().err
    assert main(["merge", "begun.yaml", "--force"]) == 2
    assert "has a start, which is solved from images" in capsys.readouterr().err


def test_results_without_a_checkpoint_are_not_resumed_over(work, capsys):
    assert main(["fit", "--config", "begun.yaml", "--trainer.max_steps", "0"]) == 0
    folder = Path("runs/begun")
    (folder / "checkpoints" / "last.ckpt").unlink()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["fit", "--config", "begun.yaml", "--run.if_exists", "resume"]) == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_start_is_refused(work, capsys):
    assert main(["fit", "--config", "begun.yaml", "--trainer.max_steps", "0"]) == 0
    path = Path("runs/begun/start.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert main(["merge", "runs/begun"]) == 2
    assert "its digest does not fit its content" in capsys.readouterr().err
