"""Nothing in a file is ever run, and no size in it is believed."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import io
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from adaptive_merge.errors import AdaptiveMergeError, InputError
from adaptive_merge.weights import read_head, read_weights
from adaptive_merge.weights.torch_files import open_torch_file
from weights.checkpoint_helpers import assert_same, build_clip, write


class Payload:
    """Pickles as a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


class Trap:
    """Runs when its state is set."""

    def __init__(self, state=None):
        self.state = state

    def __getstate__(self):
        return {"target": self.state}

    def __setstate__(self, state):
        open(state["target"], "w").close()


def payloads(folder, target):
    """Name → object that makes the file `target` when it is unpickled the ordinary way."""
    code = f"open({str(target)!r}, 'w').close()"
    (folder / "evil_module_of_the_test.py").write_text(code)
    (folder / "hubconf.py").write_text(f"dependencies = []\ndef model():\n    {code}\n")
    touch = f"touch {target}"
    bomb = folder / "inner.pt"
    torch.save(Payload(os.system, touch), bomb)
    nested = pickle.dumps(Payload(os.system, touch))
    return {
        "os.system": Payload(os.system, touch),
        "eval": Payload(eval, code),
        "exec": Payload(exec, code),
        "importlib": Payload(importlib.import_module, "evil_module_of_the_test"),
        "subprocess": Payload(subprocess.check_call, ["touch", str(target)]),
        "runpy": Payload(runpy.run_path, str(folder / "evil_module_of_the_test.py")),
        "torch.hub": Payload(functools.partial(torch.hub.load, source="local"), str(folder), "model"),
        "torch.load": Payload(functools.partial(torch.load, weights_only=False), str(bomb)),
        "pickle.loads": Payload(pickle.loads, nested),
        "nested storage": Payload(torch.storage._load_from_bytes, bomb.read_bytes()),
        "partial": Payload(functools.partial(os.system, touch)),
        "Parameter": Payload(torch._utils._rebuild_parameter, Payload(os.system, touch), True, OrderedDict()),
        "__setstate__": Trap(str(target)),
        "OrderedDict": OrderedDict(a=1, b=Payload(eval, code)),
        "OrderedDict's arguments": Payload(OrderedDict, [("a", Payload(eval, code))]),
        "dictionary key": {(1, Payload(eval, code)): 2},
    }


NAMES = [
    *("os.system", "eval", "exec", "importlib", "subprocess", "runpy", "torch.hub", "torch.load", "pickle.loads"),
    *("nested storage", "partial", "Parameter", "__setstate__", "OrderedDict", "OrderedDict's arguments"),
    "dictionary key",
]


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "executed"
    sys.modules.pop("evil_module_of_the_test", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_payloads_of_this_file_are_live(tmp_path, sentinel, name):
    """The control: read the ordinary way, every payload does run, so the next test can fail."""
    path = write({"evil": payloads(tmp_path, sentinel)[name]}, tmp_path / "live.pkl", "pickle")
    with contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())  # noqa: S301
    assert sentinel.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle-2"])
@pytest.mark.parametrize("name", NAMES)
def test_payloads_beside_a_tower_do_not_run_and_do_not_touch_its_tensors(
    tmp_path, sentinel, encoder, tower, name, kind
):
    root = encoder(build_clip())
    root.evil = payloads(tmp_path, sentinel)[name]
    path = write(root, tmp_path / "finetuned.pt", kind)
    assert_same(read_weights(path).tensors, tower)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_payloads_in_a_tensors_place_are_refused(tmp_path, sentinel, tower, name, kind):
    root = OrderedDict(tower, proj=payloads(tmp_path, sentinel)[name])
    path = write(root, tmp_path / "state.pt", kind)
    try:
        found = read_weights(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert found.manifest.projection == "absent"
    assert not sentinel.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_only_a_payload_is_refused(tmp_path, sentinel, name):
    path = write(payloads(tmp_path, sentinel)[name], tmp_path / "head_MNIST.pt", "zip")
    for read in (read_weights, read_head):
        with pytest.raises(InputError, match="head_MNIST.pt"):
            read(path)
    assert not sentinel.exists()


REBUILD = b"ctorch._utils\n_rebuild_parameter\n"
CRAFTED = {
    "INST of protocol 0": b"(S'touch %s'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch %s'\no.",
    "getattr chain": b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(S'os'\ntRS'system'\ntR(S'touch %s'\ntR.",
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93(S'touch %s'\ntR.",
    "persistent id": b"(S'module'\nS'x'\nS'y'\n(S'touch %s'\nios\nsystem\ntQ.",
    "BUILD on a rebuilder": REBUILD + b"(N(S'__defaults__'\n(I1\ntdtb.",
    "BUILD on a class": b"ccollections\nOrderedDict\n(N}S'__init__'\ncos\nsystem\nstb(S'touch %s'\ntR.",
    "extension registry": b"\x82\xf7(S'touch %s'\ntR.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n(S'touch %s'\nt\x81.",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_hand_written_opcodes_do_not_run(tmp_path, sentinel, name):
    copyreg.add_extension("os", "system", 0xF7)
    try:
        pickle.loads(b"\x82\xf7.")  # noqa: S301 - fills the registry's cache, past which find_class is not asked
        path = tmp_path / "crafted.pkl"
        path.write_bytes(CRAFTED[name].replace(b"%s", str(sentinel).encode()))
        with pytest.raises(InputError, match="crafted.pkl"):
            read_weights(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF7)
    assert not sentinel.exists()


def test_the_reader_is_the_same_after_an_attack_on_it(tmp_path, encoder, tower):
    path = tmp_path / "attack.pkl"
    path.write_bytes(CRAFTED["BUILD on a rebuilder"])
    with pytest.raises(InputError, match="nothing in it was run"):
        read_weights(path)
    assert_same(read_weights(write(encoder(build_clip()), tmp_path / "good.pt", "zip")).tensors, tower)


def test_untyped_storages_are_read_and_checked(tmp_path):
    def saved(size, numel):
        class Pickler(pickle.Pickler):
            def persistent_id(self, item):
                return ("storage", torch.UntypedStorage, "0", "cpu", numel) if isinstance(item, Storage) else None

        class Tensor:
            def __reduce__(self):
                arguments = (Storage(numel), 0, size, (1,), False, OrderedDict(), torch.float32)
                return torch._utils._rebuild_tensor_v3, arguments

        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump({"weight": Tensor()})
        with zipfile.ZipFile(tmp_path / "untyped.pt", "w") as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4)[:numel])
        file = open_torch_file(tmp_path / "untyped.pt")
        return file.tensor(file.root["weight"], "weight")

    assert saved((4,), 16).tolist() == [1, 2, 3, 4]
    with pytest.raises(InputError, match="no whole number of torch.float32"):
        saved((3,), 15)
    with pytest.raises(InputError, match="its storage holds 4"):
        saved((5,), 16)


@contextlib.contextmanager
def little_memory(limit=20 << 20):
    """Fails where more than `limit` bytes are allocated at a time inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


class Storage:
    def __init__(self, numel):
        self.numel = numel


class Forged:
    """Pickles as a float tensor of any claimed size, stride and storage."""

    def __init__(self, size, stride, numel, offset=0):
        self.arguments = (Storage(numel), offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def forged_zip(path, tensor, content=bytes(64), compress=zipfile.ZIP_STORED):
    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", item.numel) if isinstance(item, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"class_embedding": tensor})
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/data/0", content)
    return path


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Forged((2**60,), (1,), 16), r"`class_embedding` of size \(1.15e\+18\) needs 1.15e\+18 numbers, .*holds 16"),
        (Forged((2**60,), (1,), 2**60), r"should have 1.15e\+18 numbers of torch.float32, found 64 bytes"),
        (Forged((2**40,), (0,), 16), "needs 1.1e.12 numbers, its storage holds 16"),
        (Forged((4,), (2**62,), 16), "its storage holds 16"),
        (Forged((4,), (1,), 16, offset=2**62), "its storage holds 16"),
        (Forged((4,), (1,), 16, offset=-4), "nothing in it was run"),
        (Forged((4,) * 40, (1,) * 40, 16), "its storage holds 16"),
    ],
)
def test_forged_sizes_are_refused_before_allocation(tmp_path, tensor, message):
    path = forged_zip(tmp_path / "forged.pt", tensor)
    with little_memory(), pytest.raises(InputError, match=message):
        read_weights(path)


def test_zip_bombs_are_refused(tmp_path):
    path = forged_zip(tmp_path / "bomb.pt", Forged((4,), (1,), 2**26), bytes(2**28), zipfile.ZIP_DEFLATED)
    with little_memory(), pytest.raises(InputError, match="is compressed .* unpack to"):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"]r\x00\x00\x00\x02.", id="memo index"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", id="bytes"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"abc.", id="bytearray"),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", id="frame"),
        pytest.param(b"", id="empty"),
        pytest.param(b"(" * 50_000, id="marks"),
    ],
)
def test_pickles_that_ask_for_memory_are_refused(tmp_path, content):
    path = tmp_path / "greedy.pkl"
    path.write_bytes(content)
    with little_memory(), pytest.raises(InputError, match="greedy.pkl"):
        read_weights(path)


@pytest.mark.parametrize("claim", [2**60, 65, 63, -1])
def test_legacy_storages_that_claim_another_size_are_refused(tmp_path, tower, claim):
    path = write(tower, tmp_path / "legacy.pt", "legacy")
    content = path.read_bytes()
    numel = struct.pack("<q", tower["class_embedding"].numel())
    at = content.index(numel + tower["class_embedding"].numpy().tobytes())
    path.write_bytes(content[:at] + struct.pack("<q", claim) + content[at + 8 :])
    with little_memory(), pytest.raises(InputError, match="claims .* numbers, expected 64 numbers within the file"):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack("<Q", 2**60) + b"{}", id="header of 2^60 bytes"),
        pytest.param(
            (lambda h: struct.pack("<Q", len(h)) + h)(
                b'{"class_embedding":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
            )
            + bytes(4),
            id="tensor of 2^60 numbers",
        ),
    ],
)
def test_forged_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_weights(path)


def test_module_trees_without_end_are_refused(tmp_path, strangers):
    root = torch.nn.Module()
    root._modules["again"] = root
    with pytest.raises(InputError, match="modules nested more than"):
        read_weights(write(root, tmp_path / "loop.pt", "pickle"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_files_give_our_error_or_load(tmp_path, encoder, tower, kind):
    path = tmp_path / "file"
    if kind == "safetensors":
        save_file(tower, path)
    else:
        write(encoder(build_clip()), path, kind)
    content, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        place = generator.randrange(min(len(content), 20_000)) * generator.choice((1, -1))
        if generator.random() < 0.3:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << generator.randrange(8)
        path.unlink()
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except AdaptiveMergeError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30


def test_a_safetensors_file_under_another_suffix_is_recognised(tmp_path, tower):
    path = tmp_path / "renamed.pt"
    save_file(tower, path)
    assert_same(read_weights(path).tensors, tower)
