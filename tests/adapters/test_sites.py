"""Adapters that work on submodules: a user's router, which does not know the task."""

from __future__ import annotations

import json

import pytest
import torch
from fitting import fit
from safetensors.torch import load_file
from torch import nn
from users_method import Router

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.runs.checkpoint import read_checkpoint

CONFIG = """
model:
  recipe: routed
  coefficients: {class_path: Fixed, init_args: {init: 0.3}}
  adapters: [{class_path: users_method.Router, init_args: {hidden: 3}}]
  adapter_lr: 0.05
trainer: {accelerator: cpu, enable_progress_bar: false}
data: {images_per_task: 2}
"""
ALLOW = ["--allow-import", "users_method"]


class Shift(am.Adapter):
    """Adds a vector to the output of a submodule: the task's own, or one for all."""

    def __init__(self, shared, site="blocks.0"):
        super().__init__()
        self.needs_task, self.site = not shared, site

    def create(self, backbone, heads):
        self.shift = nn.ParameterList(torch.zeros(8) for _ in self.tasks)

    def sites(self, backbone, weights):
        return {self.site: lambda task, tokens, output: output + self.shift[self.row(task) if task else 0]}


@pytest.fixture
def suite(suite_folder):
    return am.load_suite(str(suite_folder))


def build(suite, coefficients=None, **settings):
    torch.manual_seed(0)
    parts = (suite.task_vectors, suite.backbone, suite.heads)
    return am.AdaptiveMerge(*parts, coefficients=coefficients, adapters=[Router(3)], adapter_lr=0.05, **settings)


@pytest.mark.parametrize("coefficients", [am.Fixed, am.LayerWise])
def test_one_forward_of_all_tasks_learns_what_one_after_the_other_does(suite, coefficients, monkeypatch):
    learned, forwards = {}, {}
    for accumulate in ("joint", "per_task"):
        module = build(suite, coefficients(0.3), accumulate=accumulate)
        batches = forwards[accumulate] = []
        run = module.model.backbone.forward
        monkeypatch.setattr(
            module.model.backbone, "forward", lambda x, *a, run=run, seen=batches: seen.append(len(x)) or run(x, *a)
        )
        fit_quietly(module, suite, steps=3)
        learned[accumulate] = module.state_dict()
    assert forwards == {"joint": [6] * 3, "per_task": [2] * 9}
    for name, value in learned["joint"].items():
        torch.testing.assert_close(value, learned["per_task"][name], rtol=1e-4, atol=1e-5)
    assert all(learned["joint"][f"model.adapters.0.up.{block}.weight"].count_nonzero() for block in range(4))


def fit_quietly(module, suite, steps):
    import pytorch_lightning as pl

    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **silent)
    trainer.fit(module, train_dataloaders=am.TaskStream(suite.images, images_per_task=2).train_dataloader())


def test_a_router_starts_as_the_merge_and_mixes_experts_image_by_image(suite):
    module, x = build(suite, am.Fixed(0.0)), suite.images["red"].take(torch.arange(4))
    pretrained = module.model("red", x, adapted=False).features
    torch.testing.assert_close(module.model("red", x).features, pretrained, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in module.model.adapters[0].up:
            layer.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    expert = dict(module.model.backbone.merge())
    expert |= {name: value + suite.task_vectors.of(name)[0] for name, value in expert.items() if ".mlp." in name}
    wanted = module.model("red", x, expert, adapted=False).features
    torch.testing.assert_close(module.model("red", x).features, wanted, rtol=1e-4, atol=1e-4)


def test_features_of_a_fixed_merge_are_kept_only_without_sites(toy, bank, heads, images):
    for adapters, kept in (([am.FeatureSurgery(2)], True), ([Shift(True)], False), ([Shift(False)], False)):
        module = am.AdaptiveMerge(bank, toy, heads, adapters=adapters)
        index = torch.arange(3)
        part = {"image": images["red"].take(index), "index": index}
        assert (module.views.features("red", part, images["red"]) is not None) == kept


def test_sites_know_the_task_unless_they_say_that_they_do_not(toy, bank, heads, images):
    x = images["red"].take(torch.arange(3))
    for shared in (True, False):
        module = am.AdaptiveMerge(bank, toy, heads, adapters=[Shift(shared)])
        assert module.model.shares_tower == shared
        with torch.no_grad():
            module.model.adapters[0].shift[1].fill_(1.0)
            features = [[module.model(t, x, adapted=a).features for a in (True, False)] for t in heads]
        assert [torch.equal(*pair) for pair in features] == [True, shared, True]


def test_sites_under_another_adapter_see_its_edits_in_order(toy, bank, heads, images):
    module = am.AdaptiveMerge(bank, toy, heads, adapters=[Shift(True), Shift(True), am.BlockSurgery(2)])
    x = images["red"].take(torch.arange(3))
    with torch.no_grad():
        plain = module.model("red", x, adapted=False, blocks=True).blocks[0]
        for adapter in list(module.model.adapters)[:2]:
            adapter.shift[0].fill_(1.0)
        said = module.model("red", x, blocks=True)
    assert len(said.blocks) == 2
    torch.testing.assert_close(said.blocks[0], plain + 2)


def test_an_unknown_submodule_is_answered_with_the_nearest(toy, bank, heads, images):
    module = am.AdaptiveMerge(bank, toy, heads, adapters=[Shift(True, "blocks.O")])
    with pytest.raises(
        am.InputError, match="no submodule 'blocks.O' for an adapter's site; did you mean 'blocks.[01]'"
    ):
        fit(module, images, steps=1)


def test_a_users_router_works_from_yaml_to_export(tmp_path, monkeypatch, suite_folder, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routed.yaml").write_text(f"suite: {{name: {suite_folder}}}" + CONFIG)
    command = ["fit", "--config", "routed.yaml", *ALLOW, "--trainer.max_steps"]
    assert main([*command, "3", "--run.name", "whole"]) == 0
    assert main([*command, "2", "--run.report", "false"]) == 0
    assert main([*command, "3", "--run.if_exists", "resume"]) == 0
    states = [read_checkpoint(f"runs/{name}/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "routed")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[0]["model.adapters.0.up.0.weight"].count_nonzero()
    results = json.loads((tmp_path / "runs" / "routed" / "results.json").read_text())
    assert results["trainable_parameters"] == 4 * (128 * 3 + 3 + 3 * 3 + 3)
    assert "users_method.Router" in (tmp_path / "runs" / "routed" / "report.html").read_text()
    assert main(["merge", "runs/routed", "--output", "merged.safetensors", *ALLOW]) == 0
    merged = am.TaskArithmetic(*_parts(suite_folder)).merged_state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in load_file("merged.safetensors").items())
    capsys.readouterr()
    for task in ([], ["--task", "red"]):
        arguments = ["export", "runs/routed", "--format", "safetensors", "--output", "out", *task, *ALLOW]
        assert main(arguments) == 2
        assert "Router changes submodules, features or logits by code of its own" in capsys.readouterr().err
    assert main(["fit", "--config", "routed.yaml", "--trainer.max_steps", "1"]) == 2


def _parts(folder):
    suite = am.load_suite(str(folder))
    return suite.task_vectors, suite.backbone, suite.heads


class Doubled(am.Adapter):
    """Runs in place of a linear layer: twice its input."""

    replaces, needs_task = True, False

    def create(self, backbone, heads):
        pass

    def sites(self, backbone, weights):
        return {"blocks.0.1": lambda task, tokens, output: 2 * tokens if output is None else output}


def test_a_site_may_run_in_place_of_its_submodule(toy, bank, heads, images):
    module = am.AdaptiveMerge(bank, toy, heads, adapters=[Shift(True, "blocks.0.1"), Doubled()])
    x, weights = images["red"].take(torch.arange(3)), module.model.backbone.merge()
    layer = {"blocks.0.1.weight": 2 * torch.eye(8), "blocks.0.1.bias": torch.ones(8)}
    wanted = module.model("red", x, weights | layer, adapted=False).features
    with torch.no_grad():
        module.model.adapters[0].shift[0].fill_(1.0)
    unused = {name: torch.full_like(value, torch.nan) for name, value in layer.items()}
    for _ in range(2):
        torch.testing.assert_close(module.model("red", x, weights | unused).features, wanted)
    torch.testing.assert_close(module.model("red", x, weights | layer, adapted=False).features, wanted)
    twice = am.AdaptiveMerge(bank, toy, heads, adapters=[Doubled(), Doubled()])
    with pytest.raises(am.InputError, match=r"two adapters run in place of the submodule 'blocks\.0\.1'"):
        twice.model("red", x)
