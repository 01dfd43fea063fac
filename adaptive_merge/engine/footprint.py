"""How much memory a run takes on a device and in its process's host memory, by placement of the bank: the formulas.

With P parameters of the tower, T experts of b bytes a number, W processes, and the bytes S of a step and E of an
evaluation that `traced` counts (θ, its gradient, activations, the expert that is asked, gradients of what learns):

    bank       (T b + 4) P on a device where it is resident; two pieces of it, or a W-th, else
    exchange   4 P (1 + 1/W) of gradients and a slice of θ, of a sharded bank, once activations are gone
    state      12 bytes for each number that learns: itself and Adam's two moments
    rule       what the merge's rule keeps: factors of the task vectors, a mask
    host       (T b + 4) P of the experts, T b P more where transforms make a bank of their own, (T b + 8) P where a
               start does, 4 P of the tower as it was loaded, the rule's state of the first merge, images that are not
               mapped, what frozen networks said of them; what a start takes while it is solved is left out
    total      bank + state + rule + max(S, exchange + θ + ∂L/∂θ, E); where the device is the CPU, host + state + rule
               + the same, without the transforms' bank where a start has replaced it before the first step

Held against measured peaks by tests/cli/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from adaptive_merge.data.images import Images, ListedImages
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.traced import Trace
from adaptive_merge.merge.placement import PIECE, BankKind
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["KINDS", "Footprint", "footprint"]

KINDS: Final[tuple[BankKind, ...]] = get_args(BankKind)
_NUMBER: Final = 4  # bytes of float32
_STATE: Final = 3  # a number that learns, and two moments


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process.

    Args:
        device: what → bytes on its device; activations are what a step takes beside towers and gradients.
        host: what → bytes in its host memory.
        total: at the peak on the device; with what is in host memory where that is the device.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    total: int


def footprint(
    module: AdaptiveMerge, trace: Trace, images: Mapping[str, Images], kind: BankKind, processes: int, cpu: bool
) -> Footprint:
    """The memory of a run.

    Args:
        module: over an outline of its bank.
        trace: of its step and evaluation.
        images: of all tasks.
        kind: where the bank lies.
        processes: of the run.
        cpu: whether the device is a CPU.
    """
    experts, merged = module.experts, module.model.backbone.task_vectors
    tower = _NUMBER * experts.layout.numel
    bank = {
        "resident": bank_bytes(merged),
        "streamed": 2 * min(bank_bytes(merged), bank_bytes(merged) * PIECE // merged.layout.numel),
        "sharded": bank_bytes(merged) // processes,
    }[kind]
    state = _STATE * _NUMBER * sum(parameter.numel() for parameter in module.learned)
    rule = module.coefficients.held_bytes
    gradients = tower if module.coefficients.learns else 0
    asks = any(stage.objective.needs_expert for stage in module.stages)
    towers = tower * (1 + (asks and bool(trace.step)))
    slices = tower // processes if processes > 1 else 0
    exchange = gradients + slices if kind == "sharded" and gradients else 0
    device = {
        "bank": 0 if cpu else bank,
        "towers": towers,
        "gradients": gradients,
        "activations": max(trace.step - towers - gradients, 0),
        "exchange": exchange,
        "state": state,
        "rule": rule,
        "evaluation": trace.evaluation,
    }
    host = {
        "bank": bank_bytes(experts),
        "transformed": bank_bytes(merged) - tower if _is_another(module) else 0,
        "start": bank_bytes(merged) + tower if module.start is not None else 0,
        "loaded": tower,
        "initial": sum(value.nbytes for value in module.views.initial),
        "images": sum(one.pixels.nbytes for one in images.values() if not isinstance(one, ListedImages)),
        "outputs": _outputs(module, images),
    }
    peak = state + rule + max(trace.step, towers + gradients + exchange, trace.evaluation)
    if not cpu:
        return Footprint(device, host, bank + peak)
    replaced = 0 if module.start is None else host["transformed"]
    return Footprint(device, host, sum(host.values()) - replaced + max(peak, replaced))


def bank_bytes(bank: TaskVectors) -> int:
    """Bytes of θ₀ and τ."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (bank.pretrained, bank.vectors))


def _is_another(module: AdaptiveMerge) -> bool:
    return module.model.backbone.task_vectors is not module.experts


def _outputs(module: AdaptiveMerge, images: Mapping[str, Images]) -> int:
    """Tables of what frozen networks say of each image: experts, and a merge that does not change."""
    if module.views.outputs.folder is not None:
        return 0
    fixed = not module.coefficients.learns and module.model.plain_tower
    blocks = any(stage.objective.needs_blocks for stage in module.stages)
    width = module.model.backbone.block_width() * len(module.model.backbone.blocks) if blocks else 0
    per_task = {task: module.model.heads[task].width for task in module.model.tasks}
    return _NUMBER * sum(
        len(images[task]) * (own * (1 + fixed) + (own + width) * blocks) for task, own in per_task.items()
    )
