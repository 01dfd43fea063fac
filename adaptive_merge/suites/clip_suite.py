"""CLIP suites: third-party checkpoints, heads and data sets on disk, loaded together as one `Suite`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from adaptive_merge.data.cache import cached_images
from adaptive_merge.data.images import Images, LazyImages, ListedImages
from adaptive_merge.data.sources import ImageSource
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.merge.factors import Change
from adaptive_merge.merge.task_vectors import BANK_DTYPES, TaskVectors
from adaptive_merge.suites.base import Experts, Suite
from adaptive_merge.suites.clip_tasks import Sizes, open_clip_task, open_folder_task
from adaptive_merge.suites.shared_bank import shared_bank
from adaptive_merge.weights import Manifest, check_agreement, read_head, read_weights
from adaptive_merge.weights.clip import build_tower, read_architecture
from adaptive_merge.weights.headers import without_numbers
from adaptive_merge.weights.manifest import Weights
from adaptive_merge.weights.sources import is_adapter
from adaptive_merge.weights.text_tower import TextTower, read_text_tower
from adaptive_merge.weights.zero_shot import zero_shot_head

__all__ = [
    *("ClipSuite", "check_head", "check_named", "load_clip_suite", "missing_path", "read_expert", "read_pretrained"),
    "text_tower",
]

_LOG = logging.getLogger(__name__)
DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclasses.dataclass(frozen=True)
class ClipSuite:
    """What a CLIP suite is made of. The fields are the keys of a `suite.json` of `"kind": "clip"`.

    Args:
        architecture: open_clip's name, such as `"ViT-B-32-quickgelu"`, or a `.json` file in its format.
        pretrained: weights θ₀, anything that `read_weights` reads.
        experts: task → weights, or one path with `{task}` in it.
        tasks: names, in order; the 20 published data sets are known by theirs.
        data: folder of the published data sets, each in a folder of its own.
        heads: task → head file, or one path with `{task}` in it; default: zero-shot heads from `text`.
        text: a full CLIP with the text tower for zero-shot heads; default `pretrained`.
        cache: folder of decoded images and zero-shot heads.
        folders: task → folder of class folders, or of images without labels, for tasks that are not under `data`.
        class_names: task → text file with a class name a line, in the order of the sorted class folders.
        templates: task → prompt templates with one `{}` each, for tasks that are not published.
        sizes: `"published"` refuses data sets of another size than the published test split, `"any"` takes them.
        projection: `"pretrained"` says that experts without a projection were fine-tuned with it frozen.
        bank: `"float32"` or `"bfloat16"`, in which the task vectors are held.
        workers: threads that decode images; 0: one per core, at most 8.
        name: of the suite.
    """

    architecture: str
    pretrained: str
    experts: str | dict[str, str]
    tasks: list[str]
    data: str = "data"
    heads: str | dict[str, str] | None = None
    text: str | None = None
    cache: str = "cache"
    folders: dict[str, str] = dataclasses.field(default_factory=dict)
    class_names: dict[str, str] = dataclasses.field(default_factory=dict)
    templates: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    sizes: Sizes = "published"
    projection: Literal["auto", "pretrained"] = "auto"
    bank: Literal["float32", "bfloat16"] = "float32"
    workers: int = 0
    name: str = "clip"

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"a suite needs at least one task, each named once; found {self.tasks}")
        for name, value, known in (
            ("sizes", self.sizes, ("published", "any")),
            ("projection", self.projection, ("auto", "pretrained")),
            ("bank", self.bank, [str(dtype).removeprefix("torch.") for dtype in BANK_DTYPES]),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r} of a CLIP suite; choose {' or '.join(map(repr, known))}")

    def source(self, task: str) -> ImageSource:
        """The test images of a task, not decoded yet."""
        if task in self.folders:
            return open_folder_task(task, self.folders[task], class_names=self.class_names.get(task), sizes=self.sizes)
        return open_clip_task(task, self.data, sizes=self.sizes)

    def expert_path(self, task: str) -> str:
        """Where a task's expert is."""
        return _of_task(self.experts, task, "experts")

    def head_path(self, task: str) -> str | None:
        """Where a task's head is; None where it is made from the text tower."""
        return None if self.heads is None else _of_task(self.heads, task, "heads")


def load_clip_suite(suite: ClipSuite, lazy: bool = False, banks: str | None = None) -> Suite:
    """Read, check and join everything. What is cheap to check comes first, decoding images last.

    Args:
        suite: what it is made of.
        lazy: look for a task's data set when its images are first asked for; zero-shot heads need its class names.
        banks: folder of the file that holds the bank, see `shared_bank`; default: in this process's memory.

    Raises:
        MissingFileError, InputError: naming the file, the tensor or the folder, what was expected and found.
    """
    architecture = read_architecture(suite.architecture)
    sources = {} if lazy and suite.heads else {task: suite.source(task) for task in suite.tasks}
    _check_paths(suite)
    pretrained, backbone = read_pretrained(suite, architecture)
    heads = _heads(suite, sources, architecture)

    def build() -> tuple[TaskVectors, Mapping[str, Sequence[str]]]:
        notes = {suite.pretrained: pretrained.manifest.notes}

        def expert(task: str) -> Weights:
            weights = read_expert(suite, task, pretrained, architecture)
            notes[suite.expert_path(task)] = weights.manifest.notes
            return weights

        return _bank(suite, pretrained.tensors, expert), notes

    checkpoints = [suite.pretrained, *(suite.expert_path(task) for task in suite.tasks)]
    settings = [architecture.quick_gelu, suite.projection, suite.bank, suite.tasks]
    bank, notes = shared_bank(banks, checkpoints, settings, build)
    size = architecture.image_size
    images = LazyImages({task: partial(_images, suite, task, sources.get(task), size, heads) for task in suite.tasks})
    _tell(notes)
    return Suite(suite.name, bank, backbone, heads, images if lazy else dict(images), notes)


def read_pretrained(suite: ClipSuite, architecture: Manifest) -> tuple[Weights, VisionTransformer]:
    """The pre-trained weights, and the tower with them."""
    weights = read_weights(suite.pretrained, quick_gelu=architecture.quick_gelu)
    tower = weights.manifest.filled(
        architecture, "name the architecture of these weights, or give the weights of this one"
    )
    return weights, build_tower(tower, weights.tensors, suite.pretrained)


def read_expert(suite: ClipSuite, task: str, pretrained: Weights, architecture: Manifest) -> Weights:
    """A task's expert, which belongs to the pre-trained weights."""
    weights = read_weights(suite.expert_path(task), quick_gelu=architecture.quick_gelu, base=pretrained)
    return check_agreement(pretrained, weights, name=task, projection=suite.projection)


def _bank(suite: ClipSuite, pretrained: Mapping[str, Tensor], read: Callable[[str], Weights]) -> TaskVectors:
    """The bank of the experts; LoRA adapters stay factors in it, unless it is to be in bfloat16."""
    if suite.bank == "float32" and any(is_adapter(suite.expert_path(task)) for task in suite.tasks):
        return TaskVectors.from_changes(pretrained, {task: _changes(read(task), pretrained) for task in suite.tasks})
    experts = Experts(suite.tasks, lambda task: read(task).tensors)
    return TaskVectors.from_state_dicts(pretrained, experts, dtype=getattr(torch, suite.bank))


def _changes(expert: Weights, pretrained: Mapping[str, Tensor]) -> Mapping[str, Change]:
    if expert.changes is not None:
        return expert.changes
    return {name: value - pretrained[name] for name, value in expert.tensors.items()}


def _tell(notes: Mapping[str, Sequence[str]]) -> None:
    """Each note once, with all checkpoints that it is about."""
    for note in dict.fromkeys(note for own in notes.values() for note in own):
        sources = [source for source, own in notes.items() if note in own]
        _LOG.warning("%s: %s", ", ".join(f"`{source}`" for source in sources), note)


def _images(suite: ClipSuite, task: str, source: ImageSource | None, size: int, heads: Mapping[str, Tensor]) -> Images:
    if source is None:
        source = suite.source(task)
        check_head(suite, task, source, heads[task])
    if without_numbers():
        return ListedImages(source, size)
    return cached_images(source, suite.cache, size, name=task, workers=suite.workers)


def _heads(suite: ClipSuite, sources: Mapping[str, ImageSource], architecture: Manifest) -> dict[str, Tensor]:
    if suite.heads is None and without_numbers():
        text_tower(suite, architecture)
        return {task: torch.ones(len(source.classes), architecture.embed_dim) for task, source in sources.items()}
    if suite.heads is None:
        return _zero_shot_heads(suite, sources, architecture)
    heads = {task: read_head(suite.head_path(task)) for task in suite.tasks}
    for task, source in sources.items():
        check_head(suite, task, source, heads[task])
    # A head's length is looked at wherever it is used.
    return {task: torch.ones(head.shape) if head.is_meta else head for task, head in heads.items()}


def check_head(suite: ClipSuite, task: str, source: ImageSource, head: Tensor) -> None:
    """Refuse a head file with another number of classes than the data set."""
    if source.classes and len(head) != len(source.classes):
        raise InputError(
            f"`{suite.head_path(task)}` (task {task!r}): expected {len(source.classes)} classes as in the data set, "
            f"found {len(head)}; give the head of this task"
        )


def _zero_shot_heads(suite: ClipSuite, sources: Mapping[str, ImageSource], architecture: Manifest) -> dict[str, Tensor]:
    from adaptive_merge.suites.class_names import clip_task, clip_task_names

    model, tokenizer = text_tower(suite, architecture).build(architecture.quick_gelu)
    heads = {}
    for task, source in sources.items():
        check_named(task, source)
        published = clip_task(task).templates if task in clip_task_names() else DEFAULT_TEMPLATES
        templates = suite.templates.get(task, published)
        heads[task] = zero_shot_head(
            model,
            tokenizer,
            [name.replace("_", " ") for name in source.classes] if task not in clip_task_names() else source.classes,
            templates,
            backbone=architecture.source,
            cache=Path(suite.cache) / "heads",
        )
    return heads


def text_tower(suite: ClipSuite, architecture: Manifest) -> TextTower:
    """The text tower that zero-shot heads are made from."""
    tower = read_text_tower(suite.text or suite.pretrained)
    if tower.embed_dim != architecture.embed_dim:
        raise InputError(
            f"`{suite.text or suite.pretrained}`: its text tower gives {tower.embed_dim} features, architecture "
            f"{architecture.source} {architecture.embed_dim}; give the CLIP that the experts were fine-tuned from"
        )
    return tower


def check_named(task: str, source: ImageSource) -> None:
    """Refuse images without classes where the head is made from their names."""
    if not source.classes:
        raise InputError(
            f"task {task!r}: its images have no labels, and nothing names the classes of a zero-shot head; give a "
            "file of them under `class_names`, or the head under `heads`"
        )


def _of_task(paths: str | dict[str, str], task: str, what: str) -> str:
    if isinstance(paths, str):
        if "{task}" not in paths:
            raise InputError(f"{what}: {paths!r} has no `{{task}}` in it, the place of the task's name")
        return paths.replace("{task}", task)
    if task not in paths:
        raise InputError(f"{what}: no path for task {task!r}{did_you_mean(task, paths)}")
    return paths[task]


def _check_paths(suite: ClipSuite) -> None:
    """Every file that was named is there, before the first gigabyte is read."""
    named = [("pretrained", suite.pretrained), ("text", suite.text)]
    named += [(f"the expert of task {task!r}", suite.expert_path(task)) for task in suite.tasks]
    named += [(f"the head of task {task!r}", suite.head_path(task)) for task in suite.tasks]
    for what, path in named:
        if problem := missing_path(what, path):
            raise MissingFileError(problem)


def missing_path(what: str, path: str | None) -> str | None:
    """What is wrong with a file or folder that a suite names; None where it is there, or a hub's."""
    if not path or path.startswith("hf-hub:") or Path(path.removeprefix("local-dir:")).exists():
        return None
    return f"`{path}`: {what} is not there; correct the path in the suite, or get the file"
