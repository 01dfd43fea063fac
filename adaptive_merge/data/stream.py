"""`TaskStream`: one unlabelled batch per task and step for adaptation, labelled test images for scoring."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Literal

import pytorch_lightning as pl
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptive_merge.data.corruptions import CorruptedImages, Corruption
from adaptive_merge.data.images import Images, LazyImages
from adaptive_merge.data.protocols import Protocol, Transductive
from adaptive_merge.data.sampler import Draws, Sampling, Schedule, StepSampler, chosen
from adaptive_merge.errors import InputError
from adaptive_merge.process.signals import end_workers_at_exit, ignore_signals
from adaptive_merge.upstream import keep_samplers

__all__ = ["Share", "TaskStream"]

Share = Literal["samples", "tasks"]
START_BATCH: Final = 32  # images that a start walks through the tower at a time


class TaskStream(pl.LightningDataModule):
    """The data of an adaptation run.

    Training batches are task → {"image": uint8 [B, 3, H, W], "index": int64 [B]}: labels never reach them. Where
    processes do not hold equal parts of a task's batch, "weight" says by what to multiply the mean over this
    process's part, so that the mean over the processes is the mean over the whole batch.
    Validation batches are {"task", "image", "label", "index"}, without "label" where the images have none, every scored
    image once, for any number of processes.

    Args:
        images: task → its test images.
        images_per_task: images of a task in one step, over all processes.
        sampling: `"fresh"` or `"epoch"`, see `draw`.
        schedule: `"joint"`: every step sees a batch of every task. `"shuffled"`: one task a step, in an order
            shuffled anew each round.
        protocol: which images are adapted on and which are scored; default `Transductive()`.
        corruption: what happens to all images, those adapted on and those scored; default: nothing.
        share: what a process takes of a step: its part of every task's batch (`"samples"`), or the whole batches
            of every W-th task (`"tasks"`), whose expert and adapters no other process then runs in a step.
        start_images: images of each task that a start is solved from, over all processes; of those that the protocol
            adapts on. In a single pass the first ones, which the merge before the start predicts.
        probe_images: adapt on so many images of each task alone, drawn once from the run's seed among those that the
            protocol adapts on; default: on all of these. Steps, starts and guards see no other image.
        eval_batch_size: images per evaluation batch and process.
        seed: of the stream; every draw is a function of it, the task and the step.
        num_workers: loader processes; batches of images in memory gain nothing from them.
    """

    def __init__(
        self,
        images: LazyImages | Mapping[str, Images],  # named for the parser, which would read every value of a mapping
        images_per_task: int = 16,
        sampling: Sampling = "fresh",
        schedule: Schedule = "joint",
        protocol: Protocol | None = None,
        corruption: Corruption | None = None,
        share: Share = "samples",
        start_images: int = 256,
        probe_images: int | None = None,
        eval_batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        counts = {"images_per_task": images_per_task, "start_images": start_images, "eval_batch_size": eval_batch_size}
        for name, count in (counts | ({} if probe_images is None else {"probe_images": probe_images})).items():
            if count < 1:
                raise InputError(f"a batch needs at least one image, got {name}={count}")
        for name, value, known in (
            ("sampling", sampling, ("fresh", "epoch")),
            ("schedule", schedule, ("joint", "shuffled")),
            ("share", share, ("samples", "tasks")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}; choose {' or '.join(map(repr, known))}")
        if (share, schedule) == ("tasks", "shuffled"):
            raise InputError("a shuffled schedule has one task a step, which one process would own; share 'samples'")
        if share == "tasks" and protocol and protocol.one_pass:
            raise InputError("in a single pass tasks end before others, and their owner with them; share 'samples'")
        if not isinstance(images, Mapping):
            raise InputError(f"`images` are task → am.Images, got {type(images).__name__}")
        if probe_images is not None and protocol and protocol.one_pass:
            raise InputError("a single pass adapts on every image once; leave out probe_images")
        self.images = LazyImages({task: partial(_read, images, task, corruption) for task in images})
        self.images_per_task, self.sampling, self.schedule = images_per_task, sampling, schedule
        self.protocol, self.corruption, self.share = protocol or Transductive(), corruption, share
        self.start_images, self.probe_images, self.eval_batch_size = start_images, probe_images, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.protocol.check(self.images)

    @cached_property
    def draws(self) -> Draws:
        """The images of each step, of all tasks that are adapted on."""
        tasks = [task for task in self.images if task not in self.protocol.unseen]
        pools = {task: self.protocol.adapted(task, len(self.images[task])) for task in tasks}
        if self.probe_images is not None:
            pools = {task: chosen(pool, self.probe_images, self.seed, f"probe {task}") for task, pool in pools.items()}
        settings = (self.images_per_task, self.seed, self.sampling, self.schedule, self.protocol.one_pass)
        return Draws(pools, *settings)

    @cached_property
    def scored(self) -> dict[str, Tensor]:
        """Task → the images that are scored, int64."""
        return {task: self.protocol.scored(task, len(images)) for task, images in self.images.items()}

    def watched(self, task: str, count: int, step: int) -> Tensor:
        """The images of a task that a guard may look at after `step` optimiser steps, see `Draws.watched`."""
        return self.draws.watched(task, count, step * self._micro_steps())

    def opening(self, task: str) -> Tensor:
        """The images of a task that a start is solved from, int64."""
        return self.draws.opening(task, self.start_images)

    def start_batches(self, task: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images of a start: their numbers and uint8 [B, 3, H, W]; no label is read."""
        rank, world = self._ranks()
        for index in self.opening(task)[rank::world].split(START_BATCH):
            if len(index):
                yield index, self.images[task].take(index)

    def setup(self, stage: str) -> None:
        """Where every image comes once, the run is as long as the pass; shares are dealt out here alone."""
        if self.trainer is not None:
            keep_samplers(self.trainer)
        if stage == "fit" and self.draws.end and self.trainer.max_steps != 0:
            self.trainer.fit_loop.epoch_loop.max_steps = -(-self.draws.end // self._micro_steps())

    def train_dataloader(self) -> DataLoader:
        """Unlabelled steps, from the one that the trainer has reached; without end, but in a single pass."""
        sampler = StepSampler(self._steps_taken, self.draws.end)
        return self._loader(self._steps(), sampler)

    def taken(self) -> Iterator[dict[str, Tensor]]:
        """This process's images, task → int64, of each step that the trainer has taken; none is read."""
        steps = self._steps()
        return (steps.share(step) for step in range(self._steps_taken()))

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per task over this process's share of the scored images; nothing is padded or repeated."""
        rank, world = self._ranks()
        loaders = []
        for task, images in self.images.items():
            share = self.scored[task][rank::world].split(self.eval_batch_size)
            loaders.append(self._loader(_Scored(task, images, share)))
        return loaders

    def predict_dataloader(self) -> list[DataLoader]:
        """The scored images, as for validation."""
        return self.val_dataloader()

    def _loader(self, dataset: Dataset, sampler: StepSampler | None = None) -> DataLoader:
        """Batches as the dataset makes them."""
        if workers := self.num_workers:
            end_workers_at_exit(os.getpid())
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers, worker_init_fn=_begin_worker)

    def _steps(self) -> _Steps:
        take = {task: self.images[task].take for task in self.draws.pools}
        return _Steps(self.draws, take, *self._ranks(), self.share == "tasks")

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _micro_steps(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _steps_taken(self) -> int:
        return self.trainer.global_step * self._micro_steps() if self.trainer else 0


def _read(images: Mapping[str, Images], task: str, corruption: Corruption | None) -> Images:
    if not hasattr(images[task], "take") or not hasattr(images[task], "fingerprint"):
        raise InputError(
            f"the images of task {task!r} are a {type(images[task]).__name__}; give am.Images(pixels, labels, classes)"
        )
    return CorruptedImages(images[task], corruption) if corruption else images[task]


def _begin_worker(number: int) -> None:
    """A worker ends with its process, not before it; its generators are seeded as Lightning would."""
    ignore_signals()
    sys.excepthook = _unless_left
    if os.environ.get("PL_SEED_WORKERS") == "1":
        pl_worker_init_function(number)


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A process that stops while it is handed a batch is not a fault."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


class _Steps(Dataset):
    """Step → this process's batches; labels are never read."""

    def __init__(
        self, draws: Draws, take: Mapping[str, Callable[[Tensor], Tensor]], rank: int, world: int, owns: bool
    ) -> None:
        self.draws, self.take, self.rank, self.world, self.owns = draws, take, rank, world, owns
        self.mine = tuple(take)[rank::world] if owns else tuple(take)

    def __getitem__(self, step: int) -> dict[str, dict[str, Any]]:
        return {task: self._batch(task, index) for task, index in self.draws[step].items() if task in self.mine}

    def share(self, step: int) -> dict[str, Tensor]:
        """This process's images of a step."""
        return {task: self._part(index) for task, index in self.draws[step].items() if task in self.mine}

    def _part(self, whole: Tensor) -> Tensor:
        return whole if self.owns else whole[self.rank :: self.world]

    def _batch(self, task: str, whole: Tensor) -> dict[str, Any]:
        index = self._part(whole)
        weight = self.world * len(index) / len(whole)
        batch = {"image": self.take[task](index), "index": index}
        return batch if weight == 1 else batch | {"weight": weight}


class _Scored(Dataset):
    """Evaluation batches of one task, with labels where there are any."""

    def __init__(self, task: str, images: Images, batches: tuple[Tensor, ...]) -> None:
        self.task, self.images, self.batches = task, images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.batches[position]
        batch = {"task": self.task, "image": self.images.take(index), "index": index}
        return batch if self.images.labels is None else batch | {"label": self.images.labels[index]}
