"""The bank: pre-trained weights θ₀ and every expert's task vector τₜ = θₜ − θ₀, in two flat buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.files import save_tensors
from adaptive_merge.merge.factors import Change, FactoredVectors
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.state_dicts import check_expert, check_finite, check_models, differs, digest, mean, shared

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
        vectors: τ [T, P], float32 or bfloat16; or, of low-rank experts, their factors.
        buffers: what the backbone carries besides parameters; equal in all experts, or their mean.
        own: of floating-point buffers that are not the same in all models, such as BatchNorm's running statistics,
            everyone's values [1 + T, …]: the pre-trained model's, then each expert's.
    """

    folder: Path | None = None
    """Where it is kept as a file, and with it what is made of it."""
    made_of: str = ""
    """Of a bank that was made of another one and read from a file: what that file says it was made of."""
    published: float | str = 0.3
    """The equal coefficient of the static merge that the vectors are for: that of task arithmetic, or a transform's."""

    # Not a dataclass: jsonargparse would spell its fields out as options instead of taking the object.
    def __init__(
        self,
        tasks: Iterable[str],
        layout: Layout,
        pretrained: Tensor,
        vectors: Tensor | FactoredVectors,
        buffers: Mapping[str, Tensor],
        own: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tasks, self.layout = tuple(tasks), layout
        # Factors are read as a tensor is.
        self.pretrained, self.vectors = pretrained, cast(Tensor, vectors)
        self.factors = vectors if isinstance(vectors, FactoredVectors) else None
        self.buffers, self.own = dict(buffers), dict(own or {})

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
            buffers: names that are buffers, not parameters, such as `[name for name, _ in model.named_buffers()]`.
                Integer tensors always count as buffers.
            dtype: of the task vectors, float32 or bfloat16. θ₀ always stays float32.

        Raises:
            InputError: no expert; a missing, extra, transposed or non-finite tensor; parameters that are integers,
                bools or complex; integer buffers that differ, other than counters that only training reads.
        """
        if not experts:
            raise InputError("there is no expert to merge; give at least one fine-tuned state dict")
        if dtype not in BANK_DTYPES:
            raise InputError(f"a bank of dtype {dtype} is not supported; choose torch.float32 or torch.bfloat16")
        check_models(pretrained, experts)
        is_buffer = {name: name in buffers or not tensor.is_floating_point() for name, tensor in pretrained.items()}
        parameters = {name: tensor for name, tensor in pretrained.items() if not is_buffer[name]}
        if not parameters:
            raise InputError("the pre-trained state dict holds no floating-point parameter; nothing can be merged")
        check_finite("pre-trained weights", parameters)
        layout = Layout(tuple(parameters), tuple(tuple(tensor.shape) for tensor in parameters.values()))
        base = torch.cat([tensor.detach().float().flatten() for tensor in parameters.values()])
        vectors = base.new_empty(len(experts), layout.numel, dtype=dtype)
        carried = {name: [pretrained[name]] for name, buffer in is_buffer.items() if buffer}
        for row, task in zip(vectors, experts):
            expert = experts[task]
            check_expert(task, expert, pretrained, carried)
            for name, part in zip(layout.names, layout.slices):
                row[part] = expert[name].detach().float().flatten() - base[part]
            check_finite(f"expert {task!r}, minus the pre-trained weights", {"all": row})
            for name, values in carried.items():
                values.append(expert.get(name, values[0]))
        own = {name: torch.stack([value.float() for value in v]) for name, v in carried.items() if differs(v)}
        merged = {name: mean(own[name]) if name in own else shared(name, v, experts) for name, v in carried.items()}
        return cls(tuple(experts), layout, base, vectors, merged, own)

    @classmethod
    def from_changes(cls, pretrained: Mapping[str, Tensor], changes: Mapping[str, Mapping[str, Change]]) -> TaskVectors:
        """The bank of experts of which it is known what they changed, such as LoRA adapters; factors stay factors.

        Args:
            pretrained: name → parameter of the pre-trained backbone, which has no buffers.
            changes: task → name → change; what is absent is as pre-trained.

        Raises:
            InputError: no expert, or one that changes a parameter that is not there.
        """
        if not changes:
            raise InputError("there is no expert to merge; give at least one")
        layout = Layout(tuple(pretrained), tuple(tuple(tensor.shape) for tensor in pretrained.values()))
        for task, name in ((task, name) for task, change in changes.items() for name in change):
            if name not in pretrained:
                raise InputError(f"expert {task!r}: there is no parameter {name!r}{did_you_mean(name, pretrained)}")
        check_finite("pre-trained weights", pretrained)
        base = torch.cat([tensor.detach().float().flatten() for tensor in pretrained.values()])
        return cls(tuple(changes), layout, base, FactoredVectors(layout, list(changes.values())), {})

    def dense(self) -> TaskVectors:
        """The bank with all task vectors as numbers; itself where they are."""
        return self if self.factors is None else self.with_vectors(self.vectors[:, :])

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
        rows = map(self._hash, self.vectors) if self.factors is None else self.factors.digests()
        return {"pretrained": self._hash(self.pretrained)} | dict(zip(self.tasks, rows))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the whole bank: task names, θ₀, every task vector and the buffers."""
        parts = [[task, self.fingerprints[task]] for task in ("pretrained", *self.tasks)]
        parts += [[name, digest(value)] for name, value in self.buffers.items()]
        parts += [["own", name, digest(value)] for name, value in self.own.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def identity(self, task: str) -> str:
        """What an expert's outputs follow from: fingerprints of θ₀, its τ and, where it has any, its own buffers."""
        own = [digest(value[1 + self._row(task)], name.encode()) for name, value in self.own.items()]
        return " ".join([self.fingerprints["pretrained"], self.fingerprints[task], *own])

    def _hash(self, row: Tensor) -> str:
        header = json.dumps([self.names, self.layout.shapes, str(row.dtype)])
        return digest(row, header.encode())

    def to(self, device: torch.device | str) -> TaskVectors:
        """The same bank on `device`; itself where it is already there."""
        if self.device == torch.device(device):
            return self
        buffers, own = ({k: v.to(device) for k, v in held.items()} for held in (self.buffers, self.own))
        moved = TaskVectors(self.tasks, self.layout, self.pretrained.to(device), self.vectors.to(device), buffers, own)
        # The same bits have the same fingerprints; to take them anew, all would have to come back to the host.
        known = {name: value for name, value in self.__dict__.items() if name in ("fingerprints", "fingerprint")}
        moved.__dict__.update(known)
        return moved

    def select(self, tasks: Iterable[str]) -> TaskVectors:
        """The bank of some tasks only, in the order given; buffers that differ are averaged over these."""
        tasks = tuple(tasks)
        rows = [self._row(task) for task in tasks]
        own = {name: value[[0, *(1 + row for row in rows)]] for name, value in self.own.items()}
        buffers = self.buffers | {name: mean(value) for name, value in own.items()}
        adjacent = self.factors is None and rows == list(range(rows[0], rows[0] + len(rows)))
        vectors = self.vectors.narrow(0, rows[0], len(rows)) if adjacent else self.vectors[rows]  # pages stay shared
        selected = TaskVectors(tasks, self.layout, self.pretrained, vectors, buffers, own)
        selected.folder, selected.published = self.folder, self.published
        return selected

    def _row(self, task: str) -> int:
        if task not in self.tasks:
            raise InputError(f"there is no task {task!r} in this bank{did_you_mean(task, self.tasks)}")
        return self.tasks.index(task)

    def with_blocks(self, pattern: str | None) -> TaskVectors:
        """The bank with its repeated blocks named by a pattern such as `layer*.*`, see `Layout`.

        Raises:
            InputError: no parameter lies in such a block.
        """
        layout = replace(self.layout, pattern=pattern)
        if pattern is not None:
            layout.depth("`blocks`")
        named = TaskVectors(self.tasks, layout, self.pretrained, self.vectors, self.buffers, self.own)
        named.folder, named.published = self.folder, self.published
        return named

    def with_vectors(self, vectors: Tensor) -> TaskVectors:
        """The bank with other task vectors [T, P]: what a transform returns."""
        if tuple(vectors.shape) != tuple(self.vectors.shape):
            raise InputError(
                f"task vectors of shape {tuple(vectors.shape)} do not fit a bank of {tuple(self.vectors.shape)}"
            )
        return TaskVectors(self.tasks, self.layout, self.pretrained, vectors, self.buffers, self.own)

    def around(self, weights: Tensor, buffers: Mapping[str, Tensor]) -> TaskVectors:
        """The bank of the same experts around other weights θ* [P] in place of θ₀: τₜ = θₜ − θ*.

        Args:
            weights: θ*, float32.
            buffers: that θ* has in place of the experts' mean.
        """
        shift = self.pretrained - weights
        vectors = torch.empty(tuple(self.vectors.shape), dtype=self.vectors.dtype, device=self.device)
        for row, vector in zip(vectors, self.vectors):  # one at a time: no copy of all in float32
            row.copy_(vector.float() + shift)
        return TaskVectors(self.tasks, self.layout, weights, vectors, self.buffers | dict(buffers), self.own)

    def __add__(self, other: TaskVectors) -> TaskVectors:
        return self.with_vectors(self.dense().vectors + self._aligned(other))

    def __sub__(self, other: TaskVectors) -> TaskVectors:
        return self.with_vectors(self.dense().vectors - self._aligned(other))

    def __mul__(self, factor: float) -> TaskVectors:
        return self.with_vectors(self.dense().vectors * factor)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVectors:
        return self.with_vectors(-self.dense().vectors)

    def _aligned(self, other: TaskVectors) -> Tensor:
        same = (self.tasks, self.layout) == (other.tasks, other.layout)
        if not same or not torch.equal(self.pretrained, other.pretrained):
            raise InputError("only banks of the same tasks over the same pre-trained weights can be combined")
        return other.dense().vectors

    def of(self, name: str) -> Tensor:
        """τ of one parameter, [T, *shape]; where the bank lies, a view unless it holds factors."""
        place = self.names.index(name)
        return self.vectors[:, self.layout.slices[place]].view(-1, *self.layout.shapes[place])

    def expert(self, task: str) -> dict[str, Tensor]:
        """The state dict θ₀ + τₜ of one expert, as it was before the merge."""
        row = self._row(task)
        return self.layout.unflatten(self.pretrained + self.vectors[row].float()) | self.buffers_of(task)

    def buffers_of(self, task: str | None = None) -> dict[str, Tensor]:
        """The buffers of one expert as it came, or those of the pre-trained model."""
        row = 0 if task is None else 1 + self._row(task)
        return self.buffers | {name: value[row] for name, value in self.own.items()}

    def save(self, path: str | Path, made_of: str = "") -> None:
        """Write the bank to one safetensors file; names, tasks and the fingerprint travel in its header."""
        header = {
            "schema": SCHEMA,
            "tasks": self.tasks,
            "names": self.names,
            "shapes": self.layout.shapes,
            "buffers": list(self.buffers),
            **({"own": list(self.own)} if self.own else {}),
            **({"blocks": self.layout.pattern} if self.layout.pattern else {}),
            "fingerprint": self.fingerprint,
        } | ({"made_of": made_of} if made_of else {})
        tensors = {"pretrained": self.pretrained}
        tensors |= {"vectors": self.vectors} if self.factors is None else self.factors.named("vectors.")
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        tensors |= {f"own.{name}": values for name, values in self.own.items()}
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
            shapes = tuple(tuple(shape) for shape in header["shapes"])
            layout = Layout(tuple(header["names"]), shapes, header.get("blocks"))
            buffers = {name: tensors[f"buffer.{name}"] for name in header["buffers"]}
            own = {name: tensors[f"own.{name}"] for name in header.get("own", ())}
            tasks, vectors = tuple(header["tasks"]), tensors.get("vectors")
            if vectors is None:
                vectors = FactoredVectors.of_tensors(layout, len(tasks), tensors, "vectors.")
            bank = cls(tasks, layout, tensors["pretrained"], vectors, buffers, own)
            bank.made_of = header.get("made_of", "")
            intact = bank.fingerprint == header["fingerprint"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a bank of task vectors ({error}); write one with TaskVectors.save"
            ) from error
        if not intact:
            raise InputError(f"{path}: the content does not match its own sha256; the file is damaged, copy it again")
        return bank
