import os
import subprocess
import sys

import pytest

from adaptive_merge.__main__ import main
from adaptive_merge.report.sections import run_sections
from adaptive_merge.report.terms import terms
from adaptive_merge.runs.reading import read_run

CONFIG = """
model:
  recipe: quick
  coefficients: {class_path: LayerWise, init_args: {init: 0.3}}
trainer: {max_steps: 3, accelerator: cpu}
data: {images_per_task: 4}
"""
METHOD = """
from adaptive_merge import Entropy, LayerWise

class Halves(LayerWise):
    granularity = "half"

    def group_names(self, layout):
        middle = len(layout.names) // 2
        return ["first half"] * middle + ["second half"] * (len(layout.names) - middle)
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    """An empty working directory with a quick configuration over the toy suite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + CONFIG)
    return tmp_path


def test_fit_writes_a_report_and_plain_lines(work, capsys):
    assert main(["fit", "--config", "quick.yaml"]) == 0
    told = capsys.readouterr().out
    assert "step 3/3" in told and "scored the adapted merge" in told and "Epoch" not in told
    run = work / "runs" / "quick"
    assert read_run(run).notes == []
    assert (run / "report.html").read_text().count("<figure") >= 12
    assert main(["fit", "--config", "quick.yaml", "--run.if_exists", "overwrite", "--run.report", "false"]) == 0
    assert not (run / "report.html").exists()
    assert main(["report", "runs/quick", "--no-tsne"]) == 0
    assert (run / "report.html").is_file()


def test_the_report_of_fit_names_the_protocol_and_its_results(work):
    assert main(["fit", "--config", "quick.yaml", "--data.protocol", "Online", "--run.name", "once"]) == 0
    once = read_run(work / "runs" / "once")
    page = (once.folder / "report.html").read_text()
    assert "Protocol online: adapted on" in page and "Prequential accuracy" in page and once.notes == []
    assert once.criterion("adapted", "agreement") is not None and once.calibration_error("initial") is not None
    command = ["fit", "--config", "quick.yaml", "--data.protocol", "Unseen", "--data.protocol.tasks", "[green]"]
    assert main([*command, "--run.name", "other", "--run.report", "false"]) == 0
    other = read_run(work / "runs" / "other")
    panels = [panel for section in run_sections(other, "x") for panel in section.panels]
    assert list(other.merged) == ["red", "blue"] and terms(other) == "unseen, tasks green" and other.notes == []
    assert any("unseen: green" in panel.svg for panel in panels)


def test_report_errors_are_one_message(work, capsys):
    assert main(["report", "nowhere"]) == 2
    assert "results.json" in capsys.readouterr().err


def test_resumed_runs_keep_their_history(work):
    assert main(["fit", "--config", "quick.yaml", "--run.report", "false"]) == 0
    more = ["--trainer.max_steps", "6", "--run.if_exists", "resume", "--run.report", "false"]
    assert main(["fit", "--config", "quick.yaml", *more]) == 0
    assert read_run(work / "runs" / "quick").history.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_method_in_a_users_file_reaches_the_report(work):
    (work / "halves.py").write_text(METHOD)
    command = [sys.executable, "-m", "adaptive_merge", "fit", "--config", "quick.yaml", "--run.name", "mine"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--model.coefficients", "halves.Halves", "--allow-import", "halves"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (work / "runs" / "mine" / "report.html").read_text()
    assert "halves.Halves" in page and "first half" in page
