"""A run that is told to stop in any phase says what it leaves, and ends with the documented code."""

import multiprocessing.util
import os
import signal
import time

import pytest
from processes import start, texts, wait

from adaptive_merge.__main__ import main
from adaptive_merge.process import signals
from adaptive_merge.process.signals import Preempted, Signals

CONFIG = """
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.0, bounds: free}}}}
  start: {{class_path: CompensatedRegression}}
trainer: {{max_steps: 3, accelerator: cpu, enable_progress_bar: false}}
data: {{images_per_task: 4}}
suite: {{name: {suite}}}
"""
# Where a signal is sent from: what a run calls first in this phase, and what is on the disk by then.
PHASES = {
    "start": ("adaptive_merge.engine.begin", "_record", "start.partial.safetensors"),
    "steps": ("adaptive_merge.engine.module.AdaptiveMerge", "training_step", "checkpoints/last.ckpt"),
    "scoring": ("adaptive_merge.engine.module.AdaptiveMerge", "validation_step", "checkpoints/last.ckpt"),
    "report": ("adaptive_merge.report.html", "write_report", "results.json"),
}
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "merge", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(CONFIG.format(suite=suite_folder))
    return tmp_path


def told(place, name, number, arguments):
    """A run that sends itself a signal when it calls `name`, once."""
    module, _, kind = place.rpartition(".")
    if kind[:1].isupper():
        owner = getattr(__import__(module, fromlist=["x"]), kind)
    else:
        owner = __import__(place, fromlist=["x"])
    original, sent = getattr(owner, name), []

    def interrupted(*positional, **named):
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return original(*positional, **named)

    setattr(owner, name, interrupted)
    return main(arguments)


def check(work, phase, number, code, environment=None):
    place, name, kept = PHASES[phase]
    arguments = ["fit", "--config", "quick.yaml", "--run.if_exists", "resume"]
    process = start(told, place, name, number, arguments, log=work / "run.log", environment=environment)
    assert wait(process, 120) == code, texts(work)
    words = texts(work)
    assert "Traceback" not in words and words.count("told to stop: ") >= 1
    assert (f"is in runs/quick/{kept}" if phase != "report" else f"are in runs/quick/{kept}") in words or not kept
    assert not list((work / "runs").rglob(".lock*")) and not list((work / "runs").rglob("*.partial-*"))
    assert wait(start(main, arguments, log=work / "again.log"), 120) == 0, texts(work)


@pytest.mark.parametrize(
    "phase", ["start", *(pytest.param(phase, marks=pytest.mark.slow) for phase in list(PHASES)[1:])]
)
def test_a_signal_in_each_phase(work, phase):
    check(work, phase, signal.SIGTERM, 143)


@pytest.mark.parametrize(
    ("number", "environment", "code"),
    [
        (signal.SIGINT, {}, 130),
        pytest.param(signal.SIGUSR1, {}, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, {}, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, SLURM, 75, marks=pytest.mark.slow),
        (signal.SIGCONT, SLURM | {"SUBMITIT_PREEMPT_SIGNAL": "CONT"}, 75),
    ],
)
def test_each_signal_has_its_exit_code(work, number, environment, code):
    fake = work / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {work}/scontrol.txt\n')
    fake.chmod(0o755)
    check(work, "scoring", number, code, environment | {"PATH": f"{work}:{os.environ['PATH']}"})
    assert (work / "scontrol.txt").exists() == (code == 75)


def test_a_signal_while_the_program_is_loaded_is_told(work):
    arguments = ["fit", "--config", "quick.yaml"]
    place = ("adaptive_merge.cli.allowlist", "restrict_imports")
    assert wait(start(told, *place, signal.SIGINT, arguments, log=work / "run.log"), 60) == 130
    assert texts(work) == "adaptive-merge: told to stop while no run was under way (exit code 130)\n"


def twice():
    with Signals(deferred=True) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked == signals.INTERRUPT
        os.kill(os.getpid(), signal.SIGINT)
    return 9


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    assert wait(start(twice, log=tmp_path / "log"), 20) == 130


def test_signals_are_given_back_and_noted_in_between():
    before = signal.getsignal(signal.SIGUSR2)
    with Signals(deferred=True) as asked:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked.asked == signals.REQUEUE
    assert signal.getsignal(signal.SIGUSR2) is before
    with Signals() as asked:
        try:
            with pytest.raises(Preempted) as ended:
                os.kill(os.getpid(), signal.SIGUSR2)
            assert ended.value.code == 143
            os.kill(os.getpid(), signal.SIGTERM)  # while it winds up, nothing more is raised
        finally:
            assert signals.current() is asked
    assert signals.current() is None


def test_workers_ignore_what_their_process_answers(tmp_path):
    def worker():
        signals.ignore_signals()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        return 7

    assert wait(start(worker, log=tmp_path / "log"), 20) == 7


def test_workers_that_ignore_signals_do_not_outlive_their_process(tmp_path):
    def main():
        signals.end_workers_at_exit(os.getpid())
        read, write = os.pipe()
        multiprocessing.Process(target=work, args=(write,), daemon=True).start()
        os.read(read, 1)
        multiprocessing.util._exit_function()  # as an interpreter that exits: it tells workers to end, and waits
        return 7

    def work(write):
        signals.ignore_signals()
        os.write(write, b"1")
        time.sleep(1000)

    assert wait(start(main, log=tmp_path / "log"), 60) == 7
