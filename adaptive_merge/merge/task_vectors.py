"""The bank: pre-trained weights θ₀ and every expert's task vector τₜ = θₜ − θ₀, in two flat buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.files import save_tensors
from adaptive_merge.merge.layout import Layout

__all__ = ["TaskVectors"]

SCHEMA = 1
BANK_DTYPES = (torch.float32, torch.bfloat16)


class TaskVectors:
    """θ₀ [P] and the stacked τ [T, P] (Ilharco et al., "Editing models with task arithmetic").

    A plain object, not a module: as buffers the bank would be broadcast by DDP on every forward and carried
    by every checkpoint. It is never written to after construction; operations return a new bank.

    Args:
        tasks: one name per expert, in the order of the rows of `vectors`.
        layout: names and shapes of the parameters.
        pretrained: θ₀ [P], float32.
        vectors: τ [T, P], float32 or bfloat16.
        buffers: what the backbone carries besides parameters; equal in all experts, or their mean.
    """

    folder: Path | None = None
    """Where it is kept as a file, and with it what is made of it."""
    made_of: str = ""
    """Of a bank that was made of another one and read from a file: what that file says it was made of."""
    published: float | str = 0.3
    """The equal coefficient of the static merge that the vectors are for: that of task arithmetic, or a transform's."""

    # Not a dataclass: jsonargparse would spell its fields out as options instead of taking the object.
    def __init__(
        self, tasks: Iterable[str], layout: Layout, pretrained: Tensor, vectors: Tensor, buffers: Mapping[str, Tensor]
    ) -> None:
        self.tasks, self.layout = tuple(tasks), layout
        self.pretrained, self.vectors, self.buffers = pretrained, vectors, dict(buffers)

    @classmethod
    def from_state_dicts(
        cls,
        pretrained: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        buffers: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> TaskVectors:
        """Build the bank from plain state dicts; reads one expert at a time.

        Args:
            pretrained: name → tensor of the pre-trained backbone.
            experts: task → state dict of the expert fine-tuned from it; a lazily loading mapping keeps the
                memory at the bank plus one expert.
            buffers: names that are buffers, not parameters. Integer tensors always count as buffers.
            dtype: of the task vectors, float32 or bfloat16. θ₀ always stays float32.

        Raises:
            InputError: no expert; a missing, extra, transposed or non-finite tensor; integer buffers that differ.
        """
        if not experts:
            raise InputError("there is no expert to merge; give at least one fine-tuned state dict")
        if dtype not in BANK_DTYPES:
            raise InputError(f"a bank of dtype {dtype} is not supported; choose torch.float32 or torch.bfloat16")
        is_buffer = {name: name in buffers or not tensor.is_floating_point() for name, tensor in pretrained.items()}
        parameters = {name: tensor for name, tensor in pretrained.items() if not is_buffer[name]}
        if not parameters:
            raise InputError("the pre-trained state dict holds no floating-point parameter; nothing can be merged")
        _check_finite("pre-trained weights", parameters)
        layout = Layout(tuple(parameters), tuple(tuple(tensor.shape) for tensor in parameters.values()))
        base = torch.cat([tensor.detach().float().flatten() for tensor in parameters.values()])
        vectors = torch.empty(len(experts), layout.numel, dtype=dtype)
        carried: dict[str, list[Tensor]] = {name: [] for name, buffer in is_buffer.items() if buffer}
        for row, task in zip(vectors, experts):
            expert = experts[task]
            _check_expert(task, expert, pretrained)
            for name, part in zip(layout.names, layout.slices):
                row[part] = expert[name].detach().float().flatten() - base[part]
            for name, values in carried.items():
                values.append(expert[name])
        merged_buffers = {name: _merge_buffer(name, values, experts) for name, values in carried.items()}
        return cls(tuple(experts), layout, base, vectors, merged_buffers)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in `named_parameters()` order."""
        return self.layout.names

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self.vectors.device

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of θ₀ (`"pretrained"`) and of each task vector, over names, shapes, dtype and bytes."""
        rows = {"pretrained": self.pretrained} | dict(zip(self.tasks, self.vectors))
        return {name: self._hash(row) for name, row in rows.items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the whole bank: task names, θ₀, every task vector and the buffers."""
        parts = [[task, self.fingerprints[task]] for task in ("pretrained", *self.tasks)]
        parts += [[name, _digest(value)] for name, value in self.buffers.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _hash(self, row: Tensor) -> str:
        header = json.dumps([self.names, self.layout.shapes, str(row.dtype)])
        return _digest(row, header.encode())

    def to(self, device: torch.device | str) -> TaskVectors:
        """The same bank on `device`; itself where it is already there."""
        if self.device == torch.device(device):
            return self
        buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        moved = TaskVectors(self.tasks, self.layout, self.pretrained.to(device), self.vectors.to(device), buffers)
        # The same bits have the same fingerprints; to take them anew, all would have to come back to the host.
        known = {name: value for name, value in self.__dict__.items() if name in ("fingerprints", "fingerprint")}
        moved.__dict__.update(known)
        return moved

    def select(self, tasks: Iterable[str]) -> TaskVectors:
        """The bank of some tasks only, in the order given."""
        tasks = tuple(tasks)
        rows = self.vectors[[self._row(task) for task in tasks]]
        selected = TaskVectors(tasks, self.layout, self.pretrained, rows, self.buffers)
        selected.folder, selected.published = self.folder, self.published
        return selected

    def _row(self, task: str) -> int:
        if task not in self.tasks:
            raise InputError(f"there is no task {task!r} in this bank{did_you_mean(task, self.tasks)}")
        return self.tasks.index(task)

    def with_vectors(self, vectors: Tensor) -> TaskVectors:
        """The bank with other task vectors [T, P]: what a transform returns."""
        if vectors.shape != self.vectors.shape:
            raise InputError(
                f"task vectors of shape {tuple(vectors.shape)} do not fit a bank of {tuple(self.vectors.shape)}"
            )
        return TaskVectors(self.tasks, self.layout, self.pretrained, vectors, self.buffers)

    def __add__(self, other: TaskVectors) -> TaskVectors:
        return self.with_vectors(self.vectors + self._aligned(other))

    def __sub__(self, other: TaskVectors) -> TaskVectors:
        return self.with_vectors(self.vectors - self._aligned(other))

    def __mul__(self, factor: float) -> TaskVectors:
        return self.with_vectors(self.vectors * factor)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVectors:
        return self.with_vectors(-self.vectors)

    def _aligned(self, other: TaskVectors) -> Tensor:
        same = (self.tasks, self.layout) == (other.tasks, other.layout)
        if not same or not torch.equal(self.pretrained, other.pretrained):
            raise InputError("only banks of the same tasks over the same pre-trained weights can be combined")
        return other.vectors

    def of(self, name: str) -> Tensor:
        """τ of one parameter, [T, *shape]; a view, where the bank lies."""
        place = self.names.index(name)
        return self.vectors[:, self.layout.slices[place]].view(-1, *self.layout.shapes[place])

    def expert(self, task: str) -> dict[str, Tensor]:
        """The state dict θ₀ + τₜ of one expert, as it was before the merge."""
        row = self.vectors[self._row(task)]
        return self.layout.unflatten(self.pretrained + row.float()) | dict(self.buffers)

    def save(self, path: str | Path, made_of: str = "") -> None:
        """Write the bank to one safetensors file; names, tasks and the fingerprint travel in its header."""
        header = {
            "schema": SCHEMA,
            "tasks": self.tasks,
            "names": self.names,
            "shapes": self.layout.shapes,
            "buffers": list(self.buffers),
            "fingerprint": self.fingerprint,
        } | ({"made_of": made_of} if made_of else {})
        tensors = {"pretrained": self.pretrained, "vectors": self.vectors}
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        save_tensors(path, tensors, {"adaptive_merge.task_vectors": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read a bank written by `save`, memory-mapped, and check it against its fingerprint.

        Raises:
            MissingFileError: no such file.
            InputError: not a bank, or its content does not match its fingerprint.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"{path}: there is no such file; write a bank with TaskVectors.save")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["adaptive_merge.task_vectors"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            layout = Layout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
            buffers = {name: tensors[f"buffer.{name}"] for name in header["buffers"]}
            bank = cls(tuple(header["tasks"]), layout, tensors["pretrained"], tensors["vectors"], buffers)
            bank.made_of = header.get("made_of", "")
            intact = bank.fingerprint == header["fingerprint"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a bank of task vectors ({error}); write one with TaskVectors.save"
            ) from error
        if not intact:
            raise InputError(f"{path}: the content does not match its own sha256; the file is damaged, copy it again")
        return bank


def _digest(tensor: Tensor, header: bytes = b"") -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(header)
    digest.update(raw.numpy().data)
    return digest.hexdigest()


def _merge_buffer(name: str, values: Sequence[Tensor], experts: Iterable[str]) -> Tensor:
    if all(torch.equal(values[0], value) for value in values):
        return values[0].clone()
    if not values[0].is_floating_point():
        odd = next(task for task, value in zip(experts, values) if not torch.equal(values[0], value))
        raise InputError(
            f"expert {odd!r}: the integer buffer {name!r} differs from the other experts'; it cannot be merged"
        )
    return torch.stack([value.float() for value in values]).mean(0)


def _check_finite(owner: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{owner}: tensor {name!r} holds NaN or infinite values; the checkpoint is damaged")


def _check_expert(task: str, expert: Mapping[str, Tensor], pretrained: Mapping[str, Tensor]) -> None:
    owner = f"expert {task!r}"
    for missing in (name for name in pretrained if name not in expert):
        raise InputError(
            f"{owner}: tensor {missing!r} is missing{did_you_mean(missing, expert)}; "
            "was it fine-tuned from this pre-trained model?"
        )
    for extra in (name for name in expert if name not in pretrained):
        raise InputError(
            f"{owner}: tensor {extra!r} is not in the pre-trained model; remove it, or give the "
            "pre-trained model that this expert comes from"
        )
    for name, tensor in pretrained.items():
        found, wanted = tuple(expert[name].shape), tuple(tensor.shape)
        if found != wanted:
            transposed = "; it looks transposed" if found == wanted[::-1] else ""
            raise InputError(
                f"{owner}: tensor {name!r} has shape {found}, the pre-trained model has {wanted}{transposed}"
            )
    _check_finite(owner, {name: value for name, value in expert.items() if value.is_floating_point()})
