"""Protocol, selection and guard from the command line: what a run folder says about how its numbers came about."""

import json

import pytest
import torch
from fitting import QUICK
from safetensors.torch import load_file

from adaptive_merge.__main__ import main

CONFIG = QUICK + "run: {report: false}\n"


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + CONFIG)
    return tmp_path


STOPPING = """
import signal

import pytorch_lightning as pl


class Stop(pl.Callback):
    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGTERM)
"""


def fit(work, *options):
    code = main(["fit", "--config", "quick.yaml", "--run.name", "quick", "--run.if_exists", "overwrite", *options])
    return code, json.loads((work / "runs" / "quick" / "results.json").read_text())


def test_transductive_is_the_default_and_named(work, capsys):
    code, results = fit(work)
    assert code == 0 and results["protocol"]["name"] == "transductive"
    assert results["protocol"]["scored_on"] == {"red": 24, "green": 24, "blue": 24}
    assert all(0 < count <= 12 for count in results["protocol"]["adapted_on"].values())
    assert "protocol transductive: adapted on" in capsys.readouterr().out
    assert set(results["criteria"]["adapted"]) == {"agreement", "js", "entropy"}
    assert 0 <= results["calibration"]["adapted"]["red"] <= 1
    assert results["guard"]["select"] == "last" and results["guard"]["stopped"] is None


def test_holdout_by_the_files_of_the_run(work):
    code, results = fit(work, "--data.protocol", "Holdout", "--data.protocol.share", "0.25")
    rows = load_file(work / "runs" / "quick" / "images.safetensors")
    for place, task in enumerate(("red", "green", "blue")):
        assert not (rows[f"adapted.{place}"] & rows[f"scored.{place}"]).any()
        assert results["protocol"]["scored_on"][task] == int(rows[f"scored.{place}"].sum()) == 18
    assert results["tasks"]["red"]["n"] == 18


def test_online_counts_first_predictions(work):
    code, results = fit(work, "--data.protocol", "Online", "--data.images_per_task", "5")
    assert results["steps"] == 5 and results["protocol"]["adapted_on"]["red"] == 24
    one = results["online"]["tasks"]["red"]
    assert one["accuracy"] == results["tasks"]["red"]["adapted"] == pytest.approx(one["curve"][-1])
    assert one["predicted"] == 24 and one["images"][-1] == 24


def test_online_resumed_equals_the_uninterrupted_pass(work):
    options = ["--data.protocol", "Online", "--data.images_per_task", "2", "--model.lr", "0.05"]
    _, whole = fit(work, *options)
    rows = load_file(work / "runs" / "quick" / "images.safetensors")
    part = [*options, "--run.name", "part"]
    (work / "stopping.py").write_text(STOPPING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(work))
        callbacks = ["--trainer.callbacks", '[{"class_path": "stopping.Stop"}]', "--allow-import", "stopping"]
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", "quick.yaml", *part, *callbacks])
    folder = work / "runs" / "part"
    assert end.value.code == 143 and not (folder / "results.json").exists()
    assert main(["fit", "--config", "quick.yaml", *part, "--run.if_exists", "resume"]) == 0
    assert json.loads((folder / "results.json").read_text())["tasks"] == whole["tasks"]
    resumed = load_file(folder / "images.safetensors")
    assert all(torch.equal(resumed[name], rows[name]) for name in rows)


def test_unseen_leaves_the_expert_out_everywhere(work, capsys):
    code, results = fit(work, "--data.protocol", "Unseen", "--data.protocol.tasks", "[green]")
    assert code == 0 and results["protocol"]["adapted_on"]["green"] == 0
    assert results["unseen"]["tasks"] == ["green"]
    assert results["average"]["adapted"] == pytest.approx(
        sum(results["tasks"][task]["adapted"] for task in ("red", "blue")) / 2
    )
    assert "green (unseen)" in capsys.readouterr().out
    assert main(["merge", "runs/quick", "--output", "merged.safetensors"]) == 0
    assert len(load_file(work / "merged.safetensors")) == 61


def test_a_corrupted_stream_is_named(work, capsys):
    options = ["--data.corruption", "Corruption", "--data.corruption.kind", "gaussian_noise"]
    code, results = fit(work, *options, "--data.corruption.severity", "4")
    assert results["corruption"] == {"kind": "gaussian_noise", "severity": 4, "seed": 0}
    assert "gaussian_noise, severity 4" in capsys.readouterr().out


def test_an_oracle_is_marked(work, capsys):
    options = ["--run.select", "oracle", "--trainer.val_check_interval", "1"]
    code, results = fit(work, *options)
    assert code == 0 and results["guard"]["select"] == "oracle"
    assert "ORACLE: labels chose the step" in capsys.readouterr().out


def test_a_mistake_costs_no_finished_run(work, capsys):
    fit(work)
    before = (work / "runs" / "quick" / "results.json").read_bytes()
    again = ["fit", "--config", "quick.yaml", "--run.name", "quick", "--run.if_exists", "overwrite"]
    assert main([*again, "--run.select", "oracle"]) == 2
    assert "--trainer.val_check_interval" in capsys.readouterr().err
    online = ["--data.protocol", "Online", "--run.select", "oracle", "--trainer.val_check_interval", "1"]
    assert main([*again, *online]) == 2
    assert main(["fit", "--config", "quick.yaml", "--run.name", "new", "--run.select", "oracle"]) == 2
    assert main(["fit", "--config", "quick.yaml", "--run.name", "new"]) == 0
    checkpoint = ["--ckpt_path", "runs/new/checkpoints/last.ckpt"]
    assert main(["fit", "--config", "quick.yaml", *checkpoint]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (work / "runs" / "quick" / "results.json").read_bytes() == before


def test_selection_needs_the_guard(work, capsys):
    assert main(["fit", "--config", "quick.yaml", "--run.guard", "off", "--run.select", "agreement"]) == 2
    assert "needs the guard" in capsys.readouterr().err
    code, results = fit(work, "--run.guard", "off")
    assert code == 0 and results["guard"] == {}


def test_a_collapse_ends_with_code_4_after_the_results(work, capsys):
    wild = ["--model.lr", "3", "--model.coefficients.bounds", "free", "--trainer.max_steps", "60"]
    wild += ["--data.images_per_task", "24"]
    code, results = fit(work, *wild)
    assert code == 4 and results["guard"]["stopped"]["step"] < 60
    assert "collapsed" in capsys.readouterr().err
    assert results["guard"]["kept_step"] == results["guard"]["stopped"]["restored_step"] == 0
    assert all(row["adapted"] == row["initial"] for row in results["tasks"].values())


def test_an_unknown_unseen_task_is_one_message(work, capsys):
    options = ["--data.protocol", "Unseen", "--data.protocol.tasks", "[gren]"]
    assert main(["fit", "--config", "quick.yaml", *options]) == 2
    assert "did you mean 'green'" in capsys.readouterr().err
