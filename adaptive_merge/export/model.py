"""A module in, a folder that other libraries load out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.export.adapter_file import save_adapters
from adaptive_merge.export.card import write_card
from adaptive_merge.export.folder import check_free, new_folder
from adaptive_merge.export.formats import FORMATS, Job, write_heads
from adaptive_merge.export.tower import fold
from adaptive_merge.export.verify import IMAGES, verify
from adaptive_merge.sealed import load_sealed

__all__ = ["export_model"]

_REFUSED: Final = (
    "task {task!r} cannot be folded into {format}: {reasons}. Export it as module or onnx, or leave out --task: the "
    "shared merge is written, and what the task has of its own stays in adapters.safetensors",
    "what all tasks share cannot be folded into {format}: {reasons}. Export it as module or onnx",
)


def export_model(
    module: AdaptiveMerge,
    folder: str | Path,
    format: str,
    *,
    task: str | None = None,
    text: str | None = None,
    check: bool = True,
    results: Mapping[str, Any] | None = None,
    command: str = "adaptive_merge.export.export_model(...)",
    base_models: Sequence[str] = (),
) -> str:
    """Write the model, its heads, the adapter file and a card into a new folder; returns what was done, in words.

    Everything is written beside `folder` and takes its name only once it is complete and, with `check`, compared.

    Args:
        module: an adapted module.
        folder: to write; it must not exist, or be empty.
        format: `"open_clip"`, `"hf"`, `"onnx"`, `"safetensors"` or `"module"`.
        task: this task's own model; default the merge that all tasks share.
        text: for open_clip, a full CLIP checkpoint to take the text tower from.
        check: load the folder again and compare it on 32 images.
        results: content of `results.json`, for the card.
        command: for the card.
        base_models: names on the hub of the pre-trained model and its experts, for the card.

    Raises:
        InputError: the folder is taken; the format cannot express the model; the comparison failed.
    """
    folder = Path(folder)
    _check_request(folder, format, text)
    folded = fold(module, task)
    if folded.left and format not in ("onnx", "module"):
        raise InputError(_REFUSED[task is None].format(task=task, format=format, reasons="; ".join(folded.left)))
    training = module.training
    module.eval()
    try:
        with new_folder(folder) as partial:
            told = _fill(Job(module, folded, task, partial, text), format, check, results, command, base_models)
    finally:
        module.train(training)
    return f"wrote {format} to {folder}; {told}"


def _fill(
    job: Job,
    format: str,
    check: bool,
    results: Mapping[str, Any] | None,
    command: str,
    base_models: Sequence[str],
) -> str:
    FORMATS[format](job)
    write_heads(job.folded.heads, job.folder)
    save_adapters(job.module, job.folder / "adapters.safetensors")
    told = "not compared (--verify)"
    if check:
        load_sealed(job.folder / "adapters.safetensors")
        told = f"largest difference {verify(job, format):.1e}"
    write_card(job, format, results, told, command, base_models)
    return f"{told} on {IMAGES} images" if check else told


def _check_request(folder: Path, format: str, text: str | None) -> None:
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}; choose {', '.join(FORMATS)}")
    if text is not None and format != "open_clip":
        raise InputError(f"a text tower belongs into an open_clip folder only, not into {format}; leave out --text")
    check_free(folder)
