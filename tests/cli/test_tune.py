import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from conftest import write_manifest, write_suite
from fitting import QUICK
from processes import start, wait

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.cli import tune
from adaptive_merge.cli.grid import parse_grid
from adaptive_merge.runs.array import last_words
from adaptive_merge.runs.ranking import Candidate, conclusion, rank
from adaptive_merge.runs.reading import Run

COMMAND = ["tune", "--config", "quick.yaml", "--run.report", "false"]


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """A working directory with a quick configuration over the toy suite; each fit runs here, not in a process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + QUICK)
    ran = []

    def fit(arguments, log):
        ran.append(log.parent.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = main(["fit", *arguments])
        log.write_text(said.getvalue())
        return code

    monkeypatch.setattr(tune, "_fit", fit)
    monkeypatch.setattr(tune, "ran", ran, raising=False)
    return tmp_path


def record(work, name="quick-tune"):
    return json.loads((work / "runs" / name / "tune.json").read_text())


def candidate(name, agreement, js, entropy, accuracy=0.5, start=0.5, **results):
    criteria = {
        "initial": {"agreement": start, "js": start, "entropy": start},
        "adapted": {"agreement": agreement, "js": js, "entropy": entropy},
    }
    content = {
        "tasks": {"red": {}},
        "average": {"initial": start, "adapted": accuracy},
        "criteria": criteria,
        "protocol": {"name": "transductive", "scored_on": {"red": 24}},
        "experts": {"red": "0"},
    }
    return Candidate(name, name, {"lr": name}, Run(name, content | results))


def test_a_grid_is_run_ranked_and_says_nothing_of_accuracies(work, capsys):
    assert main([*COMMAND, "--vary", "model.lr=0.001,0.1", "--vary", "model.coefficients.init=0.3"]) == 0
    told = capsys.readouterr().out
    folder = work / "runs" / "quick-tune"
    names = {f"lr={lr},init=0.3" for lr in (0.001, 0.1)}
    assert {path.name for path in folder.iterdir()} == names | {"tune.json"}
    found = record(work)
    assert (found["schema"], found["by"], found["labels"]) == (1, "agreement", False)
    assert found["grid"] == {"model.lr": [0.001, 0.1], "model.coefficients.init": [0.3]}
    values = [run["criterion"] for run in found["runs"]]
    assert len(values) == 2 and values == sorted(values, reverse=True)
    assert {key: found["runs"][0][key] for key in ("folder", "values")} == found["winner"]
    for run in found["runs"]:
        results = json.loads((folder / run["folder"] / "results.json").read_text())
        assert run["criteria"] == results["criteria"]["adapted"]
    assert "accuracy" not in told and "accuracy" not in json.dumps(found) and "average" not in told
    assert "--run.name=quick-tune-best" in told and f"--model.lr={found['winner']['values']['model.lr']}" in told


def test_labels_change_nothing_but_the_oracle_which_is_marked(work, tmp_path, capsys):
    records = []
    for shift in (0, 1):
        suite = tmp_path / f"suite{shift}"
        suite.mkdir()
        write_suite(suite)
        for path in (suite / "images").iterdir():
            content = dict(np.load(path))
            labels = content["test_labels"]
            np.savez_compressed(path, **content | {"test_labels": (labels + shift) % (labels.max() + 1)})
        write_manifest(suite)
        grid = ["--suite.name", str(suite), "--vary", "model.lr=0.1", "--run.name", f"grid{shift}"]
        assert main([*COMMAND, *grid]) == 0
        records.append(record(work, f"grid{shift}"))
        assert main([*COMMAND, *grid, "--by", "oracle"]) == 0
        records.append(record(work, f"grid{shift}"))
    assert len(tune.ran) == 2, "the oracle ranks the runs that are there"
    told = capsys.readouterr().out
    assert "ORACLE: ranked by accuracy" in told and "(ORACLE: labels chose it)" in told
    results = json.loads((work / "runs" / "grid1" / "lr=0.1" / "results.json").read_text())
    assert records[3]["runs"][0]["criterion"] == results["average"]["adapted"]
    assert records[0] == records[2] and records[0]["labels"] is False
    assert records[1] != records[3] and records[1]["labels"] is True


def test_a_grid_goes_on_and_refuses_other_settings(work, capsys):
    assert main([*COMMAND, "--vary", "model.lr=0.001,0.01"]) == 0
    (work / "runs" / "quick-tune" / "lr=0.01" / "results.json").unlink()  # as if it had been interrupted
    assert main([*COMMAND, "--vary", "model.lr=0.001,0.01", "--by", "js"]) == 0
    assert tune.ran == ["lr=0.001", "lr=0.01", "lr=0.01"]
    assert record(work)["by"] == "js"
    assert main([*COMMAND, "--vary", "model.lr=0.001,0.01", "--trainer.max_steps", "4"]) == 2
    assert "its trainer.max_steps is 3, this grid asks for 4" in capsys.readouterr().err
    assert len(tune.ran) == 3
    again = ["--vary", "model.lr=0.001", "--trainer.max_steps", "4", "--run.if_exists", "overwrite"]
    assert main([*COMMAND, *again]) == 0
    assert len(tune.ran) == 4


def test_a_run_that_fails_is_shown_and_the_others_are_ranked(work, capsys):
    assert main([*COMMAND, "--vary", "model.coefficients.init=[0.1, 0.2],0.3"]) == 0
    assert "2 start coefficients for 3 experts" in capsys.readouterr().out
    found = record(work)
    assert [run["state"] for run in found["runs"]] == ["finished", "failed"]
    assert "2 start coefficients" in found["runs"][1]["message"] and found["winner"]["folder"] == "init=0.3"
    assert main([*COMMAND, "--vary", "model.coefficients.init=[0.1, 0.2]", "--run.name", "none"]) == 2
    assert "none of 1 runs has finished" in capsys.readouterr().err
    assert record(work, "none")["winner"] is None


def test_ranking_by_each_criterion():
    runs = [candidate("a", 0.6, 0.3, 0.2), candidate("b", 0.7, 0.2, 0.4), candidate("c", 0.5, 0.1, 0.3, accuracy=0.9)]
    best = {by: rank(runs, by)[0].name for by in ("agreement", "js", "entropy", "oracle")}
    assert best == {"agreement": "b", "js": "c", "entropy": "a", "oracle": "c"}


def test_values_that_are_not_finite_come_last_and_equals_keep_their_order():
    runs = [candidate("a", float("nan"), 1, 1), candidate("b", 0.5, 1, 1), candidate("c", 0.5, 1, 1)]
    assert [one.name for one in rank(runs, "agreement")] == ["b", "c", "a"]


def test_a_collapsed_run_is_ranked_and_flagged():
    stopped = candidate("a", 0.6, 0.3, 0.2, guard={"stopped": {"step": 5}})
    assert stopped.collapsed and rank([candidate("b", 0.5, 1, 1), stopped], "agreement")[0] is stopped


def test_a_winner_that_is_no_better_than_a_start_is_said_to_be():
    worse = rank([candidate("a", 0.4, 0.6, 0.6)], "agreement")
    assert "adapting does not pay" in conclusion(worse, "agreement")
    assert "adapting does not pay" not in conclusion(rank([candidate("a", 0.6, 0.4, 0.4)], "js"), "js")


@pytest.mark.parametrize("change", [{"experts": {"red": "1"}}, {"protocol": {"scored_on": {"red": 12}}}])
def test_runs_on_other_images_or_experts_are_not_compared(change):
    with pytest.raises(am.InputError, match="differ in"):
        rank([candidate("a", 0.5, 1, 1), candidate("b", 0.5, 1, 1, **change)], "agreement")


def test_runs_that_did_not_record_their_protocol_are_ranked():
    ranked = rank([candidate("a", 0.5, 1, 1, protocol=None), candidate("b", 0.7, 1, 1, protocol=None)], "agreement")
    assert [one.name for one in ranked] == ["b", "a"]


def test_choose_ranks_finished_runs(work, capsys):
    for lr in ("0.001", "0.1"):
        assert main(["fit", *COMMAND[1:], "--model.lr", lr, "--run.name", f"lr{lr}"]) == 0
    half = ["--data.protocol", "Holdout", "--run.name", "half"]
    assert main(["fit", *COMMAND[1:], *half]) == 0
    capsys.readouterr()
    assert main(["choose", "runs/lr0.001", "runs/lr0.1", "--by", "js"]) == 0
    told = capsys.readouterr().out
    scores = {
        name: json.loads((work / "runs" / name / "results.json").read_text())["criteria"]["adapted"]["js"]
        for name in ("lr0.001", "lr0.1")
    }
    assert f"best by js: runs/{min(scores, key=scores.get)}" in told
    assert main(["choose", "runs/lr0.001", "runs/half"]) == 2
    assert "differ in protocol" in capsys.readouterr().err


def test_grids_are_read_as_yaml():
    found = parse_grid(["a.b=1,2.5,null", 'c="x,y",z', "d=[1, 2],{k: v}"])
    assert found == {"a.b": [1, 2.5, None], "c": ["x,y", "z"], "d": [[1, 2], {"k": "v"}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --vary"),
        (["--vary", "model.lr"], "write KEY=A,B"),
        (["--vary", "=1,2"], "write KEY=A,B"),
        (["--vary", "model.lr="], "at least one value"),
        (["--vary", "model.lr=1,1"], "none twice"),
        (["--vary", "model.lr=[1"], "not YAML"),
        (["--vary", "model.lr=1", "--vary", "model.lr=2"], "there twice"),
        (["--vary", "model.lrr=1,2"], "lrr"),
        (["--vary", "suite.split=val,test"], "cannot be ranked together"),
        (["--vary", "run.name=a,b"], "one for all runs"),
        (["--vary", "model.lr=1", "--by", "agrement"], "did you mean 'agreement'"),
    ],
)
def test_bad_arguments_end_with_one_message_and_nothing_written(work, capsys, arguments, message):
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in work.iterdir()) == ["quick.yaml"]


def test_a_fit_runs_in_a_process_of_its_own(tmp_path):
    log = tmp_path / "run" / "fit.log"
    assert tune._fit(["--model.lrr=1"], log) == 2
    assert "lrr" in last_words(log.read_text())


def fit_with(executable, log):
    sys.executable = str(executable)
    return tune._fit([], log)


def test_who_stops_the_grid_stops_the_fit(tmp_path):
    answers = tmp_path / "python"
    answers.write_text("#!/bin/bash\ntrap 'echo saved; exit 143' TERM\necho ready\nwhile true; do sleep 0.05; done\n")
    answers.chmod(0o700)
    log = tmp_path / "run" / "fit.log"
    process = start(fit_with, answers, log, log=tmp_path / "grid.log")
    end = time.monotonic() + 30
    while time.monotonic() < end and not (log.is_file() and log.read_text()):
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    assert wait(process, 30) == 143
    assert log.read_text() == "ready\nsaved\n"
