"""A form that a user adds in a file of its own is read like those that ship; here one that needs the base."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from data.data_sets import save
from open_clip.model import CLIP
from safetensors.torch import save_file

import adaptive_merge as am
from adaptive_merge.weights import Reader, read_weights
from weights.checkpoint_helpers import TOWER

USERS_FILE = """
import dataclasses, json
from safetensors.torch import load_file
from adaptive_merge.errors import InputError
from adaptive_merge.weights import Reader, Weights


class Change(Reader):
    expects = "change.json with change.safetensors (a change)"

    def accepts(self, path):
        return (path / "change.json").is_file()

    def read(self, path, base=None):
        if base is None:
            raise InputError(f"`{path}`: holds a difference to a pre-trained tower; give it as `base=`")
        scale = json.loads((path / "change.json").read_text())["lora_alpha"]
        factors, tensors = load_file(path / "change.safetensors"), dict(base.tensors)
        for name in [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]:
            tensors[name] = tensors[name] + scale * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        return Weights(tensors, dataclasses.replace(base.manifest, source=str(path), format="change"))
"""
NAME = "transformer.resblocks.1.mlp.c_fc.weight"


@pytest.fixture
def users_file(tmp_path, monkeypatch):
    """The user's module, imported; forgotten after the test."""
    monkeypatch.setattr(Reader, "kinds", [*Reader.kinds])
    (tmp_path / "users_change.py").write_text(USERS_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("users_change")
    yield
    del sys.modules["users_change"]


@pytest.fixture
def folder(tmp_path, tower):
    """A folder as a user keeps it, and the matrix that it adds."""
    low, high = torch.randn(2, 64), torch.randn(256, 2)
    (tmp_path / "change").mkdir()
    (tmp_path / "change" / "change.json").write_text(json.dumps({"lora_alpha": 0.5}))
    save_file({f"{NAME}.lora_A": low, f"{NAME}.lora_B": high}, tmp_path / "change" / "change.safetensors")
    return tmp_path / "change", 0.5 * high @ low


def test_without_the_users_file_the_known_forms_are_listed(folder):
    with pytest.raises(
        am.InputError,
        match="expected open_clip_config.json .* or adapter_config.json .* or config.json .* or a .safetensors",
    ):
        read_weights(folder[0])


def test_a_users_form_is_read_with_the_base(users_file, folder, tmp_path, tower):
    save_file(tower, tmp_path / "base.safetensors")
    base = read_weights(tmp_path / "base.safetensors", quick_gelu=True)
    expert = read_weights(folder[0], base=base)
    assert torch.allclose(expert.tensors[NAME] - base.tensors[NAME], folder[1], atol=1e-6)
    assert (expert.manifest.format, expert.manifest.source) == ("change", str(folder[0]))
    with pytest.raises(am.InputError, match="does not fit `quick_gelu=`"):
        read_weights(folder[0], base=base, quick_gelu=False)
    with pytest.raises(am.InputError, match="give it as `base=`"):
        read_weights(folder[0])


def test_a_suite_takes_an_expert_in_a_users_form(users_file, folder, tmp_path, clip: CLIP, tower):
    torch.save(clip.state_dict(), tmp_path / "pretrained.pt")
    torch.save({"weight": torch.randn(2, 24)}, tmp_path / "head.pt")
    (tmp_path / "tower.json").write_text(json.dumps({**TOWER, "quick_gelu": True}))
    for index in range(4):
        save(tmp_path / "birds" / ("owl", "jay")[index % 2] / f"{index}.png", index)
    suite = am.ClipSuite(
        architecture=str(tmp_path / "tower.json"),
        pretrained=str(tmp_path / "pretrained.pt"),
        experts={"birds": str(folder[0])},
        tasks=["birds"],
        heads={"birds": str(tmp_path / "head.pt")},
        folders={"birds": str(tmp_path / "birds")},
        cache=str(tmp_path / "cache"),
    )
    bank = am.load_clip_suite(suite).task_vectors
    part = bank.layout.slices[bank.names.index(NAME)]
    assert torch.allclose(bank.vectors[0, part].view(256, 64), folder[1], atol=1e-5)
    assert bank.vectors[0].count_nonzero() == bank.vectors[0, part].count_nonzero()
