"""Is the data of a suite there, complete and readable? Asked without reading an expert."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive_merge.data.cache import cached_images, resized
from adaptive_merge.errors import AdaptiveMergeError
from adaptive_merge.suites.clip_folder import KIND, read_clip_suite
from adaptive_merge.suites.clip_suite import ClipSuite, missing_path
from adaptive_merge.suites.loading import check_manifest, folder_of, load_suite, read_manifest
from adaptive_merge.weights.clip import read_architecture

__all__ = ["TaskCheck", "check_suite"]


@dataclass(frozen=True)
class TaskCheck:
    """What is known of one task's data; `problem` is the first that was met, or None."""

    task: str
    images: int = 0
    classes: int = 0
    problem: str | None = None


def check_suite(name: str, decode: bool = False) -> list[TaskCheck]:
    """Look at the data of every task of a suite.

    Args:
        name: `"embedded"` or a folder with `suite.json`.
        decode: decode every image into the cache, and compare caches that are there with their digest.

    Raises:
        MissingFileError, InputError: the suite itself cannot be read.
    """
    folder = folder_of(name)
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND:
        check_manifest(folder / "suite.json", manifest)
        return [_check_plain(name, task) for task in manifest["tasks"]]
    suite = read_clip_suite(folder, manifest)
    shared = _missing({"pretrained": suite.pretrained, "text": suite.text})
    return [_check_clip(suite, task, decode, shared) for task in suite.tasks]


def _check_plain(name: str, task: str) -> TaskCheck:
    try:
        images = load_suite(name, [task]).images[task]
    except AdaptiveMergeError as error:
        return TaskCheck(task, problem=str(error))
    return TaskCheck(task, len(images), len(images.classes))


def _missing(named: dict[str, str | None]) -> str | None:
    """The first of the named checkpoints that is not there."""
    return next((problem for what, path in named.items() if (problem := missing_path(what, path))), None)


def _check_clip(suite: ClipSuite, task: str, decode: bool, shared: str | None) -> TaskCheck:
    """Checkpoints are there, not read; lists and labels always; the first and the last image, or with `decode` all.

    `shared` is what is wrong with the files of all tasks.
    """
    images = classes = 0
    try:
        source = suite.source(task)
        images, classes = len(source), len(source.classes)
        size = read_architecture(suite.architecture).image_size
        if decode:
            cached_images(source, suite.cache, size, name=task, workers=suite.workers, check=True)
        for index in {0, len(source) - 1}:
            resized(source.load(index), size)
        own = {
            f"the expert of task {task!r}": suite.expert_path(task),
            f"the head of task {task!r}": suite.head_path(task),
        }
        problem = _missing(own) or shared
    except AdaptiveMergeError as error:
        return TaskCheck(task, images, classes, str(error))
    return TaskCheck(task, images, classes, problem)
