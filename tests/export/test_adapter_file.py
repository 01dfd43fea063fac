"""The adapter file: bit-equal, by name, and only onto the experts that it was learned on."""

from __future__ import annotations

import json
import random

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.export import load_adapters, save_adapters
from adaptive_merge.export.adapter_file import FORMAT
from adaptive_merge.heads import CosineHead
from adaptive_merge.sealed import load_sealed, save_sealed
from export.export_helpers import build_module, build_tower


def parts():
    return [am.FeatureSurgery(4), am.Tint("head"), am.Tint("proj")]


@pytest.fixture(scope="module")
def adapted():
    return build_module(adapters=parts())


@pytest.fixture
def path(tmp_path, adapted):
    save_adapters(adapted, tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


def blank(**changes):
    module = build_module(**{"adapters": parts()} | changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def test_round_trip_is_bit_equal_and_small(path, adapted):
    module = blank()
    load_adapters(module, path)
    wanted = adapted.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    assert path.stat().st_size < 120_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 9}, "another version of expert 'red'"),
        ({"tower": build_tower(layers=3)}, "another version of the pre-trained model"),
        ({"coefficients": am.TaskWise(0.3)}, "granularity"),
        ({"coefficients": am.LayerWise(0.3, bounds="free")}, "bounds"),
        ({"adapters": [am.FeatureSurgery(8), am.Tint("head"), am.Tint("proj")]}, "adapters"),
        ({"transforms": [am.Ties(0.2)]}, "task vectors"),
    ],
)
def test_what_it_does_not_belong_to_is_refused_and_left_as_it_was(path, changes, message):
    module = blank(**changes)
    with pytest.raises(am.InputError, match=message):
        load_adapters(module, path)
    assert not any(bool(parameter.any()) for parameter in module.parameters())


def test_other_heads_are_refused(path):
    module = blank()
    module.model.heads["grey"] = CosineHead(module.model.heads["grey"].weight + 1e-3)
    with pytest.raises(am.InputError, match="the head of task 'grey'"):
        load_adapters(module, path)


def test_no_damage_goes_unseen(path):
    module, content, random_ = blank(), path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        if random_.random() < 0.3:
            damaged = damaged[: random_.randrange(len(damaged))]
        else:
            damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(am.AdaptiveMergeError):
            load_adapters(module, path)
    with pytest.raises(am.MissingFileError):
        load_adapters(module, path.with_name("gone.safetensors"))


@pytest.mark.parametrize("change", ["manifest", "nan", "shape", "version"])
def test_a_well_sealed_file_of_wrong_content_is_refused(path, change):
    tensors, metadata = load_sealed(path)
    if change == "manifest":
        metadata[FORMAT] = json.dumps({"version": 1, "tasks": 3})
    elif change == "version":
        metadata[FORMAT] = json.dumps({"version": 2})
    elif change == "nan":
        tensors["coefficients.red"] = tensors["coefficients.red"].fill_(float("nan"))
    else:
        tensors["adapters.0.down.0"] = torch.zeros(1, 24)
    save_sealed(path, tensors, metadata)
    module = blank()
    with pytest.raises(am.InputError, match="adapters.safetensors"):
        load_adapters(module, path)
    assert not any(bool(parameter.any()) for parameter in module.parameters())
