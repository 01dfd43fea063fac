"""A rule that is no table of coefficients: a user's mask with a logit per entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TASKS
from safetensors.torch import load_file
from torch.func import functional_call
from user_rule import ConcreteMask

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.merge import placement

TESTS = Path(__file__).resolve().parents[1]


def straight(bank, logits, scale=0.3, temperature=0.5):
    """The mask's merge as an ordinary graph, tensor by tensor."""
    merged, total = {}, bank.vectors.sum(0)
    for name, shape, part in zip(bank.names, bank.layout.shapes, bank.layout.slices):
        mask = torch.sigmoid(logits[part] / temperature)
        merged[name] = (bank.pretrained[part] + scale * total[part] * mask / mask.mean()).view(shape)
    return merged


@pytest.mark.parametrize("kind", ["resident", "streamed", "sharded"])
def test_its_merge_and_gradient_are_those_of_a_plain_graph(toy, bank, kind, monkeypatch):
    monkeypatch.setattr(placement, "PIECE", 50)
    backbone = am.MergedBackbone(toy, bank, ConcreteMask(), kind).eval()
    backbone.placement.open(0, 1)
    with torch.no_grad():
        backbone.coefficients.logits.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 3, 4, 4)
    backbone(x).square().sum().backward()
    logits = backbone.coefficients.logits.detach().clone().requires_grad_()
    functional_call(toy, straight(bank, logits), (x,)).square().sum().backward()
    torch.testing.assert_close(backbone.coefficients.logits.grad, logits.grad, atol=1e-4, rtol=1e-4)
    assert logits.grad.abs().max() > 1e-3


def test_joint_and_per_task_learn_the_same(toy, bank, heads, images):
    learned = []
    for accumulate in ("joint", "per_task"):
        module = am.AdaptiveMerge(
            bank, toy, heads, coefficients=ConcreteMask(), objective=am.Entropy(), lr=0.05, accumulate=accumulate
        )
        fit(module, images)
        learned.append(module.coefficients.logits.detach().clone())
        assert module.learned[0] is module.coefficients.logits and module.coefficients.table() is None
    torch.testing.assert_close(*learned, atol=1e-5, rtol=0)
    assert learned[0].abs().max() > 0.05


def test_evaluation_draws_nothing(toy, bank, heads):
    module = am.AdaptiveMerge(bank, toy, heads, coefficients=ConcreteMask()).eval()
    first, second = module.merged_state_dict(), module.merged_state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(module.coefficients.draws) == 0


def fit(module, images, steps=6):
    import pytorch_lightning as pl

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=am.TaskStream(images, 8))


CONFIG = """
model:
  recipe: masked
  coefficients: {class_path: user_rule.ConcreteMask, init_args: {scale: 0.4}}
  lr: 0.05
data: {images_per_task: 4}
suite: {name: FOLDER}
run: {guard: 'off'}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TESTS))
    Path("masked.yaml").write_text(CONFIG.replace("FOLDER", str(suite_folder)))
    return tmp_path


def command(*arguments):
    return main([*arguments, "--allow-import", "user_rule"])


def checkpoint_values(folder):
    from adaptive_merge.runs.checkpoint import read_checkpoint

    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_users_rule_from_yaml_to_export(work, suite_folder, capsys):
    assert command("fit", "--config", "masked.yaml") == 0
    folder = Path("runs/masked")
    results = json.loads((folder / "results.json").read_text())
    assert results["trainable_parameters"] == 905_536
    assert set(results["tasks"]) == set(TASKS) and (folder / "report.html").is_file()
    assert not (folder / "coefficients.json").exists()
    assert command("merge", str(folder), "--output", "merged.safetensors") == 0
    merged = load_file("merged.safetensors")
    values = checkpoint_values(folder)
    bank = am.load_suite(str(suite_folder)).task_vectors
    expected = straight(bank, values["model.backbone.coefficients.logits"], scale=0.4)
    assert max((merged[name] - value).abs().max().item() for name, value in expected.items()) < 1e-6
    assert command("export", str(folder), "--format", "safetensors", "--output", "exported", "--verify") == 0


def test_a_users_rule_resumes_to_the_same_bits(work):
    assert command("fit", "--config", "masked.yaml", "--run.name", "whole") == 0
    assert command("fit", "--config", "masked.yaml", "--run.name", "parts", "--trainer.max_steps", "2") == 0
    again = ("fit", "--config", "masked.yaml", "--run.name", "parts", "--run.if_exists", "resume")
    assert command(*again) == 0
    whole, parts = checkpoint_values(Path("runs/whole")), checkpoint_values(Path("runs/parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert command(*again, "--model.coefficients.init_args.temperature", "0.6") == 2
