"""Heads of every kind: a zero-shot classifier's weight, a linear layer, and a user's with two units an image."""

from __future__ import annotations

import json
import shutil

import pytest
import pytorch_lightning as pl
import torch
from conftest import TASKS, write_manifest
from fitting import fit
from safetensors.torch import load_file, save_file
from torch import nn
from users_method import Halves

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.adapters.heads import frozen_heads
from adaptive_merge.engine.scoring import TaskScore
from adaptive_merge.runs.checkpoint import read_checkpoint

SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.fixture
def layers(heads):
    """A linear layer with a bias for each task."""
    torch.manual_seed(5)
    return {task: nn.Linear(6, classes) for task, classes in TASKS.items()}


def test_a_tensor_is_a_cosine_and_a_linear_layer_reads_features_as_they_are(toy, bank, heads, layers, images):
    x = images["red"].take(torch.arange(5))
    mixed = am.AdaptiveMerge(bank, toy, heads | {"red": layers["red"]})
    said = mixed.model("red", x)
    assert torch.equal(said.logits, layers["red"](said.features))
    green = mixed.model("green", x)
    torch.testing.assert_close(green.logits, nn.functional.normalize(green.features, dim=-1) @ heads["green"].T)
    given = am.AdaptiveMerge(bank, toy, {task: am.CosineHead(weight) for task, weight in heads.items()})
    assert torch.equal(given("red", x), am.AdaptiveMerge(bank, toy, heads)("red", x))


def test_heads_are_frozen_copies_outside_of_every_checkpoint(toy, bank, layers, images):
    module = am.AdaMerging(bank, toy, layers)
    fit(module, images, steps=2)
    head = module.model.heads["red"]
    assert not any("head" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in head.parameters()) and head.weight.grad is None
    assert layers["red"].weight.requires_grad and torch.equal(head.weight, layers["red"].weight)
    module.half()
    assert head.weight.dtype == torch.float32
    module.to("meta")
    assert head.weight.device.type == head.bias.device.type == "meta"


def test_a_cosine_head_is_known_by_its_weight_alone_and_others_by_all_that_they_are(toy, bank, heads, layers):
    def entries(given):
        method = am.AdaMerging(bank, toy, given).method
        return {name: value for name, value in method.items() if name.startswith("head of task 'red'")}

    plain = entries(heads)
    assert list(plain) == ["head of task 'red'"] and len(plain["head of task 'red'"]) == 64
    assert entries({task: am.CosineHead(weight) for task, weight in heads.items()}) == plain
    linear, moved = entries(layers), nn.Linear(6, 3)
    moved.weight = layers["red"].weight
    assert entries({**layers, "red": moved}) != linear
    assert entries({**heads, "red": am.LinearHead(heads["red"])}) != plain


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
def test_a_tint_copies_weight_and_bias_of_a_linear_layer(toy, bank, layers, images, accumulate):
    module = am.Tinting(bank, toy, layers, accumulate=accumulate)
    x = images["green"].take(torch.arange(4))
    assert torch.equal(module("green", x), am.TaskArithmetic(bank, toy, layers)("green", x))
    fit(module, images, steps=4)
    (tint,) = module.model.adapters
    for row, task in enumerate(TASKS):
        assert not torch.equal(tint.weight[row], layers[task].weight) and not torch.equal(
            tint.bias[row], layers[task].bias
        )
    features = module.model("green", x).features
    torch.testing.assert_close(module("green", x), features @ tint.weight[1].T + tint.bias[1])


def test_a_tint_copies_the_parameters_of_a_users_head(toy, bank, images):
    torch.manual_seed(0)
    module = am.Tinting(bank, toy, {task: Halves(torch.randn(classes, 3)) for task, classes in TASKS.items()})
    before = module.model.adapters[0].weight[2].clone()
    fit(module, images, steps=2)
    assert not torch.equal(module.model.adapters[0].weight[2], before)
    with pytest.raises(am.InputError, match="tinted heads need the same parameters in all tasks"):
        plain = {task: am.LinearHead(torch.randn(classes, 6)) for task, classes in TASKS.items()}
        am.Tinting(bank, toy, plain | {"red": Halves(torch.randn(3, 3))})


@pytest.mark.parametrize(
    "objective",
    [
        am.Entropy(diversity=0.5, reliable=0.9),
        am.PseudoLabel(confident=True),
        am.ExpertDivergence(),
        am.FeatureDistance(),
    ],
)
def test_losses_are_means_over_units(toy, bank, images, objective):
    """Two units an image learn what their images would as a batch of twice as many, one task after the other or not."""
    torch.manual_seed(0)
    given = {task: Halves(4 * torch.randn(classes, 3)) for task, classes in TASKS.items()}
    learned = [
        fit(am.AdaMerging(bank, toy, given, objective=objective, accumulate=accumulate), images, steps=4)
        for accumulate in ("joint", "per_task")
    ]
    torch.testing.assert_close(*learned, rtol=1e-4, atol=1e-5)
    assert not torch.equal(learned[0][-1], torch.full_like(learned[0][-1], 0.3))


def test_scores_count_units(toy, bank, images):
    head = Halves(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    score, features = TaskScore(head), torch.tensor([[9.0, 0, 0, 0, 9, 0], [0, 9, 0, 9, 0, 0]])
    said = am.Prediction(features, head.logits(features))
    score.update(said, torch.tensor([[0, 1], [1, 1]]), said)
    values = score.compute()
    assert values["accuracy"] == 0.75 and values["agreement"] == 1.0
    assert values["ece"] == pytest.approx(0.25, abs=1e-3)
    score.reset()
    assert score.compute() == {}


def test_the_guard_and_the_ledger_take_units(toy, bank, images, tmp_path):
    module = am.AdaMerging(bank, toy, {task: Halves(torch.randn(classes, 3)) for task, classes in TASKS.items()})
    watched = [am.Guard(every=1, images=4, on_collapse="warn"), am.Ledger(str(tmp_path))]
    settings = SILENT | {"limit_val_batches": 0, "default_root_dir": tmp_path, "callbacks": watched}
    trainer = pl.Trainer(max_steps=2, enable_model_summary=False, num_sanity_val_steps=0, **settings)
    trainer.fit(module, datamodule=am.TaskStream(images, 4))
    assert watched[0].record()["checks"] > 0 and trainer.global_step == 2
    with pytest.raises(am.InputError, match="29 labels for 58 predictions"):
        pl.Trainer(**SILENT).validate(module, am.TaskStream(images))


class Fives(am.LinearHead):
    """Predicts five more than the largest class, and counts what is wrong."""

    def predict(self, logits):
        return super().predict(logits) + 5

    def metric(self):
        class Wrong(type(super().metric())):
            def compute(self):
                return 1 - super().compute()

        return Wrong()


def test_a_head_says_how_it_predicts_and_is_scored(toy, bank, layers, images):
    given = {task: Fives(layer.weight, layer.bias) for task, layer in layers.items()}
    scores = am.score(pl.Trainer(**SILENT), am.AdaMerging(bank, toy, given), am.TaskStream(images))
    plain = am.score(pl.Trainer(**SILENT), am.AdaMerging(bank, toy, layers), am.TaskStream(images))
    assert 0 < plain["initial"]["red"] < 1 and scores["initial"] == dict.fromkeys(TASKS, 1.0)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.zeros(3), "task 'red': a head .* got shape \\(3,\\)"),
        (torch.zeros(3, 5), "head of task 'red' has shape \\(3, 5\\), expected \\[classes, 6\\]"),
        (nn.Linear(7, 3), "head of task 'red' has shape \\(3, 7\\), expected \\[classes, 6\\]"),
        (torch.full((3, 6), float("nan")), "head of task 'red' holds NaN"),
        (nn.Sequential(nn.Linear(6, 3)), "head of task 'red' is a Sequential; give a tensor"),
        (None, "task 'red' has an expert but no head"),
    ],
)
def test_what_is_no_head_is_refused_by_task(heads, head, message):
    given = {task: value for task, value in ({**heads, "red": head}).items() if value is not None}
    with pytest.raises(am.InputError, match=message):
        frozen_heads(given, tuple(TASKS), 6)


@pytest.fixture
def linear_suite(tmp_path, suite_folder):
    """The small suite with linear heads."""
    folder = shutil.copytree(suite_folder, tmp_path / "suite")
    torch.manual_seed(3)
    layers = {task: nn.Linear(128, classes) for task, classes in TASKS.items()}
    tensors = {f"{task}.{name}": value for task, layer in layers.items() for name, value in layer.state_dict().items()}
    save_file(tensors, folder / "heads.safetensors")
    write_manifest(folder)
    manifest = json.loads((folder / "suite.json").read_text())
    for entry in manifest["tasks"].values():
        entry["head"] = "linear"
    (folder / "suite.json").write_text(json.dumps(manifest))
    return folder


def test_linear_heads_of_a_suite_work_from_yaml_to_export(tmp_path, monkeypatch, linear_suite, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(
        f"suite: {{name: {linear_suite}}}\n"
        "model: {recipe: quick, coefficients: {class_path: LayerWise}, adapters: [{class_path: Tint}]}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false}\n"
        "data: {images_per_task: 2}\n"
    )
    command = ["fit", "--config", "quick.yaml", "--trainer.max_steps"]
    assert main([*command, "3", "--run.name", "whole", "--run.report", "false"]) == 0
    assert main([*command, "2", "--run.report", "false"]) == 0
    assert main([*command, "3", "--run.if_exists", "resume"]) == 0
    states = [read_checkpoint(f"runs/{name}/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "quick")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {"results.json", "report.html"} <= {path.name for path in (tmp_path / "runs" / "quick").iterdir()}
    assert main(["merge", "runs/quick"]) == 0
    assert (
        main(["export", "runs/quick", "--format", "safetensors", "--output", "out", "--task", "red", "--verify"]) == 0
    )
    exported = load_file("out/heads.safetensors")
    assert torch.equal(exported["red.bias"], states[0]["model.adapters.0.bias.0"])
    assert "`features @ weight.T (+ bias)`" in (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((linear_suite / "suite.json").read_text())
    manifest["tasks"]["red"]["head"] = "round"
    (linear_suite / "suite.json").write_text(json.dumps(manifest))
    with pytest.raises(am.InputError, match="unknown kind of head 'round' of 'red'; choose cosine or linear"):
        am.load_suite(str(linear_suite))
