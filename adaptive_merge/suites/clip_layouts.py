"""How each of the 20 data sets lies on disk, and how it is opened there, through torchvision where it reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torchvision import datasets

from adaptive_merge.data.sources import FileSource, ImageSource, TorchvisionSource, folder_source
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.suites.class_names import clip_task
from adaptive_merge.upstream import labelled_files

__all__ = ["LAYOUTS", "Layout", "labelled_by_name"]

# EuroSAT's folders, sorted, beside the wording that the heads use for them.
_EUROSAT: Final = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


@dataclass(frozen=True)
class Layout:
    """Where a data set lies under the root, in words, and how to open it there.

    Args:
        expected: the files, relative to the root.
        open: root → source. Labels are those of the published heads, or follow from the classes by name.
    """

    expected: str
    open: Callable[[Path], ImageSource]


def _plain(name: str) -> str:
    """A class name without case, spaces, punctuation and SUN397's leading letter (`a_abbey`, `a/abbey`)."""
    return re.sub(r"[^a-z0-9]+", "", re.sub(r"^[a-z][_/]", "", name.lower()))


def labelled_by_name(name: str, source: ImageSource) -> ImageSource:
    """The source with labels in the order of the published heads, found by its class names.

    Raises:
        InputError: a class that the data set does not have.
    """
    published = _EUROSAT if name == "EuroSAT" else clip_task(name).classes
    known = {_plain(label): index for index, label in enumerate(published)}
    for label in source.classes:
        if _plain(label) not in known:
            raise InputError(
                f"`{label}` is no class of {name}{did_you_mean(label, published)}; expected folders named like "
                f"{', '.join(published[:3])} …"
            )
    if source.labels is None:
        return source
    order = torch.tensor([known[_plain(label)] for label in source.classes])
    source.labels = order[source.labels]
    return source


def _folders(name: str, *places: str) -> Callable[[Path], ImageSource]:
    """Class folders in the first of these places that is there."""

    def open_(root: Path) -> ImageSource:
        there = [root / place for place in places if (root / place).is_dir()] or [root / places[0]]
        return labelled_by_name(name, folder_source(there[0]))

    return open_


def _resisc45(root: Path) -> ImageSource:
    listing = root / "resisc45" / "resisc45-test.txt"
    if not listing.is_file():
        raise MissingFileError(f"`{listing}`: no such file")
    chosen = set(listing.read_text().split())
    every = folder_source(root / "resisc45" / "NWPU-RESISC45")
    kept = [index for index, path in enumerate(every.files) if path.name in chosen]
    if len(kept) < len(chosen):
        there = {every.files[index].name for index in kept}
        raise MissingFileError(f"`{listing}` lists {min(chosen - there)!r}, which is not there")
    files, labels = [every.files[index] for index in kept], every.labels[kept].tolist()
    return labelled_by_name("RESISC45", FileSource(root, files, labels, every.classes))


def _dtd(root: Path) -> ImageSource:
    if (root / "dtd" / "dtd" / "labels").is_dir():
        return labelled_by_name("DTD", _files(lambda root: datasets.DTD(str(root), split="test"))(root))
    return _folders("DTD", "dtd/test", "dtd/val")(root)


def _files(make: Callable[[Path], Any]) -> Callable[[Path], FileSource]:
    """A torchvision data set of image files."""

    def open_(root: Path) -> FileSource:
        dataset = make(root)
        pairs = labelled_files(dataset)
        classes = getattr(dataset, "classes", [])
        return FileSource(root, [path for path, _ in pairs], [label for _, label in pairs], classes)

    return open_


def _arrays(
    place: str, make: Callable[[Path], Any], labels: Callable[[Any], Sequence[int]] = lambda dataset: dataset.targets
) -> Callable[[Path], ImageSource]:
    """A torchvision data set of arrays, whose files lie in `place`."""

    def open_(root: Path) -> ImageSource:
        dataset = make(root)
        return TorchvisionSource(dataset, root / place, labels(dataset), getattr(dataset, "classes", []))

    return open_


def _pcam_labels(dataset: Any) -> Sequence[int]:
    with dataset.h5py.File(Path(dataset.root) / "pcam" / "camelyonpatch_level_2_split_test_y.h5") as file:
        return file["y"][:, 0, 0, 0].astype("int64")


_IDX: Final = "raw/{prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte"
_BOTH: Final = _IDX.format(prefix="t10k") + ", and the two train files"  # torchvision wants all four
LAYOUTS: Final[dict[str, Layout]] = {
    "SUN397": Layout(
        "sun397/test/<class>/*.jpg (or sun397/val), class folders `abbey` or `a_abbey`",
        _folders("SUN397", "sun397/test", "sun397/val"),
    ),
    "Cars": Layout(
        "stanford_cars/cars_test/*.jpg, cars_test_annos_withlabels.mat and devkit/cars_meta.mat",
        _files(lambda root: datasets.StanfordCars(str(root), split="test")),
    ),
    "RESISC45": Layout("resisc45/NWPU-RESISC45/<class>/*.jpg and resisc45/resisc45-test.txt", _resisc45),
    "EuroSAT": Layout(
        "EuroSAT_splits/test/<class>/*.jpg, class folders AnnualCrop … SeaLake",
        _folders("EuroSAT", "EuroSAT_splits/test"),
    ),
    "SVHN": Layout(
        "svhn/test_32x32.mat",
        _arrays("svhn", lambda root: datasets.SVHN(str(root / "svhn"), split="test"), lambda dataset: dataset.labels),
    ),
    "GTSRB": Layout(
        "gtsrb/GTSRB/Final_Test/Images/*.ppm and gtsrb/GT-final_test.csv",
        _files(lambda root: datasets.GTSRB(str(root), split="test")),
    ),
    "MNIST": Layout("MNIST/" + _BOTH, _arrays("MNIST/raw", lambda root: datasets.MNIST(str(root), train=False))),
    "DTD": Layout("dtd/test/<class>/*.jpg (or dtd/val), or torchvision's dtd/dtd/images and labels", _dtd),
    "PCAM": Layout(
        "pcam/camelyonpatch_level_2_split_test_x.h5 and _y.h5 (needs h5py)",
        _arrays("pcam", lambda root: datasets.PCAM(str(root), split="test"), _pcam_labels),
    ),
    "CIFAR100": Layout(
        "cifar-100-python/{test, train, meta}",
        _arrays("cifar-100-python", lambda root: datasets.CIFAR100(str(root), train=False)),
    ),
    "STL10": Layout(
        "stl10_binary/{train,test,unlabeled}_X.bin, {train,test}_y.bin and class_names.txt",
        _arrays("stl10_binary", lambda root: datasets.STL10(str(root), split="test"), lambda dataset: dataset.labels),
    ),
    "OxfordIIITPet": Layout(
        "oxford-iiit-pet/images/*.jpg and annotations/test.txt",
        _files(lambda root: datasets.OxfordIIITPet(str(root), split="test")),
    ),
    "Flowers102": Layout(
        "flowers-102/jpg/*.jpg, imagelabels.mat and setid.mat",
        _files(lambda root: datasets.Flowers102(str(root), split="test")),
    ),
    "FER2013": Layout(
        "fer2013/fer2013.csv (or icml_face_data.csv)",
        _arrays(
            "fer2013",
            lambda root: datasets.FER2013(str(root), split="test"),
            lambda dataset: [label for _, label in dataset],
        ),
    ),
    "CIFAR10": Layout(
        "cifar-10-batches-py/{test_batch, data_batch_1 … 5, batches.meta}",
        _arrays("cifar-10-batches-py", lambda root: datasets.CIFAR10(str(root), train=False)),
    ),
    "Food101": Layout(
        "food-101/images/<class>/*.jpg and meta/test.json",
        lambda root: labelled_by_name("Food101", _files(lambda root: datasets.Food101(str(root), split="test"))(root)),
    ),
    "RenderedSST2": Layout(
        "rendered-sst2/test/{negative,positive}/*.png",
        _files(lambda root: datasets.RenderedSST2(str(root), split="test")),
    ),
    "EMNIST": Layout(
        "EMNIST/" + _IDX.format(prefix="emnist-digits-test") + " (the split `digits`)",
        _arrays("EMNIST/raw", lambda root: datasets.EMNIST(str(root), split="digits", train=False)),
    ),
    "FashionMNIST": Layout(
        "FashionMNIST/" + _BOTH,
        _arrays("FashionMNIST/raw", lambda root: datasets.FashionMNIST(str(root), train=False)),
    ),
    "KMNIST": Layout(
        "KMNIST/" + _BOTH,
        _arrays("KMNIST/raw", lambda root: datasets.KMNIST(str(root), train=False)),
    ),
}
