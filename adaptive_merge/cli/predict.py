"""`adaptive-merge predict`: what an adapted model says about a folder of images, as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from adaptive_merge.cli.loading import SOURCES, load_run
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.data.cache import resized
from adaptive_merge.data.sources import FileSource, images_in
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.files import save_text
from adaptive_merge.runs.reading import classes_of
from adaptive_merge.suites.class_names import read_class_names

__all__ = ["predict"]


def predict(arguments: list[str]) -> None:
    """Write the class that an adapted model predicts for each image of a folder, and how sure it is."""
    parser = Parser("adaptive-merge predict", description=predict.__doc__)
    parser.add_argument("source", nargs="+", help=f"{SOURCES}; the last one is the folder of images")
    parser.add_argument("--task", help="whose head and adapters to use; needed where the model has several tasks")
    parser.add_argument("--output", default="predictions.csv", help="file to write (default: predictions.csv)")
    parser.add_argument("--classes", help="text file with a class name a line (default: the names that the run kept)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: none)")
    options = parser.parse_args(arguments)
    if len(options.source) < 2:
        raise InputError("predict: give a run folder, or a recipe, and a folder of images")
    if options.batch_size < 1 or options.workers < 0:
        raise InputError("predict: --batch-size is at least 1, --workers at least 0")
    *sources, folder = options.source
    files = _files(Path(folder))
    module = load_run(*sources)
    if module.start is not None and module.begun is None:
        raise InputError(
            f"recipe {module.recipe!r} has a start, which is solved from images; run `fit` and name its run"
        )
    task = _task(module, options.task)
    names = _names(module, task, options.classes, sources[0])
    batches = _Batches(task, FileSource(Path(folder), files), _size(module), options.batch_size)
    loader = DataLoader(batches, batch_size=None, num_workers=options.workers)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1)
    rows = trainer.predict(module, loader) or []
    predicted, confidence = (torch.cat([row[name] for row in rows]) for name in ("predicted", "confidence"))
    if len(predicted) != len(files):
        raise InputError(f"the head of task {task!r} gives an image more than one class; predict writes one a row")
    save_text(options.output, _table(Path(folder), files, predicted.tolist(), confidence.tolist(), names))
    write(f"wrote {len(files):,} predictions of task {task!r} to {options.output}")


class _Batches(Dataset):
    """Batches of one task as the module takes them; nothing but the batch at hand is decoded."""

    def __init__(self, task: str, source: FileSource, size: int, batch: int) -> None:
        self.task, self.source, self.size = task, source, size
        self.parts = torch.arange(len(source)).split(batch)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.parts[position]
        pixels = np.stack([resized(self.source.load(int(row)), self.size) for row in index])
        return {"task": self.task, "image": torch.from_numpy(pixels).movedim(-1, 1), "index": index}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: there is no such folder; the last argument is a folder of images")
    files = images_in(folder)
    if not files:
        raise InputError(f"{folder}: there is no image in it or below it")
    return files


def _task(module: AdaptiveMerge, task: str | None) -> str:
    known = module.scored_tasks
    if task is None and len(known) > 1:
        raise InputError(f"predict: the model has {len(known)} tasks; say which by --task, one of {', '.join(known)}")
    if task is not None and task not in known:
        raise InputError(f"predict: there is no task {task!r}{did_you_mean(task, known)}; choose {', '.join(known)}")
    return task or known[0]


def _names(module: AdaptiveMerge, task: str, path: str | None, run: str) -> Sequence[str]:
    """Class names; empty where neither a file nor the run gives them."""
    head, names = module.model.heads[task], list(read_class_names(path)) if path else classes_of(run, task)
    classes = getattr(head, "classes", len(names))
    if names and len(names) != classes:
        raise InputError(f"{path or run}: {len(names)} class names for the {classes} classes of task {task!r}")
    return names


def _size(module: AdaptiveMerge) -> int:
    size = getattr(module.model.backbone.skeleton, "image_size", None)
    size = size[0] if isinstance(size, tuple | list) else size
    if not isinstance(size, int):
        raise InputError("predict: the backbone does not say its `image_size`; set that attribute (pixels) on it")
    return size


def _table(
    folder: Path, files: Sequence[Path], predicted: list[int], confidence: list[float], names: Sequence[str]
) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "class", "name", "confidence"])
    for file, label, sure in zip(files, predicted, confidence):
        rows.writerow([file.relative_to(folder), label, names[label] if names else "", f"{sure:.6f}"])
    return text.getvalue()
