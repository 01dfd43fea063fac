"""The notebook of the documentation runs from top to bottom, in a kernel of its own."""

import json
import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "adapt.ipynb"


def test_the_notebook_adapts_and_predicts(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(NOTEBOOK.parents[2]), os.getenv("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    fit, average, names, same = [cell.outputs for cell in book.cells if cell.cell_type == "code"][1:]
    text = "".join(str(output) for output in fit)
    assert "accuracy in %" in text and "the run is in runs/notebook" in text
    assert "Epoch 0" not in text and "_CloseBank" not in text and "Warning" not in text
    results = json.loads((tmp_path / "runs" / "notebook" / "results.json").read_text())
    adapted = results["average"]["adapted"]
    assert adapted > results["average"]["initial"]
    assert str(round(100 * adapted, 1)) in average[-1]["data"]["text/plain"]
    assert names[-1]["data"]["text/plain"].count("'") == 16 and same[-1]["data"]["text/plain"] == "True"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
