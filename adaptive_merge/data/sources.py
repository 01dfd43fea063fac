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

__all__ = ["FileSource", "ImageSource", "TorchvisionSource", "folder_source", "identity_of_files", "images_in"]

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
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError as error:
            raise MissingFileError(f"`{path}`: the data set lists this image but it is not there") from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"`{path}`: not a readable image ({error}); replace or remove the file") from error


class TorchvisionSource:
    """A torchvision data set that keeps its images in arrays or archives.

    Args:
        dataset: indexable, gives (PIL image, label).
        root: folder of its files, which are the identity; see `identity_of_files`.
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

    A folder that holds images and no folders is a data set without labels.

    Args:
        classes: names of the classes, one per folder; default the folders' own names.

    Raises:
        MissingFileError, InputError: no such folder, no class folders, no image in one of them.
    """
    if not folder.is_dir():
        raise MissingFileError(f"`{folder}`: no such folder; expected one folder a class with its images inside")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
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
    """The image files in a folder and below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


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
