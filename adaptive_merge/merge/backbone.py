"""The differentiable merge: the hot path.

The merge is one node of the graph. A rule's `combine` reads the bank once and writes θ once; its `project` reads the
bank once more to turn ∂L/∂θ into ∂L/∂state. No product λ·τ ever becomes a graph node (that
keeps T copies of the model alive), and no flat buffer is sliced under autograd (each slice's backward would
allocate P zeros).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adaptive_merge.errors import InputError, check_normalisation, did_you_mean
from adaptive_merge.merge.blocks import in_depth
from adaptive_merge.merge.edits import Edit, edited
from adaptive_merge.merge.placement import BankKind, Placement, place
from adaptive_merge.merge.rule import Rule, State
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["MergedBackbone", "without_weights"]


class _Merge(torch.autograd.Function):
    """The rule's state → the tuple of merged parameters, views of one buffer; one graph node for the whole model."""

    @staticmethod
    def forward(ctx: Any, placement: Placement, rule: Rule, out: Tensor | None, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.placement, ctx.rule = placement, rule
        ctx.save_for_backward(*state)
        ctx.set_materialize_grads(False)
        return placement.bank.layout.views(placement.combine(rule, state, out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.placement.project(ctx.rule, gradients, ctx.saved_tensors)


class MergedBackbone(nn.Module):
    """A backbone whose weights are merged from a bank by a rule, such as θ₀ + Σₜ λₜ τₜ; only the rule can learn.

    The caller's backbone is not touched: its structure is copied without its weights, and every forward is a
    `torch.func.functional_call` with the merged parameters. The bank moves with the module but is no part of
    its `state_dict`, which holds the rule's parameters alone.

    Args:
        backbone: any module that maps a batch to features [B, d], or to an output with fields, as those of Hugging
            Face: of these `image_embeds` is taken, else `pooler_output`.
        task_vectors: the bank; its names are those of `backbone.named_parameters()`.
        coefficients: the rule of the merge, such as `LayerWise()`; bound to the bank here.
        bank: where the bank lives while it is merged: `"resident"`, `"streamed"` or `"sharded"`, see `placement`.
        experts: the bank before transforms, for adapters that want the experts themselves; default: `task_vectors`.

    Raises:
        InputError: the bank's parameters or buffers are not the backbone's.
    """

    skeleton: nn.Module

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        coefficients: Rule,
        bank: BankKind = "resident",
        experts: TaskVectors | None = None,
    ) -> None:
        super().__init__()
        self.experts = task_vectors if experts is None else experts
        _check_fit(backbone, task_vectors)
        if getattr(backbone, "image_mean", None) is not None:
            mean, std = backbone.image_mean, getattr(backbone, "image_std", None)
            check_normalisation("backbone.image_mean, backbone.image_std", mean, std)
        self.coefficients = coefficients.bind(task_vectors)
        self.kind, self.placement = bank, place(task_vectors, bank)
        # Straight into __dict__, past nn.Module: the skeleton has no weights to move, save or broadcast.
        self.__dict__["skeleton"] = without_weights(backbone)
        # Looking for tied weights anew in every forward takes longer than a merge of small tensors.
        self.tied = len(list(backbone.named_parameters(remove_duplicate=False))) > len(task_vectors.names)
        buffers = dict(backbone.named_buffers()) | dict(task_vectors.buffers)
        self.constants = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._kept: tuple[object, dict[str, Tensor]] | None = None
        self._scratch: Tensor | None = None

    def rebase(self, task_vectors: TaskVectors) -> None:
        """Go on from another bank of the same tasks and parameters, at its θ₀: what a start has given.

        Raises:
            InputError: the rule cannot go on from a start.
        """
        self.coefficients.rebase(task_vectors)
        placement, device = place(task_vectors, self.kind), self.device
        placement.to(device)
        self.placement, self._kept = placement, None
        self.constants |= {name: buffer.to(device) for name, buffer in task_vectors.buffers.items()}

    @property
    def task_vectors(self) -> TaskVectors:
        """The bank, where its placement keeps it; `device` says where the merge is."""
        return self.placement.bank

    @property
    def device(self) -> torch.device:
        """Where the merged parameters are."""
        return self.placement.device

    def merge(self, over: bool = False) -> dict[str, Tensor]:
        """The merged parameters by name; differentiable in the rule's parameters where they learn, else kept.

        Args:
            over: in the buffer that the next such call or `merge_leaves` writes over, for a step whose graph ends with
                it: on a CPU a new one costs more than the merge. A graph that is older refuses its backward then.
        """
        rule = self.coefficients
        if not rule.learns:
            version = (rule.version, self.device)
            if self._kept is None or self._kept[0] != version:
                self._kept = (version, self.merge_with(rule.state()))
            return self._kept[1]
        views = _Merge.apply(self.placement, rule, self._buffer() if over else None, *rule.state())
        return dict(zip(self.task_vectors.names, views))

    @torch.no_grad()
    def merge_with(self, state: State) -> dict[str, Tensor]:
        """The merged parameters for another state of the same rule; no gradient."""
        return self.task_vectors.layout.unflatten(self.placement.combine(self.coefficients, state))

    @torch.no_grad()
    def merge_leaves(self, state: State) -> dict[str, Tensor]:
        """The merged parameters as leaves that collect gradients, in a buffer that the next call writes over."""
        flat = self.placement.combine(self.coefficients, state, self._buffer())
        return {name: value.requires_grad_() for name, value in self.task_vectors.layout.unflatten(flat).items()}

    def _buffer(self) -> Tensor:
        if self._scratch is None or self._scratch.device != self.device:
            self._scratch = torch.empty(self.task_vectors.layout.numel, device=self.device)
        return self._scratch

    def inject(self, state: State, gradients: Sequence[Tensor | None]) -> Tensor:
        """A scalar whose gradient in the rule's parameters is that of the loss with the given ∂L/∂θ.

        Args:
            state: what the weights were merged with.
            gradients: ∂L/∂θ, one tensor per parameter; None where a parameter got none.
        """
        projected = self.placement.project(self.coefficients, gradients, tuple(value.detach() for value in state))
        return torch.stack([(live * gradient).sum() for live, gradient in zip(state, projected)]).sum()

    def idle(self, joint: bool) -> Tensor:
        """The loss of a process that has no image in a step: 0, with the gradient in the rule that the others find.

        Where the bank is sharded, a merge and its backward are the work of all processes. It takes part in them at
        the places where the others do.

        Args:
            joint: whether the others back-propagate through the merge, and not into its leaves.
        """
        if not self.coefficients.learns:
            return next(iter(self.merge().values())).new_zeros(())
        if joint:
            return torch.stack([0.0 * value.sum() for value in self.merge().values()]).sum()
        state = self.coefficients.state()
        dot = self.inject(state, [None] * len(self.merge_leaves(state)))
        return dot - dot.detach()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the tower's repeated blocks, such as `transformer.resblocks.0`, front to back."""
        return in_depth(self.task_vectors.layout.blocks)

    def block_width(self) -> int:
        """Channels of every block's output: the usual length of a block's vectors, for norms and biases have it.

        Raises:
            InputError: there are no blocks, or they are not of one width.
        """
        layout = self.task_vectors.layout
        lengths: dict[str, list[int]] = {block: [] for block in layout.depth("what is done to blocks")}
        for shape, block in zip(layout.shapes, layout.blocks):
            if block and len(shape) == 1:
                lengths[block].append(shape[0])
        widths = {block: statistics.mode(values) for block, values in lengths.items() if values}
        if len(set(widths.values())) != 1:
            listed = ", ".join(f"{block} {width}" for block, width in widths.items())
            raise InputError(
                "what is done to blocks needs blocks of one width, this backbone has "
                f"{listed or 'blocks without norms'}; name those of one width with `blocks`, such as 'layer4.*'"
            )
        return next(iter(widths.values()))

    def forward(
        self,
        images: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        edits: Sequence[tuple[str, Edit]] = (),
    ) -> Tensor:
        """Features [B, d] of `images` [B, …] in evaluation mode.

        Images in uint8 are scaled and normalised here, on the device, by the `image_mean` and `image_std`
        that the backbone carries, as open_clip's towers do.

        Args:
            images: a batch.
            parameters: the weights to use, and buffers where they are not the merge's; default: `merge()`.
            edits: submodules and functions that replace their outputs, in this order, see `edits`.

        Raises:
            InputError: `edits` names a submodule that the backbone has not, or two run in place of one.
        """
        if images.shape[0] == 0:  # a process's empty share: towers infer sizes, which of nothing they cannot
            return self.forward(images.new_zeros((1, *images.shape[1:])), parameters, edits)[:0]
        weights = self.constants | dict(self.merge() if parameters is None else parameters)
        with edited(self.skeleton, edits):
            output = torch.func.functional_call(
                self.skeleton, weights, (self.normalise(images),), tie_weights=self.tied, strict=True
            )
        return output if isinstance(output, Tensor) else _features(output)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in uint8 as the tower wants them; any others as they are."""
        if images.dtype != torch.uint8:
            return images
        if getattr(self.skeleton, "image_mean", None) is None:
            raise InputError(
                "uint8 images need `backbone.image_mean` and `backbone.image_std`; set them, "
                "or feed images that are already normalised floats"
            )
        mean, std = (
            torch.tensor(value, device=images.device).view(-1, 1, 1)
            for value in (self.skeleton.image_mean, self.skeleton.image_std)
        )
        return images.float().div_(255).sub_(mean).div_(std)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Plain tensors that load into the plain backbone with `load_state_dict`."""
        merged = {name: value.clone() for name, value in self.merge_with(self.coefficients.settled()).items()}
        persistent = self.skeleton.state_dict().keys()
        return {name: (merged | self.constants)[name] for name in persistent}

    def _apply(self, fn: Any, recurse: bool = True) -> MergedBackbone:
        super()._apply(fn, recurse)
        # Only the device follows: θ₀, the rule and the merge stay float32 under any precision of the tower.
        device = fn(torch.empty(0, device=self.device)).device
        self.placement.to(device)
        self.constants = {name: buffer.to(device) for name, buffer in self.constants.items()}
        return self


def _features(output: Any) -> Tensor:
    """Features of an output with fields."""
    for name in ("image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise InputError(
        f"the backbone gives a {type(output).__name__}, expected features [B, d]: a tensor, or an output with "
        "`image_embeds` or `pooler_output`; wrap the backbone in a module that picks its features"
    )


def without_weights(backbone: nn.Module) -> nn.Module:
    """A copy of the structure on the meta device, in evaluation mode."""
    memo: dict[int, Any] = {}  # of which `deepcopy` takes each tensor's stand-in
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(backbone, memo).eval()


def _check_fit(backbone: nn.Module, task_vectors: TaskVectors) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in backbone.named_parameters()}
    known = dict(zip(task_vectors.names, task_vectors.layout.shapes))
    for name, shape in shapes.items():
        if name not in known:
            raise InputError(f"the backbone's parameter {name!r} is not in the task vectors{did_you_mean(name, known)}")
        if known[name] != shape:
            raise InputError(
                f"parameter {name!r} has shape {known[name]} in the task vectors and {shape} in the backbone"
            )
    owned = dict(backbone.named_buffers())
    for what, names, own in (("parameter", known, shapes), ("buffer", task_vectors.buffers, owned)):
        surplus = [name for name in names if name not in own]
        if surplus:
            remedy = did_you_mean(surplus[0], own)
            if surplus[0] in owned:
                remedy = (
                    " as a parameter but as a buffer; tell `TaskVectors.from_state_dicts` with "
                    "`buffers=[name for name, _ in backbone.named_buffers()]`"
                )
            raise InputError(f"the task vectors' {what} {surplus[0]!r} is not in the backbone{remedy}")
