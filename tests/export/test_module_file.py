"""Routed models leave the run whole: one sealed file that needs no expert, or a graph."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from users_method import Router

import adaptive_merge as am
from adaptive_merge.export import export_model
from adaptive_merge.sealed import load_sealed
from export.export_helpers import CLASSES, build_module

ROUTES = {
    "wemoe": lambda: {"adapters": [am.WEMoE(8), am.Tint("head")]},
    "e_wemoe": lambda: {"adapters": [am.EWEMoE(0.1, 8)], "coefficients": am.LayerWise(0.3)},
    "smile": lambda: {"adapters": [am.SMILE(4, 2)], "coefficients": am.Fixed(0.0)},
    "mass": lambda: {"adapters": [am.MASS()], "transforms": [am.TSVM()], "coefficients": am.Fixed(1.0)},
    "twin": lambda: {"adapters": [am.Twin(0.2, 8), am.FeatureSurgery(2)], "coefficients": am.Fixed(0.3)},
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_module_file_says_what_the_run_says_without_its_experts(tmp_path, name, batch):
    module = build_module(**ROUTES[name]())
    assert "largest difference" in export_model(module, tmp_path / "out", "module")
    loaded = am.load_module(tmp_path / "out")
    with torch.no_grad():
        for task in CLASSES:
            torch.testing.assert_close(loaded(task, batch), module(task, batch), rtol=1e-6, atol=1e-5)
        expected = module.predict(batch)
    tasks, classes = loaded.predict(batch)
    assert tasks == expected[0] and torch.equal(torch.cat(classes), torch.cat(expected[1]))
    with pytest.raises(am.InputError, match="mixes weights image by image.* Export it as module or onnx"):
        export_model(module, tmp_path / "plain", "safetensors")


@pytest.mark.parametrize("name", ["wemoe", "e_wemoe", "smile", "mass", "twin"])
def test_a_routes_graph_is_exact(tmp_path, name):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is an optional package and is not installed")
    module = build_module(**ROUTES[name]())
    assert "largest difference" in export_model(module, tmp_path / "out", "onnx", task="red")


def test_code_of_ones_own_and_changed_files_are_refused(tmp_path):
    module = build_module(adapters=[Router(2)])
    with pytest.raises(am.InputError, match="Router is code of its own"):
        export_model(module, tmp_path / "own", "module")
    export_model(build_module(**ROUTES["smile"]()), tmp_path / "out", "module", check=False)
    file = tmp_path / "out" / "module.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(am.InputError, match="its digest does not fit"):
        am.load_module(tmp_path / "out")
    with pytest.raises(am.InputError, match="not a module file"):
        am.load_module(tmp_path / "out" / "adapters.safetensors")
    assert load_sealed(tmp_path / "out" / "adapters.safetensors")
