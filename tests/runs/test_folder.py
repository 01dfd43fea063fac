"""Only what a run of this program wrote is ever replaced or removed."""

import csv
import json
import os
import signal
import time

import pytest
from processes import start, texts, wait

from adaptive_merge.__main__ import main
from adaptive_merge.cli.inspect import describe

CONFIG = """
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.3}}}}
trainer: {{max_steps: {steps}, accelerator: cpu, enable_progress_bar: false}}
data: {{images_per_task: 4}}
suite: {{name: {suite}}}
run: {{report: false}}
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(CONFIG.format(suite=suite_folder, steps=2))
    (tmp_path / "long.yaml").write_text(CONFIG.format(suite=suite_folder, steps=100_000))
    return tmp_path


def fit(*arguments, config="quick.yaml"):
    return main(["fit", "--config", config, *arguments])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_that_no_run_wrote_are_refused_or_left_alone(work, capsys):
    folder = work / "runs" / "quick"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "expert.pt").write_text("mine")
    (folder / "config.yaml").write_text("mine: 1")
    before = contents(work)
    for mode in ("refuse", "resume", "overwrite"):
        assert fit("--run.if_exists", mode) == 2
        assert "config.yaml is in the way, and no run of this program wrote it" in capsys.readouterr().err
        assert contents(work) == before
    (folder / "config.yaml").unlink()
    (folder / "hpc_ckpt_1.ckpt").write_text("Lightning's")
    assert fit() == 2 and "hpc_ckpt_1.ckpt was left" in capsys.readouterr().err
    (folder / "hpc_ckpt_1.ckpt").unlink()
    assert fit() == 0
    (folder / "checkpoints" / "best.pt").write_text("mine as well")
    assert fit() == 2 and "already holds a run" in capsys.readouterr().err
    assert fit("--run.if_exists", "overwrite") == 0
    assert (folder / "checkpoints" / "expert.pt").read_text() == "mine"
    assert (folder / "checkpoints" / "best.pt").read_text() == "mine as well"
    files = describe(folder)["files"]
    assert "checkpoints/last.ckpt" in files and not {"checkpoints/expert.pt", ".journal"} & set(files)


def test_resume_without_a_checkpoint_deletes_nothing(work, capsys):
    assert fit() == 0
    folder = work / "runs" / "quick"
    (folder / "checkpoints" / "last.ckpt").rename(folder / "checkpoints" / "kept.ckpt")
    before = contents(folder)
    assert fit("--run.if_exists", "resume") == 2
    assert "no checkpoint to go on from (checkpoints/last.ckpt)" in capsys.readouterr().err
    assert contents(folder) == before


def test_resume_goes_on_from_the_first_saving_where_the_last_has_failed(work, capsys):
    options = ["--trainer.val_check_interval", "2", "--trainer.max_steps", "3"]
    assert fit(*options) == 0
    folder = work / "runs" / "quick"
    for name in ("checkpoints/last.ckpt", "results.json", "coefficients.json"):
        (folder / name).unlink()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["epoch=0-step=2.ckpt"]
    assert fit(*options, "--run.if_exists", "resume") == 0
    assert "begins anew" not in capsys.readouterr().err
    with (folder / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1", "2"]


def test_a_run_folder_without_a_journal_goes_on(work, capsys):
    assert fit() == 0
    folder = work / "runs" / "quick"
    (folder / ".journal").unlink()
    (folder / "checkpoints" / "mine.ckpt").write_text("mine")
    assert fit("--run.if_exists", "resume", "--trainer.max_steps", "3") == 0
    (folder / ".journal").unlink()
    assert fit() == 2
    assert fit("--run.if_exists", "overwrite") == 0
    assert (folder / "checkpoints" / "mine.ckpt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/tmp/out", ".", "..", "a/.."])
def test_names_stay_inside_the_root(work, name, capsys):
    assert fit(f"--run.name={name}") == 2
    assert "names no folder inside runs" in capsys.readouterr().err
    assert sorted(path.name for path in work.iterdir()) == ["long.yaml", "quick.yaml"]


def started(arguments, gate):
    while not gate.exists():
        time.sleep(0.01)
    return fit(*arguments, config="long.yaml")


@pytest.mark.parametrize("count", [2, 8])
def test_of_runs_started_into_one_folder_one_runs_and_the_others_say_whose_it_is(work, count):
    gate = work / "gate"
    modes = ["refuse", "resume", "overwrite", "resume"]
    runs = [
        start(started, ["--run.if_exists", modes[number % 4]], gate, log=work / f"{number}.log")
        for number in range(count)
    ]
    gate.touch()
    (winner,) = refused(runs)
    assert texts(work).count(f"in use by process {winner} on") == count - 1
    assert describe_when_there(work)["running"].startswith(f"process {winner} on")
    os.kill(winner, signal.SIGTERM)
    assert wait(winner, 120) == 143, texts(work)
    steps = [line.split(",") for line in (work / "runs/quick/metrics.csv").read_text().splitlines()]
    column = steps[0].index("step")
    assert [int(row[column]) for row in steps[1:]] == list(range(len(steps) - 1))
    assert not list((work / "runs/quick").glob(".lock*"))


def refused(runs, seconds=240):
    """Wait for all but one to end with 2."""
    left, end = list(runs), time.monotonic() + seconds
    while len(left) > 1:
        assert time.monotonic() < end
        for process in list(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 2
                left.remove(process)
        time.sleep(0.05)
    return left


def describe_when_there(work, seconds=120):
    end = time.monotonic() + seconds
    while not (work / "runs/quick/checkpoints/last.ckpt").is_file():
        assert time.monotonic() < end, texts(work)
        time.sleep(0.05)
    return describe(work / "runs" / "quick")


def test_a_journal_that_was_forged_or_cut_reaches_nothing_outside(work):
    assert fit() == 0
    journal = work / "runs" / "quick" / ".journal"
    with journal.open("a") as file:
        file.write('\n"../../quick.yaml"\n"/etc/hostname"\n["x"]\n"config.y')
    assert fit("--run.if_exists", "overwrite") == 0
    assert (work / "quick.yaml").is_file()
    names = [json.loads(line) for line in journal.read_text().splitlines() if line]
    assert set(names) >= {"config.yaml", "metrics.csv", "results.json", "checkpoints/last.ckpt"}
    assert not any(".." in name for name in names)
