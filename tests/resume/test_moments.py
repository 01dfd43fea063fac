"""A full disk, Ctrl-C and SIGTERM at any moment of a run: the exit code, and the bits of what goes on from there.

`-m soak` takes 30, 30 and 10 moments, spread over a run from its first line to its last; a few are always taken.
Moments are counted in files opened for writing, and in processor time: how busy the machine is moves none of them.
"""

import csv
import multiprocessing.util
import os
import re
import resource
import signal
import sys
import time

import pytest
import torch
from processes import start, texts, wait

from adaptive_merge.__main__ import main

CONFIG = """
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.0, bounds: free}}}}
  start: {{class_path: CompensatedRegression}}
trainer: {{max_steps: 6, accelerator: cpu, enable_progress_bar: false, val_check_interval: 4}}
data: {{images_per_task: 4, num_workers: {workers}}}
suite: {{name: {suite}}}
"""
SAVES = "checkpoints/last.ckpt"
# Of each kind: what is sent, how a run may end, and where, of a whole one, a few and all of the moments are.
KINDS = {
    "disk": (None, {0, 2}, [0.1, 0.5], 30),
    "ctrl-c": (signal.SIGINT, {0, 130}, [0.2, 0.7], 30),
    "sigterm": (signal.SIGTERM, {0, 143}, [0.5], 10),
}


def written(name, root):
    return isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(str(root))


def fill(moment, root, opened):
    """Count files opened for writing under `root`; from the `moment`-th on, if any, no file can grow."""

    def hook(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and written(arguments[0], root):
            if opened[0] == moment:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            opened[0] += 1

    sys.addaudithook(hook)


def tell(moment, number):
    """Send a signal after so many seconds of this process's work, as a terminal does: loader workers get it too."""
    signal.signal(signal.SIGPROF, lambda *_: os.killpg(0, number))
    signal.setitimer(signal.ITIMER_PROF, moment)


def fit(root, log, number, moment):
    """A run in this process; its words go through a pipe, for a full disk must not silence them."""
    read, write = os.pipe()
    if (reader := os.fork()) == 0:
        os.setsid()
        os.close(write)
        with os.fdopen(read, "rb") as words, open(log, "ab") as file:
            file.write(words.read())
        os._exit(0)
    os.close(read)
    os.dup2(write, 1), os.dup2(write, 2), os.close(write)
    fill(None if number else moment, root, opened := [0])
    if number and moment is not None:
        tell(moment, number)
    try:
        return main(["fit", "--config", "quick.yaml", f"--run.root={root}", "--run.if_exists=resume"])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.flush(), sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        root.with_suffix(".spent").write_text(f"{opened[0]} {time.process_time()}")
        multiprocessing.util._exit_function()  # what an interpreter that exits does with loader workers
        os.close(1), os.close(2)
        os.waitpid(reader, 0)


class Moments:
    """Interrupted runs beside one that was not."""

    def __init__(self, folder, suite, kind):
        self.folder, self.kind, self.figures = folder, kind, []
        self.number, self.ends = KINDS[kind][:2]
        (folder / "quick.yaml").write_text(CONFIG.format(suite=suite, workers=4 if kind == "sigterm" else 0))
        assert self.run("whole") == 0, texts(folder)
        opened, seconds = (folder / "whole.spent").read_text().split()
        self.length = float(seconds) if self.number else int(opened)
        self.expected, self.steps = self.state("whole"), self.logged("whole")

    def run(self, name, moment=None):
        log = self.folder / f"{name}.log"
        return wait(start(fit, self.folder / name, log, self.number, moment, log=log), 240)

    def state(self, name):
        return torch.load(self.folder / name / "quick" / SAVES, weights_only=True)

    def logged(self, name):
        with (self.folder / name / "quick" / "metrics.csv").open() as file:
            return [row["step"] for row in csv.DictReader(file) if row["train/loss"]]

    def stop(self, name, share):
        """Stop a run at a share of its length, look at how it ended, and resume it."""
        moment = share * self.length
        code = self.run(name, moment if self.number else int(moment))
        words = (self.folder / f"{name}.log").read_text()
        assert code in self.ends, (name, code, words)
        assert "Traceback" not in words, (name, words)
        if code:
            assert words.count("adaptive-merge: ") == 1, (name, words)
        folder = self.folder / name / "quick"
        saved = self.state(name)["global_step"] if (folder / SAVES).is_file() else None
        self.figures.append((round(share, 3), code, saved))
        assert not list(folder.rglob(".lock*")) and not list(folder.rglob("*.partial-*")), (name, words)
        if self.number and code and not re.search("what (it learned|its start|is solved)|the results", words):
            assert "nothing was saved" in words or "no run was under way" in words, (name, words)
        assert self.run(name) == 0, (name, texts(self.folder))
        again = self.state(name)
        assert again["global_step"] == 6
        for key, value in self.expected["state_dict"].items():
            assert torch.equal(again["state_dict"][key], value), (name, key)
        assert (folder / "results.json").is_file()
        if self.number:
            assert self.logged(name) == self.steps, name


def sweep(folder, suite, kind, shares):
    """Code and last saved step for each share of a run; all that went wrong is shown, not the first alone."""
    moments, wrong = Moments(folder, suite, kind), []
    for place, share in enumerate(shares):
        try:
            moments.stop(f"{kind}{place}", share)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(shares)}:\n" + "\n".join(wrong)
    return moments.figures


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_few_moments(tmp_path, monkeypatch, suite_folder, kind):
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path, suite_folder, kind, KINDS[kind][2])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_moments(tmp_path, monkeypatch, suite_folder, kind, record_property):
    monkeypatch.chdir(tmp_path)
    count = KINDS[kind][3]
    figures = sweep(tmp_path, suite_folder, kind, [(number + 0.5) / count for number in range(count)])
    record_property(kind, str(figures))
    codes = [code for _, code, _ in figures]
    sys.stdout.write(f"{kind}: { ({code: codes.count(code) for code in sorted(set(codes))}) } {figures}\n")
    assert len(set(codes)) > 1 or codes[0]
