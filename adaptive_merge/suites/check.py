"""Are the data and the checkpoints of a suite there, readable and of one kind? Asked without an expert's numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptive_merge.adapters.heads import CosineHead, check_width
from adaptive_merge.data.cache import cached_images, resized
from adaptive_merge.data.sources import ImageSource
from adaptive_merge.errors import AdaptiveMergeError, MissingFileError
from adaptive_merge.suites.clip_folder import KIND, chosen_tasks, read_clip_suite
from adaptive_merge.suites.clip_suite import (
    ClipSuite,
    check_head,
    check_named,
    missing_path,
    read_expert,
    read_pretrained,
    text_tower,
)
from adaptive_merge.suites.loading import check_manifest, folder_of, load_suite, read_manifest
from adaptive_merge.weights import Manifest, Weights, read_head
from adaptive_merge.weights.clip import read_architecture
from adaptive_merge.weights.headers import headers_only
from adaptive_merge.weights.open_clip_names import expected_shapes

__all__ = ["TaskCheck", "check_suite"]


@dataclass(frozen=True)
class TaskCheck:
    """What is known of one task; `problem` is the first that was met, or None."""

    task: str
    images: int = 0
    classes: int = 0
    problem: str | None = None


def check_suite(name: str, decode: bool = False, tasks: list[str] | None = None) -> list[TaskCheck]:
    """Look at the data and the checkpoints of every task of a suite.

    Of checkpoints the headers alone are read: they are there, of a known format, of the suite's architecture and
    of one shape with the pre-trained model, and the heads fit both. What `hf-hub:` names is not downloaded for that.

    Args:
        name: `"embedded"` or a folder with `suite.json`.
        tasks: some of its tasks; default all.
        decode: decode every image into the cache, and compare caches that are there with their digest.

    Raises:
        MissingFileError, InputError: the suite itself cannot be read.
    """
    folder = folder_of(name)
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND:
        check_manifest(folder / "suite.json", manifest)
        return [_check_plain(name, task) for task in chosen_tasks(f"suite {name!r}", manifest["tasks"], tasks)]
    suite = read_clip_suite(folder, manifest, tasks)
    base = _Base.of(suite)
    return [_check_clip(suite, task, decode, base) for task in suite.tasks]


def _check_plain(name: str, task: str) -> TaskCheck:
    try:
        images = load_suite(name, [task]).images[task]
    except AdaptiveMergeError as error:
        return TaskCheck(task, problem=str(error))
    return TaskCheck(task, len(images), len(images.classes))


def _check_clip(suite: ClipSuite, task: str, decode: bool, base: _Base) -> TaskCheck:
    """Lists and labels, the first and the last image, or with `decode` all; then the checkpoints."""
    images = classes = 0
    try:
        source = suite.source(task)
        images, classes = len(source), len(source.classes)
        size = read_architecture(suite.architecture).image_size
        if decode:
            cached_images(source, suite.cache, size, name=task, workers=suite.workers, check=True)
        for index in {0, len(source) - 1}:
            resized(source.load(index), size)
        base.check(task, source)
    except AdaptiveMergeError as error:
        return TaskCheck(task, images, classes, str(error))
    return TaskCheck(task, images, classes)


@dataclass(frozen=True)
class _Base:
    """What the checkpoints of all tasks are compared with, without its numbers; `problem` is why they cannot be."""

    suite: ClipSuite
    architecture: Manifest | None = None
    pretrained: Weights | None = None
    problem: AdaptiveMergeError | None = None

    @classmethod
    def of(cls, suite: ClipSuite) -> _Base:
        try:
            _check_there({"pretrained": suite.pretrained, "text": suite.text})
            architecture = read_architecture(suite.architecture)
            with headers_only():
                pretrained = _outline(architecture)
                if not _is_remote(suite.pretrained):
                    pretrained, _ = read_pretrained(suite, architecture)
                if suite.heads is None and not _is_remote(suite.text or suite.pretrained):
                    text_tower(suite, architecture)
        except AdaptiveMergeError as error:
            return cls(suite, problem=error)
        return cls(suite, architecture, pretrained)

    def check(self, task: str, source: ImageSource) -> None:
        """Refuse an expert or a head that is missing or fits neither the pre-trained model nor the data set."""
        expert, head = self.suite.expert_path(task), self.suite.head_path(task)
        _check_there({f"the expert of task {task!r}": expert, f"the head of task {task!r}": head})
        if self.problem:
            raise self.problem
        with headers_only():
            if not _is_remote(expert):
                read_expert(self.suite, task, self.pretrained, self.architecture)
            if head is None:
                check_named(task, source)
            else:
                weight = read_head(head)
                check_head(self.suite, task, source, weight)
                check_width(task, CosineHead(weight), self.architecture.embed_dim)


def _outline(architecture: Manifest) -> Weights:
    """A tower of this architecture on the meta device."""
    shapes = expected_shapes(**architecture.architecture(), embed_dim=architecture.embed_dim)
    return Weights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, architecture)


def _check_there(named: dict[str, str | None]) -> None:
    for what, path in named.items():
        if problem := missing_path(what, path):
            raise MissingFileError(problem)


def _is_remote(path: str) -> bool:
    return path.startswith("hf-hub:")
