"""Two numbers a task: the merge, its gradients, its files, and that it runs as the other linear rules do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.merge import Layout, placement

BLOCKS = ("blocks.0", "blocks.1")


def straight(bank, line):
    """The merge as an ordinary graph: a outside the blocks and in the first one, a + b in the last."""
    merged = {}
    for name, shape, part in zip(bank.names, bank.layout.shapes, bank.layout.slices):
        scale = line[:, 0] + (line[:, 1] if name.startswith("blocks.1.") else 0)
        merged[name] = (bank.pretrained[part] + scale @ bank.vectors[:, part]).view(shape)
    return merged


@pytest.mark.parametrize("kind", ["resident", "streamed", "sharded"])
def test_its_merge_and_gradient_are_those_of_a_plain_graph(toy, bank, kind, monkeypatch):
    monkeypatch.setattr(placement, "PIECE", 50)
    backbone = am.MergedBackbone(toy, bank, am.DepthWise([0.1, 0.3, -0.2], slope=0.4), kind)
    backbone.placement.open(0, 1)
    line = torch.tensor([[0.1, 0.4], [0.3, 0.4], [-0.2, 0.4]]).requires_grad_()
    for name, value in straight(bank, line).items():
        torch.testing.assert_close(backbone.merge()[name], value)
    x = torch.randn(5, 3, 4, 4)
    backbone(x).square().sum().backward()
    functional_call(toy, straight(bank, line), (x,)).square().sum().backward()
    torch.testing.assert_close(backbone.coefficients.line.grad, line.grad, atol=1e-4, rtol=1e-4)
    assert line.grad.abs().min() > 1e-3


def test_it_is_lines_where_a_and_b_are_its(bank):
    rule = am.DepthWise(0.2, slope=0.5).bind(bank)
    scaled = am.LiNeS(b=0.5, a=0.2)(bank).vectors
    for column, part in zip(rule.group_of, bank.layout.slices):
        torch.testing.assert_close(rule()[:, column, None] * bank.vectors[:, part], scaled[:, part])
    assert rule.groups == ("outside", *BLOCKS) and rule.table()["red"]["blocks.1"] == pytest.approx(0.7)


def test_starts(bank):
    assert am.DepthWise("metagpt").bind(bank).line[:, 0].tolist() == am.Fixed("metagpt").bind(bank)().flatten().tolist()
    assert not am.DepthWise(0.1).bind(bank).line[:, 1].any()
    with pytest.raises(am.InputError, match="is no line in depth"):
        am.DepthWise("layerwise_metagpt").bind(bank)
    flat = am.TaskVectors(("a",), Layout(("weight",), ((2,),)), torch.ones(2), torch.ones(1, 2), {})
    with pytest.raises(am.InputError, match="no parameter name has a number"):
        am.DepthWise().bind(flat)


def configuration(folder, work, **model):
    part = {"recipe": "line", "coefficients": {"class_path": "DepthWise"}, "lr": 0.02} | model
    content = {"suite": {"name": str(folder)}, "model": part, "data": {"images_per_task": 4, "start_images": 8}}
    content["trainer"] = {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False}
    (work / "run.yaml").write_text(json.dumps(content))
    return "run.yaml"


def test_a_run_and_its_files(suite_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration(suite_folder, tmp_path)
    assert main(["fit", "--config", config, "--trainer.max_steps=3"]) == 0
    assert main(["fit", "--config", config, "--run.if_exists=resume", "--run.report=false"]) == 0
    assert main(["fit", "--config", config, "--run.name=whole", "--run.report=false"]) == 0
    resumed, whole = (
        json.loads((tmp_path / f"runs/{name}/coefficients.json").read_text()) for name in ("line", "whole")
    )
    assert resumed["coefficients"] == whole["coefficients"]
    table = resumed["coefficients"]["red"]
    assert table["outside"] == table["transformer.resblocks.0"] != 0.3
    # A run that starts where it ended: from the table by block, the line through it.
    learned = torch.load("runs/whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    (line,) = [value for name, value in learned.items() if name.endswith("line")]
    bank = am.load_suite(str(suite_folder)).task_vectors
    torch.testing.assert_close(am.DepthWise("runs/whole").bind(bank).line.detach(), line, atol=1e-6, rtol=0)
    assert main(["export", "runs/whole", "--format", "safetensors", "--output", "out", "--verify"]) == 0
    module = am.AdaptiveMerge(bank, *parts(suite_folder), coefficients=am.DepthWise(), lr=0.02)
    am.load_adapters(module, "out/adapters.safetensors")
    assert torch.equal(module.coefficients.line, line)
    exported = load_file("out/model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in module.merged_state_dict().items())


def parts(folder):
    suite = am.load_suite(str(folder))
    return suite.backbone, suite.heads


def test_two_transforms_a_start_and_a_rule_in_one_file(suite_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transforms = [{"class_path": "LayerDrop", "init_args": {"share": 0.1}}, "TSVM"]
    line = {"class_path": "DepthWise", "init_args": {"init": "published"}}
    config = configuration(
        suite_folder, tmp_path, transforms=transforms, coefficients=line, start="CompensatedRegression"
    )
    assert main(["fit", "--config", config, "--suite.banks=banks", "--run.report=false"]) == 0
    results = json.loads((tmp_path / "runs/line/results.json").read_text())
    assert set(results["average"]) == {"pretrained", "individual", "anchor", "initial", "adapted"}
    assert len(list((tmp_path / "banks").glob("transformed-*"))) == 1
    learned = json.loads((tmp_path / "runs/line/coefficients.json").read_text())["coefficients"]["red"]
    # From 0 around the start, in a line.
    values = [
        learned[f"transformer.resblocks.{index}"] for index in range(sum(".resblocks." in key for key in learned))
    ]
    steps = [after - before for before, after in zip(values, values[1:])]
    assert 0 < abs(values[0]) < 0.2 and steps == pytest.approx([steps[0]] * len(steps), abs=1e-6)
