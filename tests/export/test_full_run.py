"""From checkpoints and data sets on disk to exports, through the command line, at the true size of ViT-B/32."""

from __future__ import annotations

import importlib.util
import json

import open_clip
import pytest
import torch
import yaml
from data.data_sets import WRITERS
from safetensors import safe_open

from adaptive_merge.__main__ import main
from adaptive_merge.export import load_adapters
from adaptive_merge.weights import read_weights
from adaptive_merge.weights.clip import read_architecture

TASKS = {"MNIST": 10, "EuroSAT": 10}
NEEDS = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def write_checkpoints(folder):
    """A random pre-trained tower and two experts near it, as state dicts, with the published layout's head files."""
    architecture = read_architecture("ViT-B-32-quickgelu")
    torch.manual_seed(0)
    tower = open_clip.transformer.VisionTransformer(
        *(224, 32, 768, 12, 12, 4.0), output_dim=architecture.embed_dim, act_layer=open_clip.transformer.QuickGELU
    )
    state = {f"visual.{name}": value.detach() for name, value in tower.state_dict().items()}
    torch.save(state, folder / "zeroshot.pt")
    for task, classes in TASKS.items():
        (folder / task).mkdir()
        moved = {name: value + 0.002 * torch.randn_like(value) for name, value in state.items()}
        torch.save(moved, folder / task / "finetuned.pt")
        head = 100 * torch.nn.functional.normalize(torch.randn(classes, architecture.embed_dim), dim=-1)
        torch.save({"weight": head, "bias": torch.zeros(classes)}, folder / f"head_{task}.pt")


@pytest.mark.slow
def test_adamerging_of_two_clip_experts_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    write_checkpoints(tmp_path / "weights")
    for task in TASKS:
        WRITERS[task](tmp_path / "data")
    suite = {
        "kind": "clip",
        "architecture": "ViT-B-32-quickgelu",
        "pretrained": "weights/zeroshot.pt",
        "experts": "weights/{task}/finetuned.pt",
        "heads": "weights/head_{task}.pt",
        "tasks": list(TASKS),
        "sizes": "any",
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    config = {
        "suite": {"name": "."},
        "model": {"recipe": "clip", "coefficients": {"class_path": "LayerWise"}, "objective": "Entropy"},
        "data": {"images_per_task": 4},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(config))
    assert main(["data", "check", "--config", "clip.yaml"]) == 0
    assert main(["fit", "--config", "clip.yaml"]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "runs" / "clip" / "results.json").read_text())
    assert results["steps"] == 2 and results["trainable_parameters"] == 2 * 152 and set(results["tasks"]) == set(TASKS)
    installed = [
        format
        for format in ("safetensors", "open_clip", "hf", "onnx")
        if all(importlib.util.find_spec(package) for package in NEEDS.get(format, ()))
    ]
    for format in installed:
        arguments = ["export", "runs/clip", "--format", format, "--output", f"out/{format}", "--verify"]
        assert main(arguments) == 0, capsys.readouterr().err
        assert "on 32 images" in capsys.readouterr().out
        assert "| MNIST | 6 |" in (tmp_path / "out" / format / "README.md").read_text()
    _check_round_trip(tmp_path)


def _check_round_trip(folder):
    from adaptive_merge.cli.loading import load_run

    module = load_run("runs/clip")
    weights = read_weights(folder / "out" / "open_clip")
    wanted = module.merged_state_dict()
    assert all(torch.equal(weights.tensors[name], value) for name, value in wanted.items())
    learned = module.coefficients.values.detach().clone()
    path = folder / "out" / "open_clip" / "adapters.safetensors"
    with torch.no_grad():
        module.coefficients.values.fill_(0.3)
    assert not torch.equal(module.coefficients.values, learned)
    load_adapters(module, path)
    assert torch.equal(module.coefficients.values, learned) and path.stat().st_size < 40_000
    with safe_open(path, framework="pt") as file:
        assert {f"coefficients.{task}" for task in TASKS} <= set(file.keys())
