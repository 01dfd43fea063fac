"""`scripts/gpu_check.sh`: what it says without a GPU, what it runs with one, and the table that it writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
PAGE = ROOT / "docs" / "gpu.md"


def check(tmp_path, python, *arguments):
    """The script, in a copy of what it needs."""
    (tmp_path / "scripts").mkdir(exist_ok=True)
    shutil.copy(SCRIPTS / "gpu_check.sh", tmp_path / "scripts")
    command = ["bash", str(tmp_path / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)


def stand_in(tmp_path, fails):
    """A python that notes what it is asked, and fails where that has a word in it."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$*" in *{fails}*) exit 1 ;; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    ended = check(tmp_path, sys.executable)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "sees no CUDA device here, so nothing was run and nothing written" in ended.stderr


def test_with_one_it_tests_measures_and_writes(tmp_path):
    assert check(tmp_path, stand_in(tmp_path, "nothing"), "--tasks", "8").returncode == 0
    _, tests, benchmark, page = (tmp_path / "asked").read_text().splitlines()
    figures = page.rpartition(" ")[2]
    assert tests == "-m pytest -m cuda tests"
    assert benchmark == f"scripts/benchmark.py --device cuda --json {figures} --tasks 8"
    assert page == f"scripts/gpu_table.py {figures}" and not Path(figures).exists()


def test_a_test_that_fails_leaves_the_table_alone(tmp_path):
    assert check(tmp_path, stand_in(tmp_path, "pytest")).returncode == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 2


def figures(tmp_path, seconds, tasks=(8,)):
    rows = [
        {
            "model": "vit_b_32",
            "tasks": count,
            "images": 16,
            "peak_bytes": {"floor": 2**30, "ours": 2**31, "naive": None},
            "seconds": {"floor": 0.01, "ours": seconds},
        }
        for count in tasks
    ]
    (tmp_path / "figures.json").write_text(json.dumps({"torch": "2.15.0", "rows": rows}))
    return tmp_path / "figures.json"


def test_the_table_keeps_what_other_cards_measured(tmp_path):
    page = tmp_path / "gpu.md"
    shutil.copy(PAGE, page)
    for card, seconds, tasks in (("B 200", 0.02, (8,)), ("A 100", 0.03, (8,)), ("A 100", 0.0123, (8, 2))):
        file = figures(tmp_path, seconds, tasks)
        command = [sys.executable, SCRIPTS / "gpu_table.py", file, "--card", card, "--page", page]
        subprocess.run(command, check=True)
    above, _, rest = PAGE.read_text().partition("<!-- measured: begin -->")
    text = page.read_text()
    assert text.startswith(above) and text.endswith(rest.partition("<!-- measured: end -->")[2])
    rows = [line for line in text[len(above) :].splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[:5] + [row.split(" | ")[6]] for row in rows] == [
        ["| A 100", "2.15.0", "vit_b_32", "2", "16", "12.3"],
        ["| A 100", "2.15.0", "vit_b_32", "8", "16", "12.3"],
        ["| B 200", "2.15.0", "vit_b_32", "8", "16", "20.0"],
    ]
    assert "There are no rows" not in text and rows[0].endswith("| none | 1.00 / 2.00 / none |")
