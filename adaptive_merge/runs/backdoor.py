"""What a planted trigger does to the models that a run is compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError

__all__ = ["attack_success"]


@torch.no_grad()
def attack_success(module: AdaptiveMerge, stream: TaskStream, trigger: Trigger) -> dict[str, Any]:
    """The share of the attacked task's images that get the target class once they bear the trigger, by view.

    Of the images that the protocol scores, those of the target class do not count. The labels say which these are, and
    nothing else. `"clean"` is the same share without the trigger: of it, only what lies above is the attack's.

    Returns:
        `{"task", "target", "n", "clean": {view: share}, "success": {view: share}}`, shares in [0, 1].

    Raises:
        InputError: images without labels, or all of the target class; a patch that is larger than they are.
    """
    images, task = stream.images[trigger.task], trigger.task
    if images.labels is None:
        raise InputError(f"task {task!r} bears a trigger, and its images have no labels to measure the attack with")
    scored = stream.scored[task]
    index = scored[images.labels[scored] != trigger.target]
    if not len(index) or trigger.size > min(images.take(index[:1]).shape[-2:]):
        raise InputError(f"task {task!r} has no image of another class than {trigger.target} that the patch fits on")
    clean, success = {}, {}
    for view in module.scored_views:
        weights = module.views.weights(view, task)
        hits = torch.zeros(2)
        for part in index.split(stream.eval_batch_size):
            pixels = images.take(part)
            for row, batch in enumerate((pixels, trigger.stamp(pixels))):
                hits[row] += _said(module, task, batch, weights, view == "adapted").eq(trigger.target).sum().cpu()
        clean[view], success[view] = (hits / len(index)).tolist()
    module.views.release()
    return {"task": task, "target": trigger.target, "n": len(index), "clean": clean, "success": success}


def _said(module: AdaptiveMerge, task: str, images: Tensor, weights: Any, adapted: bool) -> Tensor:
    logits = module.model(task, images.to(module.device), weights, adapted=adapted).logits
    return module.model.heads[task].predict(logits)
