"""A full disk, Ctrl-C and SIGTERM at any moment of a run: the exit code, and the bits of what goes on from there.

`-m soak` takes 30, 30 and 10 moments, spread over a run from its first line to its last; a few are always taken.
"""

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
# A full disk ends the run in one message, or spares what is not the result.
ENDS = {
    "disk": {0, 2},
    "ctrl-c": {0, 130},
    "sigterm": {0, 143},
}
FEW = {"disk": [3, 12], "ctrl-c": [0.2, 0.7], "sigterm": [0.5]}
ALL = {
    "disk": range(30),
    "ctrl-c": [(number + 0.5) / 30 for number in range(30)],
    "sigterm": [(number + 0.5) / 10 for number in range(10)],
}


def written(name, root):
    return isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(str(root))


def fill_from(moment, root):
    """From the `moment`-th time on that a file is opened for writing under `root`, no file can grow."""
    count = [0]

    def hook(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and written(arguments[0], root):
            if count[0] == moment:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            count[0] += 1

    sys.addaudithook(hook)


def fit(root, moment=None, log=None):
    """A run in this process; its words go through a pipe, for a full disk must not silence them."""
    if moment is not None:
        read, write = os.pipe()
        if (reader := os.fork()) == 0:
            os.close(write)
            with os.fdopen(read, "rb") as words, open(log, "ab") as file:
                file.write(words.read())
            os._exit(0)
        os.close(read)
        os.dup2(write, 1), os.dup2(write, 2), os.close(write)
        fill_from(moment, root)
        try:
            return main(arguments(root))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.close(1), os.close(2)
            os.waitpid(reader, 0)
    return main(arguments(root))


def arguments(root):
    return ["fit", "--config", "quick.yaml", f"--run.root={root}", "--run.if_exists=resume"]


class Moments:
    """Interrupted runs beside one that was not."""

    def __init__(self, folder, suite, workers):
        self.folder, self.figures = folder, []
        (folder / "quick.yaml").write_text(CONFIG.format(suite=suite, workers=workers))
        began = time.monotonic()
        assert self.run("whole") == 0, texts(folder)
        self.seconds = time.monotonic() - began
        self.expected = self.state("whole")

    def run(self, name, moment=None):
        log = self.folder / f"{name}.log"
        return wait(start(fit, self.folder / name, moment, log, log=log), 240)

    def stopped(self, name, number, after):
        process = start(fit, self.folder / name, log=self.folder / f"{name}.log")
        time.sleep(after)
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        os.killpg(process, number)  # as a terminal or a scheduler does: workers are told as well
        return wait(process, 240)

    def state(self, name):
        return torch.load(self.folder / name / "quick" / SAVES, weights_only=True)

    def check(self, name, kind, code):
        words = (self.folder / f"{name}.log").read_text()
        assert code in ENDS[kind], (name, code, words)
        assert "Traceback" not in words, (name, words)
        if code:
            assert words.count("adaptive-merge: ") == 1, (name, words)
        folder = self.folder / name / "quick"
        saved = self.state(name)["global_step"] if (folder / SAVES).is_file() else None
        assert self.run(f"{name}") == 0, texts(self.folder)
        assert not list(folder.rglob(".lock*")) and not list(folder.rglob("*.partial-*"))
        again = self.state(name)
        assert again["global_step"] == 6
        for key, value in self.expected["state_dict"].items():
            assert torch.equal(again["state_dict"][key], value), (name, key)
        assert (folder / "results.json").is_file()
        if saved is None and re.search("what (it learned|its start|is solved)", words) is None and code:
            assert "nothing was saved" in words or kind == "disk", words
        self.figures.append((name, code, saved))


def sweep(folder, suite, kind, moments, workers=0):
    took = Moments(folder, suite, workers)
    for place, moment in enumerate(moments):
        name = f"{kind}{place}"
        if kind == "disk":
            code = took.run(name, moment)
        else:
            number = signal.SIGINT if kind == "ctrl-c" else signal.SIGTERM
            code = took.stopped(name, number, moment * took.seconds)
        took.check(name, kind, code)
    return took.figures


@pytest.mark.parametrize("kind", list(FEW))
def test_a_few_moments(tmp_path, monkeypatch, suite_folder, kind):
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path, suite_folder, kind, FEW[kind], workers=4 if kind == "sigterm" else 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(ALL))
def test_all_moments(tmp_path, monkeypatch, suite_folder, kind, record_property):
    monkeypatch.chdir(tmp_path)
    figures = sweep(tmp_path, suite_folder, kind, ALL[kind], workers=4 if kind == "sigterm" else 0)
    record_property(kind, str(figures))
    codes = [code for _, code, _ in figures]
    sys.stdout.write(f"{kind}: { ({code: codes.count(code) for code in sorted(set(codes))}) } {figures}\n")
    assert len(set(codes)) > 1 or codes[0]
