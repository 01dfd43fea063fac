"""The adapted model as an ONNX graph with a free batch size, by torch's dynamo exporter."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.export.tower import GraphModel, image_size

__all__ = ["INPUT", "output_name", "write_onnx"]

INPUT = "images"
_EXAMPLES = 2  # a batch of one would be taken for a constant


def output_name(task: str | None) -> str:
    """A task's graph ends in its logits, the shared merge's in features."""
    return "features" if task is None else "logits"


def write_onnx(module: AdaptiveMerge, task: str | None, path: Path) -> None:
    """Normalised images [batch, 3, H, W] in; features [batch, d], or with a task its logits, out.

    With a task, everything that it has of its own is in the graph: surgery after blocks and features, tints, head.

    Raises:
        InputError: the exporter's packages are not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"ONNX export needs the package {package!r}: pip install onnx onnxscript onnxruntime")
    backbone = module.model.backbone
    model = GraphModel(module, task).eval()
    example = torch.zeros(_EXAMPLES, 3, *image_size(backbone), device=backbone.device)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[output_name(task)],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            verbose=False,
        )
        _forget_origin(program.model)
        program.save(str(path))


def _forget_origin(model: Any) -> None:
    """Drop the exporter's notes on each node: stack traces with the paths of this machine, half of a small file."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its warnings about its own internals are not for the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
