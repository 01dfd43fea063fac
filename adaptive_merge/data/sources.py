"""Where images come from before they are cached: files and torchvision data sets, one PIL image at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.limits import IMAGE_FORMATS, PIXELS, LimitError

__all__ = ["FileSource", "ImageSource", "TorchvisionSource", "folder_source", "identity_of_files"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class ImageSource(Protocol):
    """Labelled images that can be decoded one by one, in any order and from several threads."""

    labels: Tensor
    classes: list[str]
    identity: str

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """Decode image `index`."""
        ...


class FileSource:
    """One file per image.

    Args:
        root: folder that the files are under; the identity holds their paths relative to it.
        files: in the order of the data set.
        labels: class of each file.
        classes: class names.
    """

    def __init__(self, root: Path, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.files, self.classes = list(files), list(classes)
        self.labels = torch.tensor(list(labels), dtype=torch.int64)
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
                return image.convert("RGB")
        except FileNotFoundError as error:
            raise MissingFileError(f"`{path}`: the data set lists this image but it is not there") from error
        except InputError:
            raise
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
        root: folder of its files; their names and sizes are the identity.
        labels: class of each image.
        classes: class names.
    """

    def __init__(self, dataset: Any, root: Path, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.dataset, self.classes = dataset, list(classes)
        self.labels = torch.as_tensor(labels).to(torch.int64)
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        self.identity = identity_of_files(root, files)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Image.Image:
        """One image of the array."""
        return self.dataset[index][0]


def folder_source(folder: Path, classes: Sequence[str] | None = None) -> FileSource:
    """`<folder>/<class>/…/<image>`: sorted class folders are the labels, sorted paths the order.

    Args:
        classes: names of the classes, one per folder; default the folders' own names.

    Raises:
        MissingFileError, InputError: no such folder, no class folders, no image in one of them.
    """
    if not folder.is_dir():
        raise MissingFileError(f"`{folder}`: no such folder; expected one folder a class with its images inside")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        names = sorted(path.name for path in folder.iterdir())[:5]
        raise InputError(f"`{folder}`: expected one folder a class with its images inside, found {names or 'nothing'}")
    files: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(found):
        images = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"`{place}`: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
        files += images
        labels += [label] * len(images)
    return FileSource(folder, files, labels, classes or [place.name for place in found])


def identity_of_files(root: Path, files: Sequence[Path]) -> str:
    """sha256 of the list of (path relative to `root`, bytes); contents are not read."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size if path.is_file() else -1
        name = path.relative_to(root) if path.is_relative_to(root) else path
        digest.update(json.dumps([name.as_posix(), size]).encode() + b"\n")
    return digest.hexdigest()
