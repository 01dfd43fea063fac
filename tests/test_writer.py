"""One writer for all files: atomic, as the umask says, over regular files only, and one message for an error."""

import logging
import os
import resource
import stat

import pytest
import torch
from processes import start, texts, wait
from safetensors.torch import load_file

from adaptive_merge.coefficients.files import save_coefficients
from adaptive_merge.errors import InputError, StorageError
from adaptive_merge.files import check_output, replacing, reserve, save_json, save_tensors, save_text, sparing
from adaptive_merge.sealed import load_sealed, save_sealed

WRITERS = {
    "text": lambda path: save_text(path, "x" * 9000),
    "json": lambda path: save_json(path, {"x": "y" * 9000}),
    "tensors": lambda path: save_tensors(path, {"x": torch.zeros(9000)}),
    "sealed": lambda path: save_sealed(path, {"x": torch.zeros(9000)}, {}),
    "coefficients": lambda path: save_coefficients(path.with_suffix(".json"), {"a": {"x" * 5000: 1.0}}),
}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("kind", list(WRITERS))
def test_the_umask_decides(tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        WRITERS[kind](tmp_path / "file.json")
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("target", ["link", "dangling", "fifo", "folder", "device"])
def test_only_regular_files_are_replaced(tmp_path, kind, target):
    path, other = tmp_path / "file.json", tmp_path / "other"
    if target == "link":
        other.write_text("mine")
    if target in ("link", "dangling"):
        path.symlink_to(other)
    elif target == "fifo":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        path = type(path)("/dev/null") if kind != "coefficients" else pytest.skip("it names its own suffix")
    before = path.lstat().st_mode
    with pytest.raises(InputError, match="is not replaced"):
        WRITERS[kind](path)
    assert path.lstat().st_mode == before and os.path.lexists(path)
    assert not other.exists() or other.read_text() == "mine"


def fill(kind, path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        WRITERS[kind](path)
    except StorageError as error:
        os.write(1, f"{error}\n".encode())
        return 0
    return 3


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "file.json"
    path.write_text("before")
    (tmp_path / "words").mkdir()
    assert wait(start(fill, kind, path, log=tmp_path / "words" / "x.log"), 60) == 0, texts(tmp_path / "words")
    assert f"{path}: cannot be written" in texts(tmp_path / "words")
    assert path.read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.json", "words"]


def test_an_error_of_the_writer_itself_stays_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="mine"), replacing(tmp_path / "file"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_needs_force(tmp_path):
    path = tmp_path / "out"
    check_output(path, force=False)
    path.touch()
    check_output(path, force=True)
    with pytest.raises(InputError, match="--force"):
        check_output(path, force=False)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="is a link"):
        check_output(tmp_path / "link", force=True)


def test_what_is_not_the_result_costs_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with sparing(tmp_path / "plot"):
                raise OSError(28, "No space left on device")
    assert caplog.text.count("the run goes on without it") == 1
    with pytest.raises(KeyboardInterrupt), sparing(tmp_path / "plot"):
        raise KeyboardInterrupt


def reserve_too_much(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        reserve(path, 200_000)
    except StorageError as error:
        return 0 if "cannot be reserved" in str(error) else 4
    return 3


def test_room_for_a_map_is_taken_before_it_is_used(tmp_path):
    path = tmp_path / "map"
    reserve(path, 100_000)
    assert path.stat().st_blocks * 512 >= 100_000
    with path.open("r+b") as file:
        file.write(b"kept")
    reserve(path, 150_000)
    assert path.stat().st_size == 150_000 and path.read_bytes()[:4] == b"kept"
    assert wait(start(reserve_too_much, path, log=tmp_path / "log"), 60) == 0, texts(tmp_path)


def test_a_flipped_bit_of_a_sealed_file_is_seen_and_an_old_file_is_read(tmp_path):
    path = tmp_path / "history.safetensors"
    save_sealed(path, {"x": torch.arange(5.0)}, {"y": "1"})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="digest"):
        load_sealed(path, old=True)
    save_tensors(path, {"x": torch.arange(5.0)}, {"y": "1"})
    tensors, metadata = load_sealed(path, old=True)
    assert torch.equal(tensors["x"], load_file(path)["x"]) and metadata == {"y": "1"}
    with pytest.raises(InputError, match="no digest"):
        load_sealed(path)
