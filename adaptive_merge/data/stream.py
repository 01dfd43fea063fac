"""`TaskStream`: one unlabelled batch per task and step for adaptation, all labelled test images for scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptive_merge.data.images import Images
from adaptive_merge.data.sampler import Sampling, StepSampler, draw, shuffled
from adaptive_merge.errors import InputError

__all__ = ["Schedule", "TaskStream"]

Schedule = Literal["joint", "shuffled"]


class TaskStream(pl.LightningDataModule):
    """The data of an adaptation run.

    Training batches are task → {"image": uint8 [B, 3, H, W], "index": int64 [B]}: labels never reach them.
    Validation batches are {"task", "image", "label", "index"}, every image once, for any number of processes.

    Args:
        images: task → its test images.
        images_per_task: images of a task in one step, over all processes.
        sampling: `"fresh"` or `"epoch"`, see `draw`.
        schedule: `"joint"`: every step sees a batch of every task. `"shuffled"`: one task a step, in an order
            shuffled anew each round.
        eval_batch_size: images per evaluation batch and process.
        seed: of the stream; every draw is a function of it, the task and the step.
        num_workers: loader processes; batches of images in memory gain nothing from them.
    """

    def __init__(
        self,
        images: Mapping[str, Images],
        images_per_task: int = 16,
        sampling: Sampling = "fresh",
        schedule: Schedule = "joint",
        eval_batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if images_per_task < 1 or eval_batch_size < 1:
            raise InputError(
                f"batches need at least one image, got images_per_task={images_per_task} and "
                f"eval_batch_size={eval_batch_size}"
            )
        for name, value, known in (
            ("sampling", sampling, ("fresh", "epoch")),
            ("schedule", schedule, ("joint", "shuffled")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}; choose {' or '.join(map(repr, known))}")
        self.images = dict(images)
        self.images_per_task, self.sampling, self.schedule = images_per_task, sampling, schedule
        self.eval_batch_size, self.seed, self.num_workers = eval_batch_size, seed, num_workers

    def train_dataloader(self) -> DataLoader:
        """Unlabelled steps without end, from the step that the trainer has reached."""
        rank, world = self._share()
        if self.images_per_task % world:
            raise InputError(
                f"images_per_task={self.images_per_task} cannot be shared evenly by {world} processes; "
                f"choose a multiple of {world}"
            )
        steps = _Steps(self.images, self.images_per_task, self.sampling, self.schedule, self.seed, rank, world)
        return DataLoader(steps, batch_size=None, sampler=StepSampler(self._steps_taken), num_workers=self.num_workers)

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per task over this process's share of the test images; nothing is padded or repeated."""
        rank, world = self._share()
        loaders = []
        for task, images in self.images.items():
            share = torch.arange(rank, len(images), world).split(self.eval_batch_size)
            loaders.append(DataLoader(_Labelled(task, images, share), batch_size=None, num_workers=self.num_workers))
        return loaders

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _steps_taken(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0


class _Steps(Dataset):
    """Step → batches; holds no labels."""

    def __init__(
        self,
        images: Mapping[str, Images],
        batch: int,
        sampling: Sampling,
        schedule: Schedule,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.take = {task: source.take for task, source in images.items()}
        self.sizes = {task: len(source) for task, source in images.items()}
        self.batch, self.sampling, self.schedule, self.seed = batch, sampling, schedule, seed
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> dict[str, dict[str, Tensor]]:
        tasks, turn = tuple(self.sizes), step
        if self.schedule == "shuffled":
            turn, place = divmod(step, len(tasks))
            tasks = (shuffled(tasks, self.seed, turn)[place],)
        return {task: self._batch(task, turn) for task in tasks}

    def _batch(self, task: str, turn: int) -> dict[str, Tensor]:
        chosen = draw(self.sizes[task], self.batch, self.seed, task, turn, self.sampling)
        index = torch.from_numpy(chosen[self.rank :: self.world].astype("int64"))
        return {"image": self.take[task](index), "index": index}


class _Labelled(Dataset):
    """Labelled evaluation batches of one task."""

    def __init__(self, task: str, images: Images, batches: tuple[Tensor, ...]) -> None:
        self.task, self.images, self.batches = task, images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.batches[position]
        return {"task": self.task, "image": self.images.take(index), "label": self.images.labels[index], "index": index}
