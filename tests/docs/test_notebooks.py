"""The notebooks of the documentation run from top to bottom, each in a kernel of its own, and gain what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Runs a notebook in a clean folder; what each of its code cells has shown, as text."""
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name):
        book = nbformat.read(ROOT / "docs" / "notebooks" / name, as_version=4)
        nbclient.NotebookClient(book, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
        cells = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
        shown = ["".join(part.get("text", "") or str(part.get("data", "")) for part in cell) for cell in cells]
        assert not any("Warning" in text.replace("TqdmWarning", "") for text in shown)  # tqdm: of no ipywidgets
        return shown

    return run


def average(folder):
    return json.loads((folder / "results.json").read_text())["average"]


def test_adapt_and_look(outputs, tmp_path):
    fit, table, picture, names, same = outputs("adapt.ipynb")[1:]
    assert "accuracy in %" in fit and "the run is in runs/notebook" in fit
    assert "Epoch 0" not in fit and "_CloseBank" not in fit
    found = average(tmp_path / "runs" / "notebook")
    assert found["adapted"] > found["initial"]
    assert str(round(100 * found["adapted"], 1)) in table
    assert "image/png" in picture and names.count("'") > 16 and "True" in same


def test_write_a_method(outputs, tmp_path):
    *_, agreement, accuracy = outputs("method.ipynb")
    found = average(tmp_path / "runs" / "mine")
    assert found["adapted"] > found["initial"]
    assert str(round(100 * found["adapted"], 1)) in accuracy
    assert "entropy" in agreement and "mine" in agreement


def test_bring_your_own_experts(outputs, tmp_path):
    *_, forms, fit, _ = outputs("experts.ipynb")
    assert "lora" in forms.lower() and "protocol holdout" in fit
    found = average(tmp_path / "runs" / "mine")
    assert found["initial"] > found["anchor"] > found["pretrained"]
    assert (tmp_path / "merged.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_they_are_kept_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
