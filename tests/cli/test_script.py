"""`am.fit` is `adaptive-merge fit` from a script: the same numbers, the same folder, the same refusals."""

import json
import os
import signal
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.callbacks.safe.ranks import RunStopped
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.reading import read_run

CONFIG = """
model: {recipe: adamerging, coefficients: {class_path: LayerWise, init_args: {init: 0.3}}, lr: 0.01}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
data: {images_per_task: 4, seed: 0}
"""
FILES = {"metrics.csv", "results.json", "coefficients.json", "images.safetensors", "report.html", "checkpoints"}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + CONFIG)
    return tmp_path


@pytest.fixture
def suite(suite_folder):
    return am.load_suite(str(suite_folder))


def module(suite, lr=0.01, bounds="clamp", **settings):
    parts = (suite.task_vectors, suite.backbone, suite.heads)
    coefficients = am.LayerWise(init=0.3, bounds=bounds)
    return am.AdaptiveMerge(*parts, recipe="adamerging", coefficients=coefficients, lr=lr, **settings)


def stream(suite):
    return am.TaskStream(suite.images, images_per_task=4)


def learned(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def comparable(results):
    """Without what differs between any two runs."""
    return {key: value for key, value in results.items() if key not in ("seconds", "peak_memory_bytes")}


def test_a_script_gets_what_the_command_line_gets(work, suite, capsys):
    assert main(["fit", "--config", "quick.yaml", "--run.name", "line"]) == 0
    capsys.readouterr()
    model = module(suite)
    results = am.fit(model, stream(suite), "runs/script", max_steps=4, suite=suite, **QUIET)
    assert "average" in capsys.readouterr().out
    line, script = work / "runs" / "line", work / "runs" / "script"
    assert comparable(results) == comparable(json.loads((line / "results.json").read_text()))
    assert results == json.loads((script / "results.json").read_text())
    values = learned(line)
    assert all(torch.equal(value, values[name]) for name, value in learned(script).items())
    for name in ("coefficients.json", "metrics.csv"):
        assert (script / name).read_text() == (line / name).read_text()
    names = {path.name for path in script.iterdir()}
    assert names >= FILES and "config.yaml" not in names
    assert "config.yaml is not there" in " ".join(read_run(script).notes)
    assert torch.equal(model.coefficients.values, values["model.backbone.coefficients.values"])


def test_a_resumed_run_equals_an_uninterrupted_one(work, suite):
    whole = am.fit(module(suite), stream(suite), "runs/whole", max_steps=6, **QUIET)
    am.fit(module(suite), stream(suite), "runs/parts", max_steps=2, report=False, **QUIET)
    again = am.fit(module(suite), stream(suite), "runs/parts", max_steps=6, if_exists="resume", report=False, **QUIET)
    first, second = learned(work / "runs" / "whole"), learned(work / "runs" / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first) and again["steps"] == 6
    assert again["tasks"] == whole["tasks"]
    with pytest.raises(am.InputError, match="another learning rate: 0.01, this run has 0.5"):
        am.fit(module(suite, lr=0.5), stream(suite), "runs/parts", max_steps=8, if_exists="resume", **QUIET)
    assert torch.equal(*(values["model.backbone.coefficients.values"] for values in (first, second)))


def test_one_folder_holds_one_run(work, suite):
    fit = {"max_steps": 1, "report": False, **QUIET}
    used = module(suite)
    am.fit(used, stream(suite), "runs/mine", **fit)
    before = (work / "runs" / "mine" / "results.json").read_bytes()
    with pytest.raises(am.InputError, match="choose another folder, or if_exists resume or overwrite"):
        am.fit(module(suite), stream(suite), "runs/mine", **fit)
    with pytest.raises(am.InputError, match="has learned already"):
        am.fit(used, stream(suite), "runs/other", **fit)
    assert (work / "runs" / "mine" / "results.json").read_bytes() == before
    assert not (work / "runs" / "other").exists()
    am.fit(module(suite), stream(suite), "runs/mine", if_exists="overwrite", **fit)


class Peek(pl.Callback):
    """A second run into the folder of the first, while that one is under way."""

    def __init__(self, start):
        self.start, self.error = start, None

    def on_train_start(self, *_):
        try:
            self.start()
        except am.AdaptiveMergeError as error:
            self.error = error


def test_two_runs_at_once_in_one_folder_are_refused(work, suite):
    fit = {"max_steps": 1, "report": False, "if_exists": "overwrite", **QUIET}
    peek = Peek(lambda: am.fit(module(suite), stream(suite), "runs/mine", **fit))
    assert am.fit(module(suite), stream(suite), "runs/mine", callbacks=[peek], **fit)["steps"] == 1
    assert peek.error is not None and "run folder runs/mine" in str(peek.error)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "^max_steps: nothing ends this run"),
        ({"max_steps": 2, "precision": "bf16-true"}, "^precision bf16-true"),
        ({"max_steps": 2, "guard": "off", "select": "js"}, "select js needs the guard, which is off; set guard warn"),
        ({"max_steps": 2, "if_exists": "replace"}, "unknown if_exists 'replace'"),
        ({"max_steps": 2, "select": "best"}, "unknown select 'best'"),
    ],
)
def test_mistakes_name_arguments_and_leave_nothing(work, suite, settings, message):
    with pytest.raises(am.InputError, match=message):
        am.fit(module(suite), stream(suite), "runs/mine", **settings, **QUIET)
    assert not (work / "runs").exists()


def test_what_is_no_module_or_stream_is_said(work, suite):
    with pytest.raises(am.InputError, match="give the `stream`"):
        am.fit(module(suite), folder="runs/mine")
    with pytest.raises(am.InputError, match="am.TaskStream; got AdaptiveMerge and Suite"):
        am.fit(module(suite), suite, "runs/mine")
    with pytest.raises(am.InputError, match="leave `stream`"):
        am.fit("adamerging", stream(suite))


def test_a_collapse_raises_and_the_folder_is_complete(work, suite):
    model = module(suite, lr=1.0)
    guard = am.Guard(every=1)
    with pytest.raises(RunStopped, match="the merge collapsed.*Lower lr"):
        am.fit(model, stream(suite), "runs/mine", max_steps=40, callbacks=[guard], **QUIET)
    run = work / "runs" / "mine"
    record = json.loads((run / "results.json").read_text())["guard"]
    assert record["stopped"] and record["kept_step"] == record["stopped"]["restored_step"]
    assert {path.name for path in run.iterdir()} >= FILES
    assert torch.equal(model.coefficients.values, learned(run)["model.backbone.coefficients.values"])


class Interrupt(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_the_process_goes_on(work, suite):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit = {"max_steps": 4, "report": False, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        am.fit(module(suite), stream(suite), "runs/mine", callbacks=[Interrupt()], **fit)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_checkpoint(work / "runs" / "mine" / "checkpoints" / "last.ckpt")["global_step"] == 2
    am.fit(module(suite), stream(suite), "runs/mine", if_exists="resume", **fit)
    am.fit(module(suite), stream(suite), "runs/whole", **fit)
    first, second = (learned(work / "runs" / name) for name in ("mine", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_recipe_by_name_is_a_run_of_the_command_line(work, suite):
    options = {"data.images_per_task": 2, "trainer.max_steps": 2}
    results = am.fit("quick.yaml", folder="runs/named", report=False, **options)
    run = work / "runs" / "named"
    assert results == json.loads((run / "results.json").read_text()) and results["steps"] == 2
    assert "images_per_task: 2" in (run / "config.yaml").read_text()
    with pytest.raises(am.InputError, match="choose another folder, or if_exists"):
        am.fit("quick.yaml", folder="runs/named", **options)
    with pytest.raises(am.InputError, match="data.images_per_tsk"):
        am.fit("quick.yaml", folder="runs/other", **{"data.images_per_tsk": 2})


LOAD = """
import torch, adaptive_merge as am
images = torch.load("images.pt", weights_only=True)
torch.save(am.load_run("runs/line").eval()("red", images), "logits.pt")
"""


def test_a_run_is_loaded_in_a_fresh_process_and_predicts(work, suite):
    assert main(["fit", "--config", "quick.yaml", "--run.name", "line", "--run.report", "false"]) == 0
    model = module(suite)
    am.fit(model, stream(suite), "runs/script", max_steps=4, report=False, **QUIET)
    images = suite.images["red"].take(torch.arange(3))
    torch.save(images, "images.pt")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOAD], check=True, env=environment, timeout=120)
    expected = model.eval()("red", images)
    assert torch.equal(torch.load("logits.pt", weights_only=True), expected)
    assert not torch.equal(module(suite).eval()("red", images), expected)


def test_a_run_of_a_script_is_loaded_into_a_module_of_its_parts(work, suite):
    trained = module(suite, adapters=[am.FeatureSurgery(rank=2)])
    am.fit(trained, stream(suite), "runs/mine", max_steps=2, report=False, **QUIET)
    with pytest.raises(am.MissingFileError, match=r"am.load_checkpoint\(module, 'runs/mine'\)"):
        am.load_run("runs/mine")
    images = suite.images["red"].take(torch.arange(3))
    loaded = am.load_checkpoint(module(suite, adapters=[am.FeatureSurgery(rank=2)]), "runs/mine")
    assert torch.equal(loaded.eval()("red", images), trained.eval()("red", images))
    with pytest.raises(am.InputError, match="adapter 1: rank"):
        am.load_checkpoint(module(suite, adapters=[am.FeatureSurgery(rank=3)]), "runs/mine")


def test_a_start_is_loaded_with_the_checkpoint(work, suite):
    def fresh():
        return module(suite, bounds="free", start=am.CompensatedRegression())

    trained = fresh()
    am.fit(trained, am.TaskStream(suite.images, images_per_task=4, start_images=8), "runs/mine", max_steps=1, **QUIET)
    loaded = am.load_checkpoint(fresh(), "runs/mine").merged_state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.merged_state_dict().items())
