"""The image cache: open_clip's pixels, built once, resumed, shared, and refused when damaged."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import adaptive_merge as am
from adaptive_merge.data import cache as image_cache
from adaptive_merge.data.cache import cached_images, resized
from adaptive_merge.data.sources import TorchvisionSource, folder_source


def noise(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            noise(20 + 7 * index, 40 - 5 * index, seed=9 * label + index).save(
                tmp_path / "images" / name / f"{index}.{'png' if index % 2 else 'jpg'}"
            )
    return tmp_path / "images"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
@pytest.mark.parametrize("shape", [(50, 31), (31, 50), (16, 16), (400, 33)])
def test_pixels_are_those_of_open_clips_evaluation_transform(mode, shape):
    image = noise(*shape, mode)
    transform = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    wanted = (transform(image) * 255).round().to(torch.uint8)
    assert torch.equal(torch.from_numpy(resized(image, 32).copy()).movedim(-1, 0), wanted)


def test_a_cache_behaves_as_images_in_memory(folder, tmp_path):
    source = folder_source(folder)
    found = cached_images(source, tmp_path / "cache", 16, name="../pets <1>", check=True)
    pixels = torch.from_numpy(np.stack([resized(source.load(index), 16) for index in range(len(source))]))
    wanted = am.Images(pixels, source.labels, source.classes)
    index = torch.tensor([11, 0, 5])
    assert torch.equal(found.take(index), wanted.take(index)) and found.take(index).shape == (3, 3, 16, 16)
    assert torch.equal(found.labels, torch.arange(3).repeat_interleave(4)) and found.classes == ["cat", "dog", "emu"]
    assert len(found) == 12 and found.fingerprint == wanted.fingerprint
    assert {path.parent for path in tmp_path.rglob("*.u8")} == {tmp_path / "cache"}


def test_each_image_is_decoded_once_over_interruptions(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_CHUNK", 5)
    source, loaded = folder_source(folder), []
    load = source.load

    def failing(index):
        loaded.append(index)
        if index == 7 and loaded.count(7) == 1:
            raise am.InputError("stop")
        return load(index)

    source.load = failing
    with pytest.raises(am.InputError, match="stop"):
        cached_images(source, tmp_path, 16, name="pets", workers=1)
    assert not list(tmp_path.glob("*.u8"))
    first = len(loaded)
    found = cached_images(source, tmp_path, 16, name="pets", workers=1)
    assert loaded[first:] == list(range(5, 12))
    cached_images(source, tmp_path, 16, name="pets")
    assert len(loaded) == first + 7
    assert found.fingerprint == cached_images(folder_source(folder), tmp_path / "other", 16, name="pets").fingerprint
    assert {path.suffix for path in tmp_path.glob("pets-*")} == {".u8", ".json"}


def test_another_list_of_files_or_size_is_another_cache(folder, tmp_path):
    prints = {cached_images(folder_source(folder), tmp_path, size, name="pets").fingerprint for size in (16, 24)}
    (folder / "cat" / "0.jpg").unlink()
    prints.add(cached_images(folder_source(folder), tmp_path, 16, name="pets").fingerprint)
    assert len(prints) == 3 and len(list(tmp_path.glob("*.u8"))) == 3


def _open(folder, cache, queue):
    queue.put(cached_images(folder_source(folder), cache, 16, name="pets").fingerprint)


def test_processes_share_one_build(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(folder, tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    prints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(prints) == 1 and len(list(tmp_path.glob("*.u8"))) == 1


def test_damage_is_named(folder, tmp_path):
    source = folder_source(folder)
    cached_images(source, tmp_path, 16, name="pets")
    data, header = next(tmp_path.glob("*.u8")), next(tmp_path.glob("*.json"))
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(am.InputError, match="not those that were written"):
        cached_images(source, tmp_path, 16, name="pets", check=True)
    data.write_bytes(content[:-1])
    with pytest.raises(am.InputError, match="expected 9216 bytes .* found 9215"):
        cached_images(source, tmp_path, 16, name="pets")
    header.write_text(json.dumps({"format": "other"}))
    with pytest.raises(am.InputError, match="no header that fits"):
        cached_images(source, tmp_path, 16, name="pets")


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 cut"])
def test_an_image_that_cannot_be_read_is_named(folder, tmp_path, content):
    (folder / "dog" / "2.jpg").write_bytes(content)
    with pytest.raises(am.InputError, match="dog/2.jpg.*not a readable image"):
        cached_images(folder_source(folder), tmp_path, 16, name="pets")


@pytest.mark.slow
def test_the_cache_delivers_ten_times_the_images_of_decoding():
    place = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_images.py"
    spec = importlib.util.spec_from_file_location("benchmark_images", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.measure(2000, 224)["times"] >= 10


def saved_as(path, seed, kind):
    noise(20, 20, seed=seed).convert("L" if kind == "pgm" else "RGB").save(path)


@pytest.mark.parametrize("kind", ["bmp", "ppm", "pgm", "tif"])
def test_a_file_replaced_by_one_of_the_same_size_is_read_again(tmp_path, kind):
    place = tmp_path / "images" / "cat"
    place.mkdir(parents=True)
    saved_as(place / f"0.{kind}", 1, kind)
    before, size = cached_images(folder_source(tmp_path / "images"), tmp_path, 16, name="pets"), 0
    size = (place / f"0.{kind}").stat().st_size
    saved_as(place / f"0.{kind}", 2, kind)
    assert (place / f"0.{kind}").stat().st_size == size
    after = cached_images(folder_source(tmp_path / "images"), tmp_path, 16, name="pets")
    expected = resized(Image.open(place / f"0.{kind}").convert("RGB"), 16)
    assert np.array_equal(after.pixels[0].numpy(), expected) and before.fingerprint != after.fingerprint


def test_check_finds_a_file_that_was_replaced_without_a_trace(tmp_path):
    """Same size, same time of change: only decoding tells."""
    place = tmp_path / "images" / "cat" / "0.bmp"
    place.parent.mkdir(parents=True)
    saved_as(place, 1, "bmp")
    cached_images(folder_source(tmp_path / "images"), tmp_path, 16, name="pets", check=True)
    state = place.stat()
    saved_as(place, 2, "bmp")
    os.utime(place, ns=(state.st_atime_ns, state.st_mtime_ns))
    cached_images(folder_source(tmp_path / "images"), tmp_path, 16, name="pets")
    with pytest.raises(am.InputError, match="task 'pets': image 0 is not the one in the cache .*; remove"):
        cached_images(folder_source(tmp_path / "images"), tmp_path, 16, name="pets", check=True)


def test_two_roots_with_equal_names_are_two_caches(tmp_path):
    found = []
    for seed, root in enumerate(("a", "b")):
        place = tmp_path / root / "images" / "cat" / "0.bmp"
        place.parent.mkdir(parents=True)
        saved_as(place, seed, "bmp")
        os.utime(place, ns=(10**18, 10**18))
        found.append(cached_images(folder_source(tmp_path / root / "images"), tmp_path, 16, name="pets").pixels)
    assert not torch.equal(*found)


def test_arrays_that_were_replaced_are_read_again(tmp_path):
    class Data:
        def __init__(self, path):
            self.pixels = np.load(path)

        def __len__(self):
            return len(self.pixels)

        def __getitem__(self, index):
            return Image.fromarray(self.pixels[index]), 0

    found = []
    (tmp_path / "raw").mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        np.save(tmp_path / "raw" / "x.npy", pixels)
        source = TorchvisionSource(Data(tmp_path / "raw" / "x.npy"), tmp_path / "raw", [0, 0, 0], ["a"])
        found.append(cached_images(source, tmp_path / "cache", 16, name="arrays"))
        assert np.array_equal(found[-1].pixels.numpy(), pixels)


def test_an_interrupted_build_that_was_changed_starts_anew(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_CHUNK", 5)
    source = folder_source(folder)
    load, calls = source.load, []

    def stopping(index):
        calls.append(index)
        if index == 7 and calls.count(7) == 1:
            raise KeyboardInterrupt
        return load(index)

    monkeypatch.setattr(source, "load", stopping)
    with pytest.raises(KeyboardInterrupt):
        cached_images(source, tmp_path, 16, name="pets", workers=1)
    partial = next(tmp_path.glob("*.partial"))
    content = bytearray(partial.read_bytes())
    content[3] ^= 1
    partial.write_bytes(content)
    found = cached_images(source, tmp_path, 16, name="pets", workers=1)
    assert np.array_equal(found.pixels[0].numpy(), resized(load(0), 16)) and calls.count(0) == 2
