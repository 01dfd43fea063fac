# ruff: noqa: E501 (opcodes of one bomb stay on one line)
"""Files that ask for years or terabytes: each is refused within seconds, in little memory, and nothing is fetched."""

import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import write_manifest, write_suite
from PIL import Image
from processes import crowding
from safetensors.torch import save_file

import adaptive_merge as am
from adaptive_merge import limits
from adaptive_merge.__main__ import main
from adaptive_merge.data.sources import folder_source
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.weights import read_head, read_weights
from adaptive_merge.weights.clip import read_architecture
from adaptive_merge.weights.text_tower import read_text_tower

SECONDS, MEMORY = 60, 1 << 30  # what the bombs ask for is years and terabytes


@pytest.fixture(autouse=True)
def quick():
    """No test of this file takes long or grows the process much, whatever the machine is doing else."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.perf_counter() - began < SECONDS * crowding()
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever reaches for the network fails the test by an error that nothing answers."""

    def refuse(*address, **_):
        raise SystemExit(f"reached for {address}")

    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def doubled(start: bytes, times: int = 60) -> bytes:
    """Opcodes of a value that holds the one before it twice, `times` over; it alone is left on the stack."""
    return start + b"q\x00" + b"0h\x00h\x00\x86q\x00" * times


DAG = doubled(b")")
ENCODE = (
    b"c_codecs\nencode\nq\x01X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x02X\x06\x00\x00\x00latin1q\x03"
)
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
RECORD = STORAGE + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
BOMBS = {
    "hash of a key": b"\x80\x02}" + DAG + b"K\x01s.",
    "hash of many keys": b"\x80\x02}(" + DAG + b"K\x01" + b"h\x00K\x02" + b"u.",
    "hash of a key in DICT": b"(" + DAG + b"K\x01d.",
    "hash in a set": b"\x80\x04\x8f(" + DAG + b"\x90.",
    "hash in a frozenset": b"\x80\x04(" + DAG + b"\x91.",
    "hash in OrderedDict": b"\x80\x02ccollections\nOrderedDict\n](" + DAG + b"K\x01\x86e\x85R.",
    "str of a persistent id": b"\x80\x02" + DAG + b"Q.",
    "str of a storage key": b"\x80\x02" + STORAGE + DAG + b"X\x03\x00\x00\x00cpuK\x10tQ.",
    "repr of a storage's type": b"\x80\x02(X\x07\x00\x00\x00storage"
    + DAG
    + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ.",
    "repr of a storage's size": b"\x80\x02" + STORAGE + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + DAG + b"tQ.",
    "repr of a tensor's size": b"\x80\x02" + REBUILD + b"(" + RECORD + b"K\x00" + DAG + b"K\x01\x85tR.",
    "repr of a tensor's stride": b"\x80\x02" + REBUILD + b"(" + RECORD + b"K\x00K\x01\x85" + DAG + b"tR.",
    "a huge tensor size": b"\x80\x02"
    + REBUILD
    + b"("
    + RECORD
    + b"K\x00\x8b"
    + struct.pack("<I", 10_000)
    + b"\x7f" * 10_000
    + b"\x85K\x01\x85tR.",
    "BUILD on a tensor": b"\x80\x02"
    + REBUILD
    + b"("
    + RECORD
    + b"K\x00K\x10\x85K\x01\x85tR}X\x04\x00\x00\x00size"
    + DAG
    + b"sb.",
    "encode again and again": b"\x80\x02](" + ENCODE + b"0" * 3 + b"(" + b"h\x01h\x02h\x03\x86R" * 5_000 + b"te.",
    "OrderedDict of an OrderedDict": b"\x80\x02]("
    + b"ccollections\nOrderedDict\nq\x01}("
    + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(60_000))
    + b"uq\x02"
    + b"h\x01h\x02\x85R" * 20_000
    + b"e.",
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 40_000))
    + b"u.",
    "many tuples as keys": b"\x80\x02}("
    + b"".join(b"M" + struct.pack("<H", i) + b"\x85N" for i in range(50_000))
    + b"u.",
    "wide tuples in a key": b"\x80\x02}(" + b"N" * 50_000 + b"tq\x00(" + b"h\x00" * 50_000 + b"tN" + b"s.",
    "opcodes": b"\x80\x02" + b"N0" * (limits.OPCODES // 2 + 1) + b"N.",
    "legacy protocol that is a bomb": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    + b"\x80\x02"
    + DAG
    + b"."
    + b"\x80\x02}.",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_pickles_that_take_years_are_refused(tmp_path, name, form):
    path = tmp_path / "bomb.pt"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", BOMBS[name])
            archive.writestr("archive/data/0", bytes(64))
    else:
        path.write_bytes(BOMBS[name])
    for read in (read_weights, read_head):
        with pytest.raises(am.InputError, match="bomb.pt"):
            read(path)


def test_the_bombs_are_live():
    """The control: ordinary unpickling of one that is a little smaller takes time, so that the limit is needed."""
    small = b"\x80\x02}" + doubled(b")", times=22) + b"K\x01s."
    began = time.perf_counter()
    pickle.loads(small)  # noqa: S301
    assert time.perf_counter() - began > 0.02


def test_tensors_that_share_their_numbers_without_end_are_refused(tmp_path):
    whole = torch.zeros(1000, 1000)
    path = tmp_path / "shared.pt"
    torch.save({f"visual.{i}": whole.t() for i in range(50)} | {"visual.class_embedding": whole}, path)
    with pytest.raises(am.InputError, match="the same ones again and again"):
        read_weights(path)


@pytest.mark.parametrize("number", ["999999999", "1000000", "4", "9" * 30])
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_block_number_is_not_believed(tmp_path, number, form):
    from adaptive_merge.suites.embedded_tower import build_encoder

    state = {name: value.clone() for name, value in build_encoder().state_dict().items()}
    state[f"transformer.resblocks.{number}.ln_1.weight"] = torch.zeros(128)
    path = tmp_path / f"tower.{form}"
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    with pytest.raises(am.InputError, match="tower"):
        read_weights(path)


@pytest.mark.parametrize("layers", [10**9, -1, 0, 1.5, "12", None, [3], True, 10**40])
def test_layers_in_a_configuration_are_not_believed(tmp_path, layers):
    vision = {"layers": layers, "width": 128, "patch_size": 8, "image_size": 32}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": {"layers": layers}}))
    with pytest.raises(am.InputError, match="model.json"):
        read_architecture(str(path))


def safetensors_with(header: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + body


@pytest.mark.parametrize(
    "content",
    [
        safetensors_with(b"{}", 2**60),
        safetensors_with(b"{}", limits.HEADER_BYTES + 1),
        safetensors_with(b" " * (limits.HEADER_BYTES + 1)),
        safetensors_with(b'{"' + b"x" * 5000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', body=bytes(4)),
        safetensors_with(b"[" * 100_000),
        safetensors_with(
            json.dumps(
                {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(limits.TENSORS + 1)}
            ).encode()
        ),
    ],
    ids=["2^60", "over the limit", "blank", "long name", "nested", "many tensors"],
)
def test_safetensors_headers_have_a_limit(tmp_path, content):
    path = tmp_path / "header.safetensors"
    path.write_bytes(content)
    with pytest.raises(am.InputError, match="header.safetensors"):
        read_weights(path)
    if len(content) < limits.HEADER_BYTES:
        main(["inspect", str(path)])


def overlapping(path, name="archive/data.pkl", entries=2000, size=1 << 20):
    """A zip of one stored record that its directory lists many times: some kilobytes that unpack to gigabytes."""
    body = bytes(size)
    crc = zlib.crc32(body)
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name.encode()
    directory = b""
    for number in range(entries):
        own = name if number == 0 else f"archive/data/{number}"
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, crc, size, size, len(own), 0, 0, 0, 0, 0, 0
        )
        directory += own.encode()
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries, entries, len(directory), len(local) + size, 0)
    path.write_bytes(local + body + directory + end)
    return path


def test_zips_whose_records_overlap_are_refused(tmp_path):
    path = overlapping(tmp_path / "overlap.pt")
    with pytest.raises(am.InputError, match="overlap"):
        read_weights(path)
    with pytest.raises(am.InputError, match="overlap"):
        read_checkpoint(path)


def test_a_zip_with_a_directory_without_end_is_refused(tmp_path):
    path = tmp_path / "directory.pt"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, limits.DIRECTORY_BYTES + 46, 30, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(limits.DIRECTORY_BYTES + 200) + end)
    with pytest.raises(am.InputError, match="directory.pt"):
        read_weights(path)


def test_an_npz_that_unpacks_to_gigabytes_is_refused(tmp_path):
    folder = write_suite(tmp_path)
    path = folder / "images" / "red.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**21, 32, 32)})
        with archive.open("test_images.npy", "w", force_zip64=True) as record:
            record.write(header.getvalue())
            for _ in range(32):
                record.write(bytes(1 << 20))
        archive.writestr("test_labels.npy", b"")
    content = path.read_bytes()
    path.write_bytes(content)
    write_manifest(folder)
    with pytest.raises(am.InputError, match="red.npz"):
        _ = am.load_suite(str(folder)).images["red"]


def png(width: int, height: int) -> bytes:
    """A gray PNG of one colour, written by hand, row by row."""
    squeeze, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(squeeze.compress(bytes(width + 1)))
    data = b"".join(rows) + squeeze.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "content",
    [
        png(600_000, 1),
        png(1, 600_000),
        png(12_000, 12_000),
        png(96 * 20, 20 - 1),
        EPS,
        b"\x0a\x05\x01\x08" + bytes(200),  # PCX
        b"8BPS\x00\x01" + bytes(40),  # PSD
        b"icns" + struct.pack(">I", 40) + bytes(32),
        b"BM"
        + struct.pack("<IHHI", 2**31, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        b"P6\n99999 99999\n255\n",
        b"P6\n" + b"9" * 5000 + b" 1\n255\n",
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        b"II*\x00\x08\x00\x00\x00"
        + struct.pack("<H", 2)
        + struct.pack("<HHII", 256, 4, 1, 2**31 - 1)
        + struct.pack("<HHII", 257, 4, 1, 2**31 - 1)
        + bytes(4),
    ],
    ids=["wide", "tall", "large", "narrow", "EPS", "PCX", "PSD", "ICNS", "BMP", "PPM", "PPM number", "GIF", "TIFF"],
)
def test_images_that_unpack_to_gigabytes_or_start_programs_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    place = tmp_path / "class"
    place.mkdir()
    (place / "a.png").write_bytes(content)
    with pytest.raises(am.InputError, match="a.png"):
        folder_source(tmp_path).load(0)


def test_an_image_just_within_the_limit_is_read(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(png(95 * 20, 20))
    assert folder_source(tmp_path).load(0).size == (1900, 20)
    Image.new("RGB", (5, 5)).save(tmp_path / "class" / "b.jpg", format="GIF")  # a wrong suffix is common
    assert folder_source(tmp_path).load(1).mode == "RGB"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp"])
def test_a_pipe_that_is_named_like_an_image_is_not_waited_for(tmp_path, name):
    (tmp_path / "class").mkdir()
    os.mkfifo(tmp_path / "class" / name)
    with pytest.raises(am.InputError):
        folder_source(tmp_path).load(0)


def aliases(levels: int = 9, start: str = "[x,x,x,x,x,x,x,x,x,x]", each: str = "[{}]") -> str:
    lines = [f"a0: &a0 {start}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} " + each.format(",".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines) + "\n"


MAPS = "b0: &b0 {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{{', '.join(f'k{j}: *b{i - 1}' for j in range(10))}}}\n" for i in range(1, 9)
)
TEXTS = {
    "aliases": aliases(),
    "aliases of mappings": MAPS,
    "an alias of itself": "model: &a {x: *a}\n",
    "a list of itself": "model: &a [*a]\n",
    "deep lists": "model: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(1500)),
    "large": "# " + "x" * limits.TEXT_BYTES,
    "many values": "model: [" + "1," * (limits.VALUES + 1) + "]",
    "a long number": "model: " + "1" * 5000,
    "a tag": "model: !!python/object/apply:os.system ['touch touched']",
    "a float of nothing": "model: !!float ''",
    "a date": "model: 2020-13-45",
    "not text": b"\xff\xfe\x00",
    "null bytes": b"model: \x00\n",
    "a merge of a bomb": aliases(8) + "model:\n  <<: {x: *a7}\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("command", ["fit", "merge", "nested"])
def test_configurations_have_a_limit(tmp_path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    text = TEXTS[name]
    (tmp_path / "hostile.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    if command == "nested":
        (tmp_path / "top.yaml").write_text("model: {coefficients: hostile.yaml}\n")
    arguments = {"fit": ["fit", "--config", "hostile.yaml"], "merge": ["merge", "hostile.yaml"]}
    assert main(arguments.get(command, ["fit", "--config", "top.yaml"])) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error) < 5000
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "top.yaml") == ["hostile.yaml"]


@pytest.mark.parametrize("text", [aliases(), MAPS, "[" * 3000 + "]" * 3000], ids=["aliases", "mappings", "deep"])
@pytest.mark.parametrize("option", ["--config", "--model.coefficients", "--suite.tasks", "--trainer.callbacks"])
def test_settings_on_the_command_line_too(tmp_path, monkeypatch, capsys, text, option):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "adamerging", option, text]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, '{"tasks": NaN}', '{"tasks": ' + "[1," * 300 + "1" + "]" * 300 + "}"],
    ids=["lists", "objects", "number", "NaN", "levels"],
)
def test_json_has_a_limit(tmp_path, content, capsys):
    (tmp_path / "suite.json").write_text(content)
    (tmp_path / "results.json").write_text(content)
    for arguments in (["data", "check", str(tmp_path)], ["report", str(tmp_path)], ["inspect", str(tmp_path)]):
        code = main(arguments)
        assert code == 2 or (code == 0 and arguments[0] == "inspect")
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9/x.yaml", "https://example.org/x", "ftp://a/x.yaml", "s3://bucket/x.yaml", "github://a:b@/x.yaml",
     "memory://x.yaml", "file:///etc/passwd", "hf://org/x.yaml", "data:text/plain,a", "zip://a.yaml::http://b/c.zip"],
)  # fmt: skip
@pytest.mark.parametrize(
    "option", ["--config", "--model", "--model.coefficients", "--trainer.logger", "--ckpt_path", "--suite.name"]
)
def test_no_address_is_fetched(tmp_path, monkeypatch, capsys, address, option):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "adamerging", option, address]) == 2
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["merge", "export"])
def test_no_address_is_fetched_for_a_merge(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    more = ["--format", "open_clip", "--output", "out"] if command == "export" else []
    assert main([command, "http://127.0.0.1:9/x.yaml", *more]) == 2


@pytest.mark.parametrize(
    "name", ["hf-hub:org/name", "local-dir:/tmp/x", "https://a/b.json", "hf-hub:../x", "ViT-B-32/../x"]
)
def test_an_architecture_is_looked_up_nowhere(tmp_path, name):
    with pytest.raises(am.AdaptiveMergeError):
        read_architecture(name)


def test_a_text_towers_configuration_does_not_build_a_billion_layers(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"text_cfg": {"layers": 10**9, "heads": 3}}})
    )
    tensors = {"token_embedding.weight": torch.zeros(9, 64), "positional_embedding": torch.zeros(9, 64)}
    save_file(
        tensors | {"text_projection": torch.zeros(64, 64), "visual.x": torch.zeros(1)},
        tmp_path / "open_clip_model.safetensors",
    )
    with pytest.raises(am.InputError):
        read_text_tower(str(tmp_path))


def test_tune_imports_nothing_from_the_working_directory(tmp_path, monkeypatch, suite_folder):
    from adaptive_merge.cli import tune

    for name in ("yaml", "torch", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = tune._fit(["--help"], tmp_path / "logs" / "fit.log")
    assert code == 0 and not (tmp_path / "touched").exists()
    assert "--trainer" in (tmp_path / "logs" / "fit.log").read_text()


@pytest.mark.parametrize("settings", [["--trainer.max_steps", "-1"], []], ids=["-1", "none"])
def test_a_run_that_nothing_ends_is_refused(tmp_path, monkeypatch, capsys, suite_folder, settings):
    monkeypatch.chdir(tmp_path)
    given = "max_steps: 3" if settings else "accelerator: cpu"
    config = f"suite: {{name: {suite_folder}}}\nmodel: {{coefficients: LayerWise}}\ntrainer: {{{given}}}\n"
    (tmp_path / "endless.yaml").write_text(config)
    assert main(["fit", "--config", "endless.yaml", *settings]) == 2
    assert "nothing ends this run" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_run_that_something_else_ends_is_not(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    quiet = "enable_progress_bar: false, accelerator: cpu"
    for name, part in (("online", "data: {protocol: Online, images_per_task: 24}"), ("dev", "run: {report: false}")):
        ending = ", fast_dev_run: true" if name == "dev" else ""
        text = f"suite: {{name: {suite_folder}}}\nmodel: {{coefficients: LayerWise}}\n{part}\ntrainer: {{{quiet}{ending}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["fit", "--config", f"{name}.yaml", "--run.name", name]) == 0
