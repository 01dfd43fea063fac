"""Images are decoded once: a memory-mapped uint8 file of resized test images, built by and by, then only read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from rich.markup import escape
from rich.progress import Progress
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transform

from adaptive_merge.data.images import Images
from adaptive_merge.data.sources import ImageSource, eight_bit
from adaptive_merge.errors import InputError
from adaptive_merge.files import reserve, save_json
from adaptive_merge.process.locks import in_turn

__all__ = ["cached_images", "resized"]

_LOG = logging.getLogger(__name__)
FORMAT: Final = "adaptive_merge.images"
VERSION: Final = 1
# What `resized` does, as a part of the cache's key: change it there and here together.
TRANSFORM: Final = "shortest edge bicubic, centre crop, RGB"
_CHUNK: Final = 256  # images between two notes of how far the build is


def cached_images(
    source: ImageSource, folder: str | Path, size: int, *, name: str, workers: int = 0, check: bool = False
) -> Images:
    """The images of a source, each decoded once in the life of the cache folder.

    A build that was interrupted goes on where it stopped; of several processes one builds and the others wait.

    Args:
        source: decodes one image at a time.
        folder: of all caches; `<name>-<key>.u8` holds the pixels, `.json` the header.
        size: height and width in pixels.
        name: of the task, for the file name and messages.
        workers: decoding threads; 0: one per core, at most 8.
        check: of a cache that is there, compare the whole file with the digest in its header, and each image with the
            source, decoded again.

    Raises:
        InputError: an image cannot be decoded; the cache file is damaged, or of other images than the source now has.
    """
    if len(source) == 0:
        raise InputError(f"task {name!r}: the data set is empty: there is no image to adapt on")
    key = hashlib.sha256(json.dumps([VERSION, source.identity, len(source), size, TRANSFORM]).encode()).hexdigest()
    stem = Path(folder) / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{key[:16]}"
    shape = (len(source), size, size, 3)
    workers, built = workers or min(os.cpu_count() or 1, 8), False
    whole = stem.with_suffix(".json").is_file()  # then it is only read, perhaps from where nobody may write
    with nullcontext() if whole else in_turn(stem.with_suffix(".lock"), f"image cache {stem}"):
        if built := not stem.with_suffix(".json").is_file():
            pixels = _build(source, stem, shape, key, name, workers)
            header = {"format": FORMAT, "version": VERSION, "key": key, "shape": shape, "transform": TRANSFORM}
            save_json(stem.with_suffix(".json"), {**header, "source": source.identity, "pixels": pixels})
    header = _read_header(stem, key, shape)
    mapped = np.memmap(stem.with_suffix(".u8"), np.uint8, mode="c", shape=shape)
    if check and _digest(mapped, len(mapped)).hexdigest() != header["pixels"]:
        raise InputError(f"`{stem}.u8`: its pixels are not those that were written; remove `{stem}.*`")
    if check and not built:
        _compare(source, mapped, name, workers, stem)
    try:
        return Images(torch.from_numpy(mapped), source.labels, source.classes, header["pixels"])
    except InputError as error:
        raise InputError(f"task {name!r}: {error}") from error


def resized(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3], as open_clip's evaluation transform has it before scaling to [0, 1]."""
    image = transform.resize(eight_bit(image), size, InterpolationMode.BICUBIC)
    return np.asarray(transform.center_crop(image, [size, size]).convert("RGB"))


def _build(source: ImageSource, stem: Path, shape: tuple[int, ...], key: str, name: str, workers: int) -> str:
    """Decode what is missing; returns the digest of all pixels."""
    partial, note = stem.with_suffix(".partial"), stem.with_suffix(".progress")
    reserve(partial, int(np.prod(shape)))
    pixels = np.memmap(partial, np.uint8, mode="r+", shape=shape)
    done, digest = _done(note, pixels, key)
    _LOG.info("task %s: decoding %d of %d images into %s", name, shape[0] - done, shape[0], stem.parent)
    with ThreadPoolExecutor(workers) as pool, Progress(transient=True, disable=not os.isatty(2)) as bar:
        told = bar.add_task(escape(f"decoding {name}"), total=shape[0], completed=done)
        for start in range(done, shape[0], _CHUNK):
            rows = range(start, min(start + _CHUNK, shape[0]))
            for row, image in zip(rows, pool.map(lambda index: _decoded(source, index, shape[1], name), rows)):
                pixels[row] = image
            digest.update(memoryview(pixels[rows.start : rows.stop].reshape(-1)))
            pixels.flush()
            save_json(note, {"key": key, "done": rows.stop, "pixels": digest.hexdigest()})
            bar.update(told, completed=rows.stop)
    os.replace(partial, stem.with_suffix(".u8"))
    note.unlink(missing_ok=True)
    return digest.hexdigest()


def _compare(source: ImageSource, pixels: np.ndarray, name: str, workers: int, stem: Path) -> None:
    """Refuse a cache of images that the source does not have any more."""
    with ThreadPoolExecutor(workers) as pool:
        images = pool.map(lambda index: _decoded(source, index, pixels.shape[1], name), range(len(pixels)))
        for index, image in enumerate(images):
            if not np.array_equal(image, pixels[index]):
                raise InputError(
                    f"task {name!r}: image {index} is not the one in the cache `{stem}.u8`; remove `{stem}.*`, "
                    "they are made anew"
                )


def _decoded(source: ImageSource, index: int, size: int, name: str) -> np.ndarray:
    try:
        return resized(source.load(index), size)
    except InputError:
        raise
    except Exception as error:  # decoders raise many kinds, some of them undocumented, for damaged data
        raise InputError(f"task {name!r}: image {index} cannot be decoded ({error!r}); replace it") from error


def _done(note: Path, pixels: np.ndarray, key: str) -> tuple[int, Any]:
    """How many images an interrupted build of the same cache has left, and their digest; 0 where they are damaged."""
    try:
        header = json.loads(note.read_text())
        done = int(header["done"]) if header["key"] == key else 0
        if 0 < done <= len(pixels) and (digest := _digest(pixels, done)).hexdigest() == header["pixels"]:
            return done, digest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, _digest(pixels, 0)


def _digest(pixels: np.ndarray, count: int) -> Any:
    """As `Images.fingerprint` begins: shape, then the first `count` images."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for start in range(0, count, _CHUNK):
        digest.update(memoryview(pixels[start : min(start + _CHUNK, count)].reshape(-1)))
    return digest


def _read_header(stem: Path, key: str, shape: tuple[int, ...]) -> dict[str, Any]:
    path, data = stem.with_suffix(".json"), stem.with_suffix(".u8")
    try:
        header = json.loads(path.read_text())
        fits = (header["format"], header["version"], header["key"]) == (FORMAT, VERSION, key)
        fits = fits and tuple(header["shape"]) == shape and isinstance(header["pixels"], str)
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    size = data.stat().st_size if data.is_file() else None
    if not fits or size != int(np.prod(shape)):
        raise InputError(
            f"`{data}`: expected {int(np.prod(shape))} bytes of decoded images with the header `{path.name}`, found "
            f"{size} bytes and {'a' if fits else 'no'} header that fits; remove `{stem}.*`, they are made anew"
        )
    return header
