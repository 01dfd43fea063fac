"""The 20 data sets of the published CLIP suites on disk: torchvision's layouts and the field's own folders.

Nothing is downloaded. Every data set is the test split that the field scores, its labels in the order of the
published heads (`models/clip_tasks.json`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from adaptive_merge.data.sources import ImageSource, folder_source
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.suites.class_names import clip_task, clip_task_names, read_class_names
from adaptive_merge.suites.clip_layouts import LAYOUTS, labelled_by_name

__all__ = ["Sizes", "TEST_SIZES", "layout_of", "open_clip_task", "open_folder_task"]

Sizes = Literal["published", "any"]

# Images of the test split; two numbers where two copies are in use (SUN397: the authors' and Hugging Face's).
TEST_SIZES: Final[dict[str, tuple[int, ...]]] = {
    "SUN397": (19_887, 19_850),
    "Cars": (8_041,),
    "RESISC45": (6_300,),
    "EuroSAT": (2_700,),
    "SVHN": (26_032,),
    "GTSRB": (12_630,),
    "MNIST": (10_000,),
    "DTD": (1_880,),
    "PCAM": (32_768,),
    "CIFAR100": (10_000,),
    "STL10": (8_000,),
    "OxfordIIITPet": (3_669,),
    "Flowers102": (6_149,),
    "FER2013": (7_178,),
    "CIFAR10": (10_000,),
    "Food101": (25_250,),
    "RenderedSST2": (1_821,),
    "EMNIST": (40_000,),
    "FashionMNIST": (10_000,),
    "KMNIST": (10_000,),
}


def open_clip_task(name: str, root: str | Path, *, sizes: Sizes = "published") -> ImageSource:
    """The test images of one of the 20 data sets.

    Args:
        name: as in `clip_task_names()`.
        root: folder of all data sets; each has its own folder in it, see `layout_of`.
        sizes: `"published"` refuses another number of images than the field scores, `"any"` takes a part.

    Raises:
        MissingFileError, InputError: naming the folder, the layout expected there, what was found, and the remedy.
    """
    layout, root = layout_of(name), Path(root)
    try:
        source = LAYOUTS[name].open(root)
    except (InputError, MissingFileError) as error:
        raise type(error)(f"task {name!r}: {error}; expected {layout} under `{root}`") from error
    except Exception as error:  # torchvision raises RuntimeError, OSError, KeyError, ... for what is not there
        reason = str(error).partition(" You can")[0]  # torchvision's advice to let it download
        raise MissingFileError(
            f"task {name!r}: cannot be read under `{root}` ({reason}); expected {layout}; found {_listed(root)}; "
            "nothing is downloaded, so put the data set there, or give its folder under `folders`"
        ) from error
    return _checked(name, source, root, sizes)


def open_folder_task(
    name: str, folder: str | Path, *, class_names: str | Path | None = None, sizes: Sizes = "published"
) -> ImageSource:
    """Any `<folder>/<class>/<image>` as a task; of a published task the folders must be named like its classes.

    Images that lie in the folder itself are a task without labels.

    Args:
        name: of the task.
        folder: with one folder a class.
        class_names: a text file with one name a line, in the order of the sorted folders; default their names.
        sizes: for the published tasks, as in `open_clip_task`.
    """
    folder = Path(folder)
    if name in TEST_SIZES and class_names is None:
        return _checked(name, labelled_by_name(name, folder_source(folder)), folder, sizes)
    source = folder_source(folder)
    names = list(read_class_names(class_names)) if class_names else source.classes
    if source.labels is not None and len(names) != len(source.classes):
        raise InputError(
            f"task {name!r}: `{class_names}` names {len(names)} classes, `{folder}` has {len(source.classes)} class "
            "folders; give one name for each folder, in sorted order"
        )
    source.classes = names
    return source


def layout_of(name: str) -> str:
    """The files of a data set, relative to the root of all data sets, in words."""
    if name not in LAYOUTS:
        raise InputError(
            f"no data set {name!r} is known{did_you_mean(name, LAYOUTS)} Known: {', '.join(clip_task_names())}; for "
            "another one give its folder of class folders under `folders`"
        )
    return LAYOUTS[name].expected


def _checked(name: str, source: ImageSource, place: Path, sizes: Sizes) -> ImageSource:
    classes = clip_task(name).classes
    count = len(source)
    if (
        count
        and source.labels is not None
        and (int(source.labels.max()) >= len(classes) or int(source.labels.min()) < 0)
    ):
        raise InputError(
            f"task {name!r}: `{place}`: labels reach {int(source.labels.max())}, expected {len(classes)} classes; this "
            "is another version of the data set"
        )
    if sizes == "published" and count not in TEST_SIZES[name]:
        published = " or ".join(f"{size:,}" for size in TEST_SIZES[name])
        raise InputError(
            f"task {name!r}: `{place}`: found {count:,} test images, the published test split has {published}; "
            'complete it, or say `"sizes": "any"` in the suite to go on with what is there'
        )
    source.classes = list(classes)
    return source


def _listed(root: Path) -> str:
    if not root.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "an empty folder"
