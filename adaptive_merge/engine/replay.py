"""What makes a resumed run see the bits of an uninterrupted one where frozen networks teach it.

The last bits of what a network says about an image depend on the images that it was run with. A run asks for each
image once, in the batch in which it first comes, and looks it up from then on; a resumed run starts with empty tables
and would ask for it in a later batch. Both see the same bits where the tables are filled again from the same batches.
No image is run that the run has not seen; one image costs what it cost before.
"""

from __future__ import annotations

from collections.abc import Callable

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.scored import ScoredModule
from adaptive_merge.objectives.base import Objective
from adaptive_merge.schedule import Stage, at_step

__all__ = ["replay"]


def replay(module: ScoredModule, stream: TaskStream, enter: Callable[[Stage], Objective]) -> None:
    """Fill the tables of frozen outputs as the steps that the trainer has taken did.

    Rows that a cache folder held before the run are known here as they were there, and not computed.

    Args:
        module: at a step after the first.
        stream: of the run.
        enter: switches the module to a stage and gives its objective.
    """
    trainer, views = module.trainer, module.views
    with trainer.precision_plugin.forward_context():
        for step, shares in enumerate(stream.taken()):
            objective = enter(at_step(module.stages, step // trainer.accumulate_grad_batches))
            if module.model.backbone.coefficients.learns:  # from here on the merge was another one
                views.outputs.forget("merged")
            for task, index in shares.items():
                part, source = {"index": index.to(module.device)}, stream.images[task]
                if objective.needs_expert:
                    views.expert(task, part, source, objective.needs_blocks)
                if not objective.needs_blocks:
                    views.features(task, part, source)
