"""A quiet trainer, and a quick run's configuration without its suite, for tests."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

import adaptive_merge as am

STEPS = 20
QUICK = """
model:
  recipe: quick
  coefficients: {class_path: LayerWise, init_args: {init: 0.3}}
trainer: {max_steps: 3, accelerator: cpu, enable_progress_bar: false}
data: {images_per_task: 4}
"""


class Trajectory(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append(module.coefficients.values.detach().clone())


def fit(module, images, steps=STEPS, stream=None, **trainer):
    """Λ after each step, [S, T, G]."""
    trajectory = Trajectory()
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=steps, num_sanity_val_steps=0, callbacks=[trajectory], **settings | trainer)
    trainer.fit(module, datamodule=am.TaskStream(images, **{"images_per_task": 8} | (stream or {})))
    return torch.stack(trajectory.values)
