"""How much memory a step's activations take, beside how much there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["activation_bytes", "joint_is_small", "memory_bytes"]

# The part of the memory that one graph of all tasks may take. A GPU's time is lost by small batches, so there it may
# take half. On a CPU it gains while reading the weights costs more than the images, and only memory beyond that.
SHARES: Final = {"cuda": 0.5, "cpu": 1 / 16}
_CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def joint_is_small(backbone: MergedBackbone, images: Sequence[Tensor], processes: int) -> bool:
    """Whether all tasks' images of a step may be one graph.

    It depends on the machine's total memory and not on what is free at the moment, so that a resumed run takes the
    same way.

    Args:
        backbone: the tower.
        images: the tasks' batches [B, …].
        processes: of the run; on a CPU they share the memory.
    """
    device = backbone.device
    available = memory_bytes(device) / (1 if device.type == "cuda" else processes)
    needed = activation_bytes(backbone, images[0][:1]) * sum(len(part) for part in images)
    return needed <= SHARES.get(device.type, SHARES["cpu"]) * available


def activation_bytes(backbone: MergedBackbone, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward of `images` for its backward, weights left out."""
    bank = backbone.task_vectors
    flat = bank.pretrained.to(backbone.device)
    weights = {name: value.detach().requires_grad_() for name, value in bank.layout.unflatten(flat).items()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # Nothing is to come back, for there is no backward; and a graph that keeps its own outputs is never freed.
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage  # which holds it: another one would be counted under its address

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        backbone(images, weights)
    kept.pop(id(flat.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values())


def memory_bytes(device: torch.device) -> int:
    """The device's memory; of a CPU the machine's, or what the container may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [int(text) for path in _CGROUP_LIMITS if (text := _read(Path(path))).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
