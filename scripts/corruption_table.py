"""Accuracy of the individual experts and of task arithmetic (0.3) on corrupted images: a table of docs/protocols.md.

python scripts/corruption_table.py
"""

from __future__ import annotations

from typing import get_args

import pytorch_lightning as pl
import torch

import adaptive_merge as am
from adaptive_merge.data.corruptions import Kind

SEVERITIES = (1, 3, 5)
VIEWS = ("individual", "initial")


def accuracies(suite: am.Suite, corruption: am.Corruption | None) -> list[str]:
    """Mean accuracy of each view in percent."""
    module = am.TaskArithmetic(suite.task_vectors, suite.backbone, suite.heads)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = []
    for view in VIEWS:
        with module.viewing(view):
            trainer.validate(module, datamodule=am.TaskStream(suite.images, corruption=corruption), verbose=False)
        found.append(f"{100 * float(trainer.callback_metrics[f'{view}/accuracy']):.1f}")
    return found


def main() -> None:
    torch.set_num_threads(1)
    suite = am.load_suite("embedded")
    print("clean: experts {}, arithmetic {}".format(*accuracies(suite, None)))
    print(f"| severity | {' | '.join(f'{name} {s}' for name in ('experts', 'arithmetic') for s in SEVERITIES)} |")
    print("|" + "---|" * (1 + 2 * len(SEVERITIES)))
    for kind in get_args(Kind):
        rows = [accuracies(suite, am.Corruption(kind, severity)) for severity in SEVERITIES]
        print(f"| {kind} | {' | '.join(value for column in zip(*rows) for value in column)} |", flush=True)


if __name__ == "__main__":
    main()
