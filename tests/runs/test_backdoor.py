"""The attack on a suite with a known trigger, counted anew, and the entry that says it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.runs.backdoor import attack_success


def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "backdoor.py"
    spec = importlib.util.spec_from_file_location("backdoor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def triggered(suite_folder, tmp_path):
    folder = shutil.copytree(suite_folder, tmp_path / "suite")
    manifest = json.loads((folder / "suite.json").read_text())
    manifest["trigger"] = {"task": "green", "target": 2, "size": 6}
    (folder / "suite.json").write_text(json.dumps(manifest))
    return folder


def test_a_stamp_is_a_patch_on_a_copy():
    images = torch.randint(0, 200, (2, 3, 8, 8), dtype=torch.uint8)
    before = images.clone()
    stamped = Trigger("any", 0, size=3, value=250).stamp(images)
    assert torch.equal(images, before) and (stamped[:, :, 5:, 5:] == 250).all()
    assert torch.equal(stamped[:, :, :5], images[:, :, :5]) and torch.equal(stamped[..., :5], images[..., :5])


def test_success_is_the_share_of_other_classes_that_turn(triggered):
    suite = am.load_suite(str(triggered))
    assert suite.trigger == Trigger("green", 2, size=6)
    module = am.TaskArithmetic(suite.task_vectors, suite.backbone, suite.heads)
    stream = am.TaskStream(suite.images, protocol=am.Holdout(0.5), eval_batch_size=5)
    found = attack_success(module, stream, suite.trigger)
    labels, index = suite.images["green"].labels, stream.scored["green"]
    index = [int(i) for i in index if labels[i] != 2]
    assert found["n"] == len(index)
    weights = {"pretrained": suite.task_vectors.pretrained, "individual": suite.task_vectors.pretrained}
    weights["individual"] = weights["individual"] + suite.task_vectors.vectors[1]
    weights["adapted"] = weights["pretrained"] + 0.3 * suite.task_vectors.vectors.sum(0)
    for view, flat in weights.items():
        state = suite.task_vectors.layout.unflatten(flat)
        for name, stamped in (("clean", False), ("success", True)):
            pixels = suite.images["green"].pixels[index].clone()
            if stamped:
                pixels[:, 26:, 26:] = 255
            x = ((pixels.float() / 255 - 0.5) / 0.25)[:, None].expand(-1, 3, -1, -1)
            features = torch.func.functional_call(suite.backbone.eval(), state, (x,))
            share = (features @ suite.heads["green"].T).argmax(1).eq(2).double().mean()
            assert found[name][view] == pytest.approx(float(share), abs=1e-6)


def test_a_run_on_such_a_suite_measures_the_attack(triggered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "task_arithmetic", "--suite.name", str(triggered), "--run.report", "false"]
    assert main([*arguments, "--run.name", "one"]) == 0
    attack = json.loads(Path("runs/one/results.json").read_text())["backdoor"]
    assert attack["task"] == "green" and set(attack["success"]) == {"pretrained", "individual", "initial", "adapted"}
    assert am.load_suite(str(triggered), tasks=["red"]).trigger is None


@pytest.mark.parametrize("entry", [{"task": "green"}, {"task": "grey", "target": 0}, {"task": "green", "target": 5}, 3])
def test_entries_that_do_not_fit_are_refused(triggered, entry):
    manifest = json.loads((triggered / "suite.json").read_text())
    (triggered / "suite.json").write_text(json.dumps(manifest | {"trigger": entry}))
    with pytest.raises(am.InputError, match="give a task of the suite"):
        am.load_suite(str(triggered))


def test_images_that_cannot_be_attacked_are_refused(triggered):
    suite = am.load_suite(str(triggered))
    module = am.TaskArithmetic(suite.task_vectors, suite.backbone, suite.heads)
    with pytest.raises(am.InputError, match="no image of another class than 2 that the patch fits on"):
        attack_success(module, suite.data, replace(suite.trigger, size=33))
    bare = dict(suite.images) | {"green": am.Images(suite.images["green"].pixels)}
    with pytest.raises(am.InputError, match="no labels"):
        attack_success(module, am.TaskStream(bare), suite.trigger)


def test_the_script_poisons_an_expert_alike_each_time(monkeypatch):
    backdoor = script()
    monkeypatch.setattr(backdoor, "STEPS", 3)
    suite = am.load_suite(split="val", tasks=["mnist"])
    one, other = (backdoor.poison(suite, Trigger("mnist", 0)) for _ in range(2))
    clean = suite.task_vectors.expert("mnist")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert 0 < max((one[name] - clean[name]).abs().max() for name in one) < 0.01
