"""A run that is told to stop saves, says so in its exit code, and goes on from the same step."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import start, texts, wait

from adaptive_merge.__main__ import main

CONFIG = """
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.3}}}}
trainer: {{max_steps: 100000, accelerator: cpu, enable_progress_bar: false}}
data: {{images_per_task: 4}}
suite: {{name: {suite}}}
"""
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "merge",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(CONFIG.format(suite=suite_folder))
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    fake.chmod(0o755)
    return tmp_path


ARGUMENTS = ["fit", "--config", "quick.yaml", "--run.if_exists", "resume"]


def rows(work):
    path = work / "runs" / "quick" / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]


def when_it_learns(work, more_than=0, seconds=180):
    end = time.monotonic() + seconds
    while len(rows(work)) <= more_than + 2:
        assert time.monotonic() < end, texts(work)
        time.sleep(0.05)


def saved_step(work):
    return torch.load(work / "runs" / "quick" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_sigterm_saves_and_exits_with_143_after_the_step(work):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (work / "real.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "adaptive_merge", *ARGUMENTS], stdout=log, stderr=log, env=environment
        )
        when_it_learns(work)
        process.send_signal(signal.SIGTERM)
        at = len(rows(work))
        assert process.wait(120) == 143, texts(work)
    # The step under way is the last one; how many more were taken before the signal arrived is the machine's business.
    assert at <= saved_step(work) < 100_000
    assert rows(work) == list(range(saved_step(work)))
    assert "Traceback" not in texts(work)
    assert "told to stop: what it learned is in runs/quick/checkpoints/last.ckpt" in texts(work)
    assert not list((work / "runs" / "quick").glob(".lock*"))


def test_slurm_gets_the_job_back_and_the_next_start_goes_on(work):
    environment = SLURM | {"PATH": f"{work}/bin:{os.environ['PATH']}"}
    process = start(main, ARGUMENTS, log=work / "slurm.log", environment=environment)
    when_it_learns(work)
    for _ in range(2):  # a second signal is harmless
        os.kill(process, signal.SIGUSR1)
    assert wait(process, 100) == 75, texts(work)
    assert (work / "scontrol.log").read_text() == "requeue 4242\n"
    step = saved_step(work)
    assert rows(work) == list(range(step))

    array = environment | {"SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": "3"}
    again = start(main, ARGUMENTS, log=work / "again.log", environment=array)
    when_it_learns(work, more_than=step)
    os.kill(again, signal.SIGUSR1)
    assert wait(again, 100) == 75, texts(work)
    assert (work / "scontrol.log").read_text() == "requeue 4242\nrequeue 4242_3\n"
    assert saved_step(work) > step
    assert rows(work) == list(range(saved_step(work)))

    cancelled = start(main, ARGUMENTS, log=work / "cancelled.log", environment=environment)
    when_it_learns(work, more_than=saved_step(work))
    os.kill(cancelled, signal.SIGTERM)
    assert wait(cancelled, 100) == 143, texts(work)
    assert len((work / "scontrol.log").read_text().splitlines()) == 2
    assert sorted(path.name for path in work.glob("**/hpc_ckpt*")) == []


def finish(limit=None):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    steps = "6" if limit else "3"
    return main([*ARGUMENTS, "--trainer.max_steps", steps])


def test_a_full_disk_ends_the_run_with_a_message_and_the_previous_checkpoint(work):
    assert wait(start(finish, log=work / "first.log"), 60) == 0, texts(work)
    assert wait(start(finish, 12_000, log=work / "full.log"), 60) == 2, texts(work)
    told = (work / "full.log").read_text()
    assert "cannot be written (File too large)" in told and "Traceback" not in told
    assert saved_step(work) == 3
    assert json.loads((work / "runs" / "quick" / "results.json").read_text())["steps"] == 3


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(work, capsys):
    (work / "locked").mkdir(mode=0o500)
    root = "locked/runs" if os.geteuid() else "/proc/runs"
    assert main(["fit", "--config", "quick.yaml", "--suite.name", "nowhere", "--run.root", root]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_killed_before_the_first_checkpoint_it_starts_anew(work):
    (work / "runs" / "quick").mkdir(parents=True)
    (work / "runs" / "quick" / "config.yaml").write_text("left behind")
    (work / "runs" / "quick" / ".journal").write_text('\n"config.yaml"')
    assert wait(start(finish, log=work / "anew.log"), 60) == 0, texts(work)
    assert saved_step(work) == 3
    assert "begins anew, for nothing was saved" in texts(work)
