"""Where images come from before they are cached: files and torchvision data sets, one PIL image at a time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.limits import IMAGE_FORMATS, PIXELS, LimitError

__all__ = [
    *("FileSource", "ImageSource", "TorchvisionSource"),
    *("eight_bit", "folder_source", "identity_of_files", "images_in"),
]

_LOG = logging.getLogger(__name__)
_UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class ImageSource(Protocol):
    """Images that can be decoded one by one, in any order and from several threads."""

    labels: Tensor | None
    classes: list[str]
    identity: str

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """Decode image `index`."""
        ...


class FileSource:
    """One file per image.

    Args:
        root: folder that the files are under; see `identity_of_files`.
        files: in the order of the data set.
        labels: class of each file; None where they are not known.
        classes: class names.
    """

    def __init__(
        self, root: Path, files: Sequence[Path], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ) -> None:
        self.files, self.classes = list(files), list(classes)
        self.labels = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
        self.identity = identity_of_files(root, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image.Image:
        """Decode one file to RGB, as torchvision's loaders do; InputError names it where that fails."""
        path = self.files[index]
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise InputError(f"`{path}`: not a regular file; replace or remove it")
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                check_pixels(image, path)
                return eight_bit(image).convert("RGB")
        except FileNotFoundError as error:
            raise MissingFileError(f"`{path}`: the data set lists this image but it is not there") from error
        except LimitError:
            raise
        except (*_UNREADABLE, InputError) as error:
            raise InputError(f"`{path}`: not a readable image ({error}); replace or remove the file") from error


def check_pixels(image: Image.Image, path: Path) -> None:
    """LimitError, before it is decoded, where an image is larger than `PIXELS`, or would be once it is resized.

    The shortest edge becomes as long as the model wants: of one pixel by a million, every pixel becomes a square.
    """
    short, long = sorted(image.size)
    if short * long > PIXELS or (short and long // short > PIXELS // 1024**2):
        raise LimitError(
            f"`{path}`: refused, {image.size[0]:,} × {image.size[1]:,} pixels, expected at most {PIXELS:,} of them and "
            f"sides of no more than 1 to {PIXELS // 1024**2}; remove or crop it"
        )


class TorchvisionSource:
    """A torchvision data set that keeps its images in arrays or archives.

    Args:
        dataset: indexable, gives (PIL image, label).
        root: folder of its files, which are the identity; see `identity_of_files`.
        labels: class of each image.
        classes: class names.
    """

    def __init__(self, dataset: Any, root: Path, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.dataset, self.root, self.length, self.classes = dataset, root, len(dataset), list(classes)
        self.labels = torch.as_tensor(labels).to(torch.int64)
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        self.identity = identity_of_files(root, files)

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Image.Image:
        """One image of the array."""
        try:
            return self.dataset[index][0]
        except Exception as error:  # h5py and others raise what they like for a file that is cut short
            raise InputError(
                f"`{self.root}`: image {index} cannot be read ({error}); the data set is damaged, copy it again"
            ) from error


def folder_source(folder: Path, classes: Sequence[str] | None = None) -> FileSource:
    """`<folder>/<class>/…/<image>`: sorted class folders are the labels, sorted paths the order.

    A folder that holds images and no folders is a data set without labels.

    Args:
        classes: names of the classes, one per folder; default the folders' own names.

    Raises:
        MissingFileError, InputError: no such folder, no class folders, no image in one of them.
    """
    if not folder.is_dir():
        raise MissingFileError(f"`{folder}`: no such folder; expected one folder a class with its images inside")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))
    _tell_order(folder, [path.name for path in found])
    if not found and (images := images_in(folder)):
        return FileSource(folder, images, None, classes or ())
    if not found:
        names = sorted(path.name for path in folder.iterdir())[:5]
        raise InputError(
            f"`{folder}`: expected one folder a class with its images inside, or images without labels, found "
            f"{names or 'nothing'}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(found):
        images = images_in(place)
        if not images:
            raise InputError(f"`{place}`: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
        files += images
        labels += [label] * len(images)
    return FileSource(folder, files, labels, classes or [place.name for place in found])


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and below it, sorted; links are followed, hidden files and folders are not read."""
    return sorted(_images(folder, frozenset()))


def _images(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    home = folder.resolve()
    if home in above:  # a link to a folder that it lies in
        return
    for path in folder.iterdir():
        if _hidden(path.name):
            continue
        if path.is_dir():
            yield from _images(path, above | {home})
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _hidden(name: str) -> bool:
    """What systems leave in folders: `.thumbnails`, the `._x` and `__MACOSX` of archives, previews of a NAS."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def _tell_order(folder: Path, names: Sequence[str]) -> None:
    """A head made by number takes `10` for the eleventh class; sorted as text it is the third."""
    if names and all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int):
        mapping = ", ".join(f"{name!r} is label {label}" for label, name in enumerate(names))
        _LOG.warning(
            "%s: its class folders are numbers, and their order is that of text: %s. A head whose rows go by number "
            "fits folders with leading zeros ('02')",
            folder,
            mapping,
        )


def eight_bit(image: Image.Image) -> Image.Image:
    """Gray of 16 bits scaled to 8; any other image as it is.

    Raises:
        InputError: a mode that does not say which of its numbers is white, whose conversion would clip.
    """
    bits = _bits(image)
    if bits:
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values * (255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F") or image.mode.startswith(("I;", "F;")):
        raise InputError(
            f"its mode is {image.mode!r}, which does not say which of its numbers is white; save it with 8 bits a "
            "channel"
        )
    return image


def _bits(image: Image.Image) -> int:
    """Of a gray image with more than 8 bits; 0 where it is none, or does not say."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # both have 16 at most, which Pillow widens
        return 16
    if not image.mode.startswith("I;16"):
        return 0
    stored = getattr(image, "tag_v2", {}).get(258, 16)  # TIFF's BitsPerSample
    return int(stored[0] if isinstance(stored, tuple) else stored)


def identity_of_files(root: Path, files: Sequence[Path]) -> str:
    """sha256 of the root and of the list of (path below it, bytes, time of the last change); contents are not read."""
    digest = hashlib.sha256(str(root.resolve()).encode() + b"\n")
    for path in files:
        try:
            state = path.stat()
            facts = [state.st_size, state.st_mtime_ns]
        except OSError:
            facts = [-1, -1]
        name = path.relative_to(root) if path.is_relative_to(root) else path
        digest.update(json.dumps([name.as_posix(), *facts]).encode() + b"\n")
    return digest.hexdigest()
