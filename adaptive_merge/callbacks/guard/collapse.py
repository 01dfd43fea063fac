"""What can be seen of a collapse without labels: sums over a few images of a task, and what they give away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.functional import entropy, jensen_shannon, undefined

__all__ = ["Alarm", "Range", "Signals", "judge", "mean_change", "sums"]

LOSS = (0.05, 0.15)  # of agreement, against the start: warn, stop
CROWDED = (0.7, 0.25)  # marginal entropy over that of start or expert, whichever is less: warn, stop
NORM = (2.0, 4.0)  # times farther from the length of the expert's features than at the start: warn, stop
CLASS = 0.4  # of the mean prediction, that one class has and the expert does not give it: warn
COEFFICIENTS = ((-0.5, 1.5), (-2.0, 3.0))
_NOISE = 1.4  # 2.5 standard errors of a share of one image: of a hundred, thirty change sides in a healthy run
_SPREAD = 0.2  # an expert that names hardly more than one class cannot show that the model crowds

Range = tuple[float, float]
_SINGLE = 6


@dataclass(frozen=True)
class Signals:
    """How a model stands to the expert of one task.

    Args:
        images: how many units (images) were looked at.
        agreement: share of them for which both predict the same.
        js: mean Jensen-Shannon divergence to the expert, in nats.
        entropy: mean prediction entropy over ln C.
        norm: mean length of the features over that of the expert's.
        marginal: entropy of the mean prediction over ln C; near 0 where all images go to one class.
        expert_marginal: the same of the expert; the images may be all of one class.
        crowd: the class that has most of the mean prediction beyond what the expert gives it.
        excess: how much that is.
    """

    images: int
    agreement: float
    js: float
    entropy: float
    norm: float
    marginal: float
    expert_marginal: float
    crowd: int = 0
    excess: float = 0.0

    @classmethod
    def of(cls, total: Tensor, classes: int) -> Signals:
        """Read sums over all images that were looked at, see `sums`."""
        images, agree, js, spread, length, expert_length = total[:_SINGLE].tolist()
        ours, theirs = (total[_SINGLE:].view(2, -1) / images).unbind()
        scale = math.log(max(classes, 2))
        excess, crowd = (ours - theirs).max(0)
        return cls(
            images=int(images),
            agreement=agree / images,
            js=js / images,
            entropy=spread / images / scale,
            norm=length / max(expert_length, 1e-12),
            marginal=float(torch.special.entr(ours).sum()) / scale,
            expert_marginal=float(torch.special.entr(theirs).sum()) / scale,
            crowd=int(crowd),
            excess=float(excess),
        )


@dataclass(frozen=True)
class Alarm:
    """A signal out of bounds.

    Args:
        signal: "agreement", "marginal", "class", "norm" or "coefficients".
        task: whose; None for what belongs to all.
        value: what was seen: agreement lost, marginal entropy and length over what they should be, a class's share
            beyond the expert's, a coefficient.
        stop: whether this, seen again and again, ends the run; otherwise it is a warning.
        crowd: the class, where one is meant.
    """

    signal: str
    task: str | None
    value: float
    stop: bool
    crowd: int = 0

    def __str__(self) -> str:
        what = {
            "agreement": "{:.1%} of the images no longer get the experts' class",
            "marginal": "its predictions crowd into few classes, {:.2f} of the marginal entropy is left",
            "class": "class {1} has {0:.0%} more of its predictions than the expert gives it, as a backdoor's would",
            "norm": "its features are {:.1f} times farther from the length of the expert's",
            "coefficients": "a coefficient has reached {:.1f}",
        }[self.signal].format(self.value, self.crowd)
        return f"task {self.task!r}: {what}" if self.task else what


def _largest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def sums(
    prediction: Prediction, expert: Prediction, width: int, predict: Callable[[Tensor], Tensor] = _largest
) -> Tensor:
    """What `Signals` are read from, float64 [6 + 2 · width] on the CPU; the sums of processes add up.

    Args:
        prediction: of a model for some images of a task, or for none.
        expert: the task's expert on the same images.
        width: classes of the widest task, so that the rows of all tasks are of one length.
        predict: what logits say, as the task's head reads them.
    """
    ours, theirs = prediction.logits.float(), expert.logits.float()
    probabilities = torch.zeros(2, width, device=ours.device)
    probabilities[:, : ours.shape[1]] = torch.stack([ours.softmax(-1).sum(0), theirs.softmax(-1).sum(0)])
    agreed = predict(ours) == predict(theirs)
    single = [
        ours.new_tensor(len(ours)),
        (agreed & ~(undefined(ours) | undefined(theirs))).float().sum(),
        jensen_shannon(ours, theirs).sum(),
        entropy(ours).sum(),
        prediction.features.float().norm(dim=-1).sum(),
        expert.features.float().norm(dim=-1).sum(),
    ]
    return torch.cat([torch.stack(single), probabilities.flatten()]).double().cpu()


def mean_change(now: Mapping[str, Signals], start: Mapping[str, Signals], name: str) -> float:
    """The mean over tasks of a signal, less that of the start on the same images."""
    return sum(getattr(now[task], name) - getattr(start[task], name) for task in now) / len(now)


def judge(
    now: Mapping[str, Signals], start: Mapping[str, Signals], values: Range | None, first: Range = (0.0, 0.0)
) -> list[Alarm]:
    """What is out of bounds.

    A mean loss of agreement ends a run by itself. So does a task whose predictions go to one class. Everything else
    is a warning unless agreement is lost with it: fewer classes, features of another length (heads look at their
    direction only), coefficients that run away. A class that has more than the expert gives it is always a warning.

    Args:
        now, start: task → signals of the model and of the model that the run started with, on the same images;
            empty where there is nothing to look at.
        values: the smallest and the largest coefficient, where nothing bounds them.
        first: the same at the start; a run that starts outside the usual range is not to be blamed for it.
    """
    lost = -mean_change(now, start, "agreement") if now else 0.0
    images = sum(ours.images for ours in now.values())
    alarms = []
    if lost >= LOSS[0]:
        alarms.append(Alarm("agreement", None, lost, lost >= max(LOSS[1], _NOISE / math.sqrt(images))))
    for task, ours in now.items():
        fell = start[task].agreement - ours.agreement >= LOSS[1]
        wanted = min(start[task].marginal, start[task].expert_marginal)
        left = ours.marginal / wanted if wanted > _SPREAD else 1.0
        if not left >= CROWDED[0]:
            alarms.append(Alarm("marginal", task, left, fell or not left >= CROWDED[1]))
        elif not ours.excess <= CLASS:  # where predictions crowd into few classes, this has been said
            alarms.append(Alarm("class", task, ours.excess, False, ours.crowd))
        farther = _from_one(ours.norm) / _from_one(start[task].norm)
        if not farther <= NORM[0]:
            alarms.append(Alarm("norm", task, farther, not farther <= NORM[1] and (fell or lost >= LOSS[0])))
    if values is not None and _outside(values, COEFFICIENTS[0], first):
        far = _outside(values, COEFFICIENTS[1], first)
        alarms.append(Alarm("coefficients", None, max(values, key=abs), far and lost >= LOSS[0]))
    return alarms


def _from_one(ratio: float) -> float:
    """How far a ratio is from 1, up or down."""
    return max(ratio, 1 / max(ratio, 1e-12))


def _outside(values: Range, bounds: Range, first: Range) -> bool:
    # In a form that takes NaN for outside.
    return not (values[0] >= min(bounds[0], first[0]) and values[1] <= max(bounds[1], first[1]))
