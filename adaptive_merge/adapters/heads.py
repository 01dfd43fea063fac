"""What a task makes of features: frozen heads, of which the weight of a zero-shot classifier is one kind."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from adaptive_merge.errors import InputError

__all__ = ["Accuracy", "CosineHead", "Head", "HeadLike", "LinearHead", "check_width", "frozen_heads", "warn_of_scales"]

_LOG = logging.getLogger(__name__)
CLIP_SCALE: Final = 100.0
_FAR: Final = 10  # times shorter or longer: the scale starts at 1/0.07 and is held below 100


class Head(nn.Module, ABC):
    """What a task makes of features: logits, a prediction, and how good it is.

    A head speaks of *units*: an image, a token, a pixel. It gives a row of logits per unit, U = k · B rows for B
    images, those of the first image first, with the same k for every image of a task. Labels, losses, `Objective.keep`
    and `Objective.statistics` are per unit as well. As all images have equally many, a mean over units weighs images
    alike, however they lie on processes. Features stay one row [d] per image.

    The model takes a copy of its own, frozen and in float32. It moves with the model, and no `state_dict` holds it.

    Args:
        classes: C.
        width: d of the features that it takes.
    """

    unit: ClassVar[bool] = False
    """Whether it looks at the direction of features only: it is then given features of length 1."""

    tokens: int = 1
    """How many tokens of equal width the features of an image are, one after the other; adapters treat them alike."""

    formula: ClassVar[str] = "code of its own"
    """How logits follow from features and the tensors of its `state_dict`, for people who load an export."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes, self.width = classes, width

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """[U, C] from features [B, d], of length 1 where `unit` is true."""

    def forward(self, features: Tensor) -> Tensor:
        """The logits."""
        return self.logits(features)

    def seen(self, features: Tensor) -> Tensor:
        """Features as `logits` takes them, from those of tower and adapters."""
        return F.normalize(features, dim=-1) if self.unit else features

    def predict(self, logits: Tensor) -> Tensor:
        """What the logits [U, C] say, [U] as the labels are; default: the class of the largest."""
        return logits.argmax(-1)

    def metric(self) -> Metric:
        """A new metric of predictions [U] and labels [U], in [0, 1]; results call it accuracy, whatever it is."""
        return Accuracy()

    def tintable(self) -> Self:
        """A head of this kind that says the same, and whose parameters are what a task's own copy may change."""
        return copy.deepcopy(self)

    def bare(self) -> Tensor | Head:
        """What identifies it: the weight alone of a head that a plain tensor could have been, else itself."""
        return self


class _Affine(Head):
    """Logits W·f + b.

    Args:
        weight: W [C, d].
        bias: b [C]; None: none.

    Raises:
        InputError: shapes that do not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = tuple(weight.shape) if bias is None else (tuple(weight.shape), tuple(bias.shape))
            raise InputError(
                f"a head has a weight [classes, features] and a bias [classes] or none; got shape {shapes}"
            )
        super().__init__(*weight.shape)
        self.weight = nn.Parameter(weight.detach().float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def tintable(self) -> Self:
        bias = self.weight.new_zeros(self.classes) if self.bias is None else self.bias
        return type(self)(self.weight, bias)


class CosineHead(_Affine):
    """A CLIP zero-shot classifier: the cosine of feature and class embedding times the logit scale.

    Args:
        weight: class embeddings of unit length times the scale, [C, d].
        bias: [C]; None: none. A tint of the head has one.
    """

    unit = True
    formula = "normalize(features) @ weight.T (+ bias)"

    def bare(self) -> Tensor | Head:
        return self.weight if self.bias is None else self


class LinearHead(_Affine):
    """A trained linear layer on the features as they are, such as `nn.Linear`.

    Args:
        weight: [C, d].
        bias: [C]; None: none.
    """

    formula = "features @ weight.T (+ bias)"


HeadLike = Tensor | nn.Linear | Head
"""A plain tensor [C, d] is a `CosineHead`, an `nn.Linear` a `LinearHead`."""


class Accuracy(Metric):
    """Share of units whose prediction is the label, exact for any number of processes; NaN of none."""

    full_state_update = False
    hits: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add predictions [U] and labels [U]."""
        # Not in place: `reset` may have made the sums in inference mode.
        self.hits = self.hits + (predicted == labels).sum()
        self.units = self.units + len(labels)

    def compute(self) -> Tensor:
        """The share, a scalar."""
        return self.hits / self.units


def frozen_heads(heads: Mapping[str, HeadLike], tasks: Sequence[str], width: int | None) -> dict[str, Head]:
    """Task → a frozen copy of its head.

    Args:
        heads: task → head.
        tasks: which are needed.
        width: features of the backbone; None: the heads say it.

    Raises:
        InputError: a task without a head; a head of another width, with NaN, or that is none.
    """
    if not isinstance(heads, Mapping):
        raise InputError(f"`heads` are task → head, got a {type(heads).__name__}; give {{'task': head, …}}")
    for task in (task for task in tasks if task not in heads):
        raise InputError(f"task {task!r} has an expert but no head; give heads for {', '.join(tasks)}")
    frozen = {task: _as_head(heads[task], task).float().requires_grad_(False).eval() for task in tasks}
    width = _width(list(frozen.values())) if width is None else width
    for task, head in frozen.items():
        check_width(task, head, width)
        if not all(torch.isfinite(value).all() for value in head.state_dict().values()):
            raise InputError(f"the head of task {task!r} holds NaN or infinite values; build it again")
    return frozen


def check_width(task: str, head: Head, width: int) -> None:
    """Refuse features of another width than the head's: of a backbone that does not state its own."""
    if head.width != width:
        raise InputError(
            f"the head of task {task!r} has shape {(head.classes, head.width)}, expected [classes, {width}]: the "
            f"backbone gives {width} features; {_remedy(head, width)}"
        )


def warn_of_scales(heads: Mapping[str, Head]) -> None:
    """Tell of cosine heads whose rows are not as long as a logit scale: certainty means nothing with them."""
    for task, head in heads.items():
        length = float(head.weight.norm(dim=-1).median()) if isinstance(head, CosineHead) else CLIP_SCALE
        if not CLIP_SCALE / _FAR <= length <= CLIP_SCALE * _FAR:
            _LOG.warning(
                "the head of task %r has rows of length %.3g; those of CLIP's heads have %g, the logit scale times a "
                "class embedding of unit length. Entropy and agreement go by it: multiply the weight by the scale",
                task,
                length,
                CLIP_SCALE,
            )


def _width(heads: Sequence[Head]) -> int:
    """Of the features, as most heads have it, also where some or all are transposed."""
    widths = [head.width for head in heads]
    if len(set(widths)) > 1:
        widths += [head.classes for head in heads]
    return max(widths, key=widths.count)


def _remedy(head: Head, width: int) -> str:
    transposed = head.classes == width and head.width != width
    return "it looks transposed: give `head.T`" if transposed else "build the head with this model's text tower"


def _as_head(head: HeadLike, task: str) -> Head:
    try:
        if isinstance(head, Tensor):
            return CosineHead(head)
        if isinstance(head, nn.Linear):
            return LinearHead(head.weight, head.bias)
    except InputError as error:
        raise InputError(f"task {task!r}: {error}") from error
    if not isinstance(head, Head):
        raise InputError(
            f"the head of task {task!r} is a {type(head).__name__}; give a tensor [classes, features], a linear layer, "
            "or an object of a class derived from adaptive_merge.Head"
        )
    return copy.deepcopy(head)
