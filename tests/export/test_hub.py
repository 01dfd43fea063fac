"""Push to a hub and read from it, with the real client against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import REVISION, hub_server
from safetensors.torch import save_file

import adaptive_merge as am
from adaptive_merge.export import export_model
from adaptive_merge.export.hub import push

PUSH = """
import sys
from adaptive_merge.errors import InputError
from adaptive_merge.export.hub import push
try:
    print(push(sys.argv[1], sys.argv[2], private=True))
except InputError as error:
    print(error); sys.exit(2)
"""
READ = """
import sys
from adaptive_merge.errors import MissingFileError
from adaptive_merge.weights import read_weights
base = None
for name in sys.argv[1:]:
    try:
        base = read_weights(name, base=base)
        print(base.manifest.format, base.manifest.revision, len(base.tensors), *base.manifest.notes, sep="|")
    except MissingFileError as error:
        print(error)
"""


@pytest.fixture
def client(tmp_path):
    """Runs a program whose hub client talks to a server here: its settings are read when it is imported."""

    def run(code, server, *arguments, token="hf_test", **settings):
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")} | settings
        environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def folder(tmp_path, module):
    export_model(module, tmp_path / "out", "safetensors", base_models=["openai/clip", "me/cars"])
    return tmp_path / "out"


def test_a_pushed_folder_is_the_exported_one(folder, client):
    with hub_server() as server:
        code, words = client(PUSH, server, str(folder), "me/merged")
        assert code == 0, words
        assert words.split()[-1].endswith("/me/merged")
        pushed = server.repositories["me/merged"]
        assert server.private == {"me/merged": True}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: content for name, content in pushed.items() if name in files} == files
    card = files["README.md"].decode()
    assert card.split("---")[1].split("\ntags")[0].splitlines()[2:] == [
        "base_model:",
        "- openai/clip",
        "- me/cars",
        "base_model_relation: merge",
    ]


def test_without_a_right_to_write_the_folder_stays(folder, client):
    with hub_server() as server:
        code, words = client(PUSH, server, str(folder), "me/merged", token="hf_wrong")
    assert code == 2 and "cannot be pushed" in words and "hf auth login" in words and "Traceback" not in words
    assert (folder / "model.safetensors").is_file()


def test_a_repository_has_an_owner():
    for name in ("merged", "a/b/c", "me/", "/me", "me/mer ged"):
        with pytest.raises(am.InputError, match="<user or organisation>/<name>"):
            push("out", name)


def test_experts_are_read_from_a_hub_pinned_and_offline(tmp_path, module, client):
    export_model(module, tmp_path / "out", "open_clip")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    repositories = {"me/expert": files, "me/lora": lora(tmp_path, module)}
    pinned = [f"hf-hub:me/expert@{REVISION}", f"hf-hub:me/lora@{REVISION}"]
    with hub_server(**repositories) as server:
        code, words = client(READ, server, "hf-hub:me/expert", *pinned, "hf-hub:me/nobody")
        assert code == 0, words
        lines = words.splitlines()
        count = len(module.merged_state_dict())
        assert lines[0].startswith(f"open_clip|{REVISION}|{count}|") and "revision not pinned" in lines[0]
        assert lines[1].startswith(f"open_clip|{REVISION}|{count}") and "revision not pinned" not in lines[1]
        assert lines[2].startswith(f"lora|{REVISION}|{count}")
        assert "cannot be had from the Hugging Face hub" in lines[3]
        asked = len(server.asked)
        code, words = client(READ, server, *pinned, HF_HUB_OFFLINE="1")
        assert (code, words.splitlines(), len(server.asked)) == (0, lines[1:3], asked)


def lora(folder, module):
    """The files of an adapter of the module's tower."""
    name = "base_model.model.transformer.resblocks.0.mlp.c_fc"
    width = module.model.backbone.skeleton.transformer.width
    factors = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(2 * width, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    return {
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode(),
    }
