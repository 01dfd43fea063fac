"""What version 0.1.0 wrote before the package was laid out anew still loads, and still refuses another run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli.loading import load_run
from adaptive_merge.engine.old_files import upgraded
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.sealed import load_sealed, save_sealed

OLD = Path(__file__).parents[1] / "old_files"
RUNS = ("adamerging", "tinting_pp", "surgery_adamerging")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A folder in which `runs/NAME` are the old runs."""
    shutil.copytree(OLD, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def resume(run, *changes, steps=4):
    arguments = ["--trainer.max_steps", str(steps), "--run.if_exists", "resume", *changes]
    return main(["fit", "--config", f"runs/{run}/config.yaml", *arguments])


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_goes_on_with_its_configuration(copied, run):
    before = read_checkpoint(copied / run / "checkpoints" / "last.ckpt")
    assert resume(run) == 0
    after = read_checkpoint(copied / run / "checkpoints" / "last.ckpt")
    assert (before["global_step"], after["global_step"]) == (3, 4)
    assert before["adaptive_merge"]["method"]["recipe"] == after["adaptive_merge"]["recipe"] == run
    assert any(not torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_loads(copied, run):
    state = torch.load(copied / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    module = load_run(f"runs/{run}")
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


REFUSED = {
    ("adamerging", "objective: diversity: 0.0, this run has 0.5"): ["--model.objective.diversity=0.5"],
    ("adamerging", "objective: 'Entropy', this run has 'ExpertDivergence'"): ["--model.objective=ExpertDivergence"],
    ("adamerging", "coefficients: bounds: 'clamp', this run has 'free'"): ["--model.coefficients.bounds=free"],
    ("adamerging", "coefficients: 'LayerWise', this run has 'BlockWise'"): ["--model.coefficients=BlockWise"],
    ("adamerging", "protocol: 'Transductive', this run has 'Holdout'"): ["--data.protocol=Holdout"],
    ("adamerging", "transform 1: nothing, this run has 'Ties'"): ["--model.transforms=[Ties]"],
    ("tinting_pp", "objective: confident: True, this run has False"): ["--model.objective.confident=false"],
    ("tinting_pp", "schedule: 'shuffled', this run has 'joint'"): ["--data.schedule=joint"],
}


@pytest.mark.parametrize(("run", "difference"), REFUSED)
def test_an_old_run_refuses_other_settings_by_name(copied, capsys, run, difference):
    assert resume(run, *REFUSED[run, difference]) == 2
    assert f"another {difference}" in capsys.readouterr().err


def changed(folder, change):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    change(content["model"])
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def test_an_old_run_of_other_parts_does_not_load(copied):
    folder = copied / "surgery_adamerging"
    changed(folder, lambda model: model["adapters"][0]["init_args"].update(rank=8))
    with pytest.raises(am.InputError, match="another adapter 1: rank: 16, this run has 8"):
        load_run("runs/surgery_adamerging")
    changed(folder, lambda model: model["adapters"][0]["init_args"].update(rank=16))
    objective = {"class_path": "FeatureDistance", "init_args": {"blocks": True}}
    changed(folder, lambda model: model["stages"][1]["init_args"].update(objective=objective))
    with pytest.raises(am.InputError, match="another stage 2: objective: blocks: False, this run has True"):
        load_run("runs/surgery_adamerging")


def test_the_label_of_a_recipe_is_no_setting(copied):
    """A run of the YAML file is one of the named constructor, and the reverse."""
    suite = am.load_suite("embedded", tasks=["mnist", "thai"])
    module = am.AdaMerging(suite.task_vectors, suite.backbone, suite.heads, granularity="layer")
    path = copied / "adamerging" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["adaptive_merge"]["recipe"] == "adamerging_layer"
    torch.save(checkpoint, path)
    assert load_run("runs/adamerging").recipe == "adamerging"


def test_an_old_adapter_file_loads(copied):
    module, run = load_run("runs/tinting_pp/config.yaml"), load_run("runs/tinting_pp")
    am.load_adapters(module, copied / "tinting_pp" / "adapters.safetensors")
    assert all(torch.equal(value, run.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda model: model["adapters"][0]["init_args"].update(layer="proj"), "adapter 1: layer: 'head', .* 'proj'"),
        (lambda model: model.update(adapters=["FeatureSurgery"]), "adapter 1: 'Tint', this .* 'FeatureSurgery'"),
        (lambda model: model["coefficients"]["init_args"].update(bounds="free"), "coefficients: bounds: 'clamp'"),
        (lambda model: model["coefficients"].update(class_path="BlockWise"), "groups"),
        (lambda model: model.update(transforms=["Ties"]), "task vectors"),
    ],
)
def test_an_old_adapter_file_refuses_other_parts(copied, change, difference):
    changed(copied / "tinting_pp", change)
    module = load_run("runs/tinting_pp/config.yaml")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(am.InputError, match=f"another {difference}"):
        am.load_adapters(module, copied / "tinting_pp" / "adapters.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("change", ["heads", "experts"])
def test_an_old_adapter_file_refuses_other_heads_and_experts(copied, change):
    path = copied / "tinting_pp" / "adapters.safetensors"
    tensors, metadata = load_sealed(path)
    manifest = json.loads(metadata["adaptive_merge.adapters"])
    manifest[change]["thai"] = "0" * 64
    save_sealed(path, tensors, {"adaptive_merge.adapters": json.dumps(manifest)})
    with pytest.raises(am.InputError, match=f"another {'head of task' if change == 'heads' else 'expert'} 'thai'"):
        am.load_adapters(load_run("runs/tinting_pp/config.yaml"), path)


NAMES = {
    "adaptive_merge.objectives.Entropy": "Entropy",
    "adaptive_merge.data.protocols.Holdout": "Holdout",
    "adaptive_merge.transforms.ties.Ties": "Ties",
    "adaptive_merge.adapters.surgery.FeatureSurgery": "FeatureSurgery",
    "adaptive_merge.objectives.entropy": "entropy",
    "adaptive_merge.objectives.Entropy.keep": "Entropy.keep",
    "mine.objectives.Entropy": "mine.objectives.Entropy",
    "adaptive_merge_more.Entropy": "adaptive_merge_more.Entropy",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lay_elsewhere_are_translated(name):
    assert upgraded({"objective": name, "recipe": "x"}, {}) == {"objective": NAMES[name]}
    assert upgraded({"objective: text": name}, {"objective: text": name}) == {"objective: text": name}


def test_arguments_that_were_kept_elsewhere_are_compared_and_what_followed_from_them_is_not():
    recorded = {"objective": "mine.Own", "objective: filters": True, "objective: count": 0}
    today = {"objective": "mine.Own", "objective: confident": True}
    assert upgraded(recorded, {"objective: confident": False}) == today
    assert upgraded(recorded, {"objective: filters": False})["objective: filters"] is True
    assert upgraded({"protocol: unseen": ["thai"]}, {"protocol: tasks": []}) == {"protocol: tasks": ["thai"]}
    assert upgraded({}, {"objective: new": 1, "objective": "mine.Own"}) == {"objective: new": 1}
    function = {"transform 1": "mine.halve"}
    assert upgraded({"transform 1": "builtins.function"}, function) == function
