"""Mutated files of every kind that is read: only our errors, no hang, no other number, little memory.

`pytest -m fuzz --fuzz-seed N --fuzz-minutes M` goes on for M minutes; the short test has a seed of its own.
"""

from __future__ import annotations

import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
from processes import crowding

from adaptive_merge.errors import AdaptiveMergeError
from fuzz.material import Refused, prepare

HANG, MEMORY = 20, 2 << 30
SUBPROCESS_EVERY = 400


class Hung(BaseException):
    """An input took longer than `HANG` seconds."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        logging.disable(logging.WARNING)
        targets = prepare(folder)
        shutil.copytree(folder, clean := tmp_path_factory.mktemp("clean") / "all", symlinks=True)
        yield targets, clean
        logging.disable(logging.NOTSET)


def outcome(target, path: Path):
    """What an input came to: "refused" or "read", and what was read."""

    def hung(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(int(HANG * crowding()))  # whatever else the machine is doing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "read", target.read(path)
    except (AdaptiveMergeError, Refused):
        return "refused", None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def restore(clean: Path, name: str) -> None:
    """The clean files of the folder that an input lies in."""
    top = Path(name).parts[0]
    shutil.rmtree(top) if Path(top).is_dir() else Path(top).unlink(missing_ok=True)
    copy = shutil.copytree if (clean / top).is_dir() else shutil.copy
    copy(clean / top, top)


def fuzz(material, seed: int, seconds: float, inputs: int) -> tuple[Counter, list[str], float]:
    """Counts of outcomes, what went wrong, and the longest time that an input took, in seconds."""
    targets, clean = material
    expected = {kind: outcome(target, Path(target.file)) for kind, target in targets.items() if target.sealed}
    counts, wrong, longest, number, end = Counter(), [], 0.0, 0, time.monotonic() + seconds
    order = list(targets)
    while time.monotonic() < end and number < inputs:
        draw, kind = random.Random(f"{seed}/{number}"), order[number % len(order)]
        target, number = targets[kind], number + 1
        restore(clean, target.file)
        target.change(Path(target.file), draw)
        began = time.monotonic()
        try:
            result, value = outcome(target, Path(target.file))
        except BaseException as error:  # whatever it is, it is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            result, value = "wrong", None
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:200]} at {frame.filename}:{frame.lineno}"
            wrong.append(f"{seed}/{number - 1} {kind}: {what}")
        longest = max(longest, time.monotonic() - began)
        if result == "read" and target.sealed and not same(value, expected[kind][1]):
            result = "another number"
            wrong.append(f"{seed}/{number - 1} {kind}: another number")
        counts[result] += 1
        if number % SUBPROCESS_EVERY == 0:
            wrong += alone(f"{seed}/{number - 1} {kind}", target.file)
        restore(clean, target.file)
    return counts, wrong, longest


def same(value, clean) -> bool:
    """Equal; of several tasks, those that are there."""
    if isinstance(value, dict) and isinstance(clean, dict):
        return all(content in clean.values() for content in value.values())
    return value == clean


def alone(what: str, file: str) -> list[str]:
    """The same input in a process of its own, as a user would meet it."""
    top = Path(file).parts[0]
    command = ["data", "check", top] if Path(top, "suite.json").exists() else ["inspect", top]
    if file == "config.yaml":
        command = ["fit", "--config", file, "--run.root=alone"]
    command = [sys.executable, "-m", "adaptive_merge", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree("alone", ignore_errors=True)
    good = done.returncode in (0, 2, 3) and "Traceback" not in done.stderr
    return [] if good else [f"{what}, alone: exit code {done.returncode}, {done.stderr[-300:]}"]


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def judge(counts, wrong, longest, before: int, record_property) -> None:
    peak = peak_bytes()
    record_property("outcomes, longest s, peak MiB", str((dict(counts), round(longest, 1), peak >> 20)))
    figures = f"{sum(counts.values())} inputs: {dict(counts)}; longest {longest:.1f} s, peak {peak >> 20} MiB"
    sys.stdout.write(f"\n{figures}\n")
    assert not wrong, f"{len(wrong)} of {sum(counts.values())}:\n" + "\n".join(wrong[:40])
    # Tests before these, in the same process, may have left more; by itself, as the figures are taken, MEMORY counts.
    assert peak <= max(MEMORY, before + (1 << 30))
    assert counts["refused"] > 0.3 * sum(counts.values())


def test_some_mutated_files_of_each_kind(material, record_property):
    before = peak_bytes()
    judge(*fuzz(material, 20, 30, 2 * len(material[0])), before, record_property)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_mutated_files_for_minutes(material, request, record_property):
    option, before = request.config.getoption, peak_bytes()
    figures = fuzz(material, option("--fuzz-seed"), 60 * option("--fuzz-minutes"), option("--fuzz-inputs"))
    judge(*figures, before, record_property)
