"""configs/clip/: what the script writes, and each file a configuration that the command line takes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import pytest
import yaml

from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.suites.clip_folder import read_clip_suite

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "clip").rglob("*.yaml"))
per_folder = pytest.mark.parametrize(
    "folder", sorted({path.parent for path in CONFIGS}), ids=lambda path: f"{path.parent.name}-{path.name}"
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_clip_configs", ROOT / "scripts" / "make_clip_configs.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_committed_files_are_those_of_the_script(script):
    files = script.files()
    assert {path for path in (ROOT / "configs" / "clip").rglob("*") if path.is_file()} == set(files)
    assert [path for path, content in files.items() if path.read_text() != content] == []
    assert len(CONFIGS) == 3 * 3 * len(script.METHODS)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@per_folder
def test_each_configuration_parses(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (path for path in CONFIGS if path.parent == folder):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as end:
            AdaptiveMergeCLI(args=["fit", "--config", str(path), "--print_config"])
        assert end.value.code in (0, None), path
        found = yaml.safe_load(told.getvalue())
        assert found["model"]["recipe"] == path.stem and found["suite"]["name"] == str(folder.relative_to(ROOT))
        header = path.read_text().splitlines()[:2]
        assert all(line.startswith("# ") and len(line) <= 130 for line in header)


@per_folder
def test_each_suite_is_one_that_the_reader_takes(folder, monkeypatch):
    monkeypatch.setenv("CLIP_CHECKPOINTS", "/checkpoints")
    monkeypatch.setenv("CLIP_DATA", "/data")
    suite = read_clip_suite(folder, json.loads((folder / "suite.json").read_text()))
    assert f"{len(suite.tasks)}tasks" == folder.name and suite.architecture.endswith("-quickgelu")
    assert suite.expert_path("MNIST").startswith("/checkpoints/") and suite.data == "/data"
